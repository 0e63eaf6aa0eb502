"""What every registered network keeps to."""

from __future__ import annotations

from collections import Counter
from typing import get_args

import pytest
import torch
from bitladder.models import MODELS, build_model
from bitladder.models.blocks import DEPTHS, ActivationKind, ShortcutKind
from torch import nn

RESNETS = [f"{family}{depth}" for family in ("preact_resnet", "cifar_resnet") for depth in DEPTHS]
PLAIN = [f"plane{depth}" for depth in (2, 4, 6, 8, 10)]
CLIPPED = ["preact_resnet8", "cifar_resnet8", "plane4", "tiny_convnet"]
# each kind of block once: what holds of the others follows from the loop that repeats them
SHAPES = [
    (family, {"block": block, "shortcut": shortcut})
    for family in ("preact_resnet20", "cifar_resnet20")
    for block in ("basic", "bottleneck", "bireal", "react")
    for shortcut in ("conv", "pad", "pool")
    if (family, block) != ("preact_resnet20", "react")
]


def build(name: str, channels: int = 1, size: int = 8, classes: int = 10, **options: object):
    return build_model(
        name, num_classes=classes, in_channels=channels, image_size=size, options=options
    )


def num_parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def calls(network: nn.Module, images: torch.Tensor) -> Counter[str]:
    """How often each module ran in one forward pass."""
    count: Counter[str] = Counter()
    for name, module in network.named_modules():
        module.register_forward_hook(lambda *_, name=name: count.update([name]))
    network(images)
    return count


def test_the_names_that_exist():
    assert sorted(MODELS) == sorted([*RESNETS, *PLAIN, "cifar_resnet18", "tiny_convnet"])


@pytest.mark.parametrize("name", [*MODELS])
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (1, 28), (3, 32)])
def test_one_logit_for_each_class(name, channels, size):
    images = torch.rand(2, channels, size, size)
    assert build(name, channels, size, classes=7)(images).shape == (2, 7)


@pytest.mark.parametrize("name", ["preact_resnet8", "cifar_resnet8", "plane10", "tiny_convnet"])
@pytest.mark.parametrize("size", [4, 5, 7])
def test_the_smallest_images_work(name, size):
    assert build(name, size=size)(torch.rand(2, 1, size, size)).shape == (2, 10)


@pytest.mark.parametrize("name", [*MODELS])
def test_every_network_says_what_it_is(name):
    assert MODELS[name].summary.endswith(".")
    assert {"width", "widen", "activation", "activation_clip"} <= MODELS[name].options().keys()


@pytest.mark.parametrize("name", RESNETS)
def test_options_are_typed_and_the_depth_is_not_one_of_them(name):
    options = MODELS[name].options()
    width = {"width", "widen"}
    assert options.keys() == {"block", "activation", "activation_clip", "shortcut"} | width
    blocks = ("basic", "bottleneck", "bireal", "react")
    expected = blocks[:3] if name.startswith("preact") else blocks
    assert get_args(options["block"].annotation) == expected
    assert options["activation"].annotation == (ActivationKind | None)
    assert options["shortcut"].annotation == (ShortcutKind | None)
    assert options["activation_clip"].annotation == (float | None)


@pytest.mark.parametrize(
    ("name", "classes", "count"),
    [  # as pytorchcv publishes them for preresnet20_cifar10, resnet20_cifar10, ...
        ("preact_resnet20", 10, 272_282),
        ("preact_resnet20", 100, 278_132),
        ("preact_resnet56", 10, 855_578),
        ("preact_resnet110", 10, 1_730_522),
        ("cifar_resnet20", 10, 272_474),
        ("cifar_resnet20", 100, 278_324),
    ],
)
def test_standard_networks_have_the_published_size(name, classes, count):
    assert num_parameters(build(name, channels=3, size=32, classes=classes)) == count


def test_the_padded_original_has_its_published_size():
    # He et al. count 0.27 million; option A has no weights in its shortcuts
    network = build("cifar_resnet20", channels=3, size=32, shortcut="pad")
    assert num_parameters(network) == 269_722


def test_the_tiny_network_is_tiny():
    assert num_parameters(build("tiny_convnet", channels=3, size=32)) < 5_000


@pytest.mark.parametrize("depth", [2, 4, 6, 8, 10])
def test_a_plain_network_has_as_many_convolutions_as_its_name_says(depth):
    network = build(f"plane{depth}")
    assert sum(isinstance(m, nn.Conv2d) for m in network.modules()) == depth


@pytest.mark.parametrize("family", ["preact_resnet", "cifar_resnet"])
@pytest.mark.parametrize("depth", DEPTHS)
def test_a_residual_network_has_as_many_layers_as_its_name_says(family, depth):
    network = build(f"{family}{depth}", width=4)
    on_the_path = [
        name
        for name, m in network.named_modules()
        if isinstance(m, nn.Conv2d | nn.Linear) and "shortcut" not in name
    ]
    assert len(on_the_path) == depth


@pytest.mark.parametrize("family", ["preact_resnet", "cifar_resnet"])
@pytest.mark.parametrize("depth", [20, 56, 110])
def test_a_bottleneck_network_has_as_many_layers_as_its_name_says(family, depth):
    network = build(f"{family}{depth}", width=4, block="bottleneck")
    on_the_path = [
        name
        for name, m in network.named_modules()
        if isinstance(m, nn.Conv2d | nn.Linear) and "shortcut" not in name
    ]
    assert len(on_the_path) == depth
    assert network.fc.in_features == 4 * 4 * 4


@pytest.mark.parametrize("name", ["preact_resnet26", "cifar_resnet8"])
def test_a_depth_without_bottlenecks_names_those_that_have_them(name):
    with pytest.raises(ValueError, match=r"must be 9n \+ 2; .* bottleneck blocks: 20, 56, 110"):
        build(name, block="bottleneck")


@pytest.mark.parametrize(("name", "options"), SHAPES, ids=str)
def test_no_module_stands_at_two_places(name, options):
    network = build(name, **options)
    count = calls(network, torch.rand(2, 1, 8, 8))
    assert set(count.values()) == {1}
    idle = [name for name, m in network.named_modules() if name not in count]
    assert all(not list(network.get_submodule(name).parameters()) for name in idle)


@pytest.mark.parametrize("name", [*MODELS])
def test_a_registered_network_runs_each_module_once(name):
    count = calls(build(name, width=4), torch.rand(2, 1, 8, 8))
    assert set(count.values()) == {1}


@pytest.mark.parametrize(("name", "options"), SHAPES, ids=str)
def test_every_parameter_gets_a_gradient(name, options):
    network = build(name, **options)
    network(torch.rand(4, 1, 8, 8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


@pytest.mark.parametrize("name", CLIPPED)
@pytest.mark.parametrize("clip", [6, 1, 0.5])
def test_a_clip_bounds_every_activation(name, clip):
    network = build(name, activation_clip=clip)
    outputs = []
    for module in network.modules():
        assert not isinstance(module, nn.ReLU)
        if isinstance(module, nn.Hardtanh):
            module.register_forward_hook(lambda m, i, output: outputs.append(output))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, 20.0)  # so that the clip has something to do
    network(torch.rand(4, 1, 8, 8))
    assert outputs
    assert all(y.min() == 0 and y.max() == clip for y in outputs)


@pytest.mark.parametrize("name", CLIPPED)
def test_no_clip_is_relu(name):
    kinds = {type(m) for m in build(name).modules()}
    assert nn.ReLU in kinds
    assert nn.Hardtanh not in kinds


@pytest.mark.parametrize("clip", [0, -1, float("inf"), float("nan"), True, "6"])
def test_a_clip_that_lets_nothing_or_everything_pass_is_refused(clip):
    with pytest.raises(ValueError, match=r"activation_clip must be a positive number"):
        build("tiny_convnet", activation_clip=clip)


@pytest.mark.parametrize("name", CLIPPED)
@pytest.mark.parametrize("width", [0, -4, 1.5, True, "16"])
def test_a_width_that_is_no_width_is_refused(name, width):
    with pytest.raises(ValueError, match="width must be a whole number of at least 1"):
        build(name, width=width)


@pytest.mark.parametrize("name", CLIPPED)
@pytest.mark.parametrize(("widen", "width"), [(2, 10), (1.5, 8), (0.1, 1), (1, 5)])
def test_widening_is_a_width_to_the_nearest_whole_channel(name, widen, width):
    wide, plain = build(name, width=5, widen=widen).state_dict(), build(name, width=width)
    assert {k: v.shape for k, v in wide.items()} == {
        k: v.shape for k, v in plain.state_dict().items()
    }


@pytest.mark.parametrize("name", CLIPPED)
@pytest.mark.parametrize("widen", [0, -1, float("inf"), float("nan"), True, "2"])
def test_a_widening_that_is_none_is_refused(name, widen):
    with pytest.raises(ValueError, match="widen must be a positive number"):
        build(name, widen=widen)


@pytest.mark.parametrize("name", CLIPPED)
def test_images_below_four_pixels_are_refused(name):
    with pytest.raises(ValueError, match="image_size must be a whole number of at least 4, got 3"):
        build(name, size=3)


@pytest.mark.parametrize("option", ["block", "shortcut"])
@pytest.mark.parametrize("name", ["preact_resnet20", "cifar_resnet20"])
def test_an_unknown_kind_lists_the_known_ones(name, option):
    with pytest.raises(ValueError, match=f"unknown {option} 'fancy'; known: "):
        build(name, **{option: "fancy"})


def test_policies_find_the_same_names_in_both_residual_families():
    names = {"conv1", "layer1.0.conv1", "layer1.0.bn1", "layer2.0.shortcut", "layer3.0.conv2", "fc"}
    for family in ("preact_resnet8", "cifar_resnet8"):
        assert names <= {name for name, _ in build(family).named_modules()}


@pytest.mark.parametrize("name", ["preact_resnet8", "cifar_resnet8"])
def test_a_padded_shortcut_keeps_every_second_pixel_and_adds_empty_channels(name):
    shortcut = build(name, shortcut="pad").layer2[0].shortcut
    x = torch.arange(2 * 16 * 5 * 5).view(2, 16, 5, 5)
    y = shortcut(x)
    assert y.shape == (2, 32, 3, 3)
    assert torch.equal(y[:, :16], x[:, :, ::2, ::2])
    assert not y[:, 16:].any()

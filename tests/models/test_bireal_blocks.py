"""Networks for one bit: a shortcut around every convolution, inputs of one sign or two."""

from __future__ import annotations

import pytest
import torch
from bitladder.models import build_model
from bitladder.models.bireal import PostActBiReal, PreActBiReal, ReAct
from bitladder.models.blocks import DEPTHS, activation_maker
from bitladder.models.preact_resnet import PreActBasic
from bitladder.models.resnet import PostActBasic
from bitladder.quant import (
    QuantizerChoice,
    QuantPolicy,
    bake,
    calibrate,
    probe,
    quant_layers,
    quantize_model,
)
from bitladder.quant.swap import apply_plan, layer_plan
from torch import Tensor, nn

BLOCKS = [
    ("preact_resnet8", "bireal"),
    ("cifar_resnet8", "bireal"),
    ("cifar_resnet8", "react"),
]
CLASSES = [PreActBiReal, PostActBiReal, ReAct]
BASIC = {PreActBiReal: PreActBasic, PostActBiReal: PostActBasic, ReAct: PostActBasic}
STEM = "conv1"


def build(name: str, channels: int = 1, size: int = 8, seed: int = 0, **options: object):
    return build_model(
        name, num_classes=10, in_channels=channels, image_size=size, options=options, seed=seed
    )


def images(count: int = 16, channels: int = 1, size: int = 8, seed: int = 0) -> Tensor:
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


def block_of(kind: type[nn.Module], activation: str = "relu", stride: int = 1) -> nn.Module:
    make = activation_maker(activation, None)
    torch.manual_seed(0)
    return kind(4, 4 * stride, stride, make_activation=make, shortcut="pool").eval()


def num_parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("kind", CLASSES)
def test_without_its_convolutions_a_block_passes_features_on(kind):
    block, x = block_of(kind), torch.rand(2, 4, 5, 5)
    nn.init.zeros_(block.conv1.weight)
    nn.init.zeros_(block.conv2.weight)
    assert torch.equal(block(x), x)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("activation", ["relu", "rprelu", "hardtanh"])
def test_each_convolution_has_a_way_around_it_of_its_own(kind, activation):
    x = torch.rand(2, 4, 5, 5)
    blind = {}
    for block in (block_of(kind, activation), block_of(BASIC[kind], activation)):
        nn.init.zeros_(block.conv2.weight)
        before = block(x)
        nn.init.zeros_(block.conv1.weight)
        blind[type(block)] = torch.equal(block(x), before)
    # around both together, what the first one finds is lost with the second
    assert blind == {kind: False, BASIC[kind]: True}


@pytest.mark.parametrize("kind", [PreActBiReal, PostActBiReal])
def test_nothing_stands_in_the_way_around_a_bireal_convolution(kind):
    block = block_of(kind, "hardtanh")
    nn.init.zeros_(block.conv1.weight)
    nn.init.zeros_(block.conv2.weight)
    x = torch.tensor([-100.0, -1.0, 0.0, 7.0]).view(1, 4, 1, 1).requires_grad_()
    y = block(x)
    y.sum().backward()
    assert torch.equal(y, x)
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize(("name", "block"), BLOCKS)
@pytest.mark.parametrize("depth", DEPTHS)
def test_every_depth_has_as_many_layers_as_its_name_says(name, block, depth):
    network = build(f"{name.rstrip('8')}{depth}", width=4, block=block)
    on_the_path = [
        name
        for name, m in network.named_modules()
        if isinstance(m, nn.Conv2d | nn.Linear) and "shortcut" not in name
    ]
    assert len(on_the_path) == depth
    assert network.eval()(images(2)).shape == (2, 10)


# stem, 3x3 convolutions, shortcuts, classifier
RESNET20 = 3 * 16 * 9
RESNET20 += 6 * 16 * 16 * 9 + 16 * 32 * 9 + 5 * 32 * 32 * 9 + 32 * 64 * 9 + 5 * 64 * 64 * 9
RESNET20 += 16 * 32 + 32 * 64
RESNET20 += 64 * 10 + 10
CONVOLVED = 16 + 6 * (16 + 32 + 64)  # output channels of stem and 3x3 convolutions


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        # pre-activation norms stand at inputs: 7 of 16 channels, 6 of 32, 6 of 64
        ("preact_resnet20", {"block": "bireal"}, RESNET20 + 2 * (7 * 16 + 6 * 32 + 6 * 64)),
        ("cifar_resnet20", {"block": "bireal"}, RESNET20 + 2 * (CONVOLVED + 32 + 64)),
        ("cifar_resnet20", {"block": "react"}, RESNET20 + 2 * (CONVOLVED + 96) + 3 * CONVOLVED),
        (
            "cifar_resnet20",
            {"block": "react", "activation": "relu", "shortcut": "pad"},
            RESNET20 - 16 * 32 - 32 * 64 + 2 * CONVOLVED,
        ),
    ],
)
def test_the_number_of_parameters_is_the_sum_of_the_parts(name, options, count):
    assert num_parameters(build(name, channels=3, size=32, **options)) == count


@pytest.mark.parametrize(("name", "block"), BLOCKS)
def test_its_convolutions_start_as_those_of_basic_blocks(name, block):
    network, basic = build(name, block=block).state_dict(), build(name).state_dict()
    convolutions = {k: v for k, v in basic.items() if v.dim() == 4}
    assert all(torch.equal(network[k], v) for k, v in convolutions.items())
    assert {k for k, v in network.items() if v.dim() == 4} == convolutions.keys()


@pytest.mark.parametrize(("name", "block"), BLOCKS)
def test_inputs_are_signed_but_behind_a_relu(name, block):
    own = probe(build(name, block=block), [images()]).layers
    relu = probe(build(name, block=block, activation="relu"), [images()]).layers
    inner = [k for k in own if k != STEM and "shortcut" not in k and k != "fc"]
    assert len(inner) == 6
    assert all(own[k].signed_input for k in inner)
    assert not any(relu[k].signed_input for k in inner)


@pytest.mark.parametrize(("name", "block"), BLOCKS)
@pytest.mark.parametrize("shortcut", ["pool", "conv"])
def test_policies_find_its_shortcuts(name, block, shortcut):
    layers = probe(build(name, block=block, shortcut=shortcut), [images()]).layers
    found = {k for k, facts in layers.items() if "shortcut" in facts.kinds}
    assert found == {"layer2.0.shortcut", "layer3.0.shortcut"}


@pytest.mark.parametrize(("name", "block"), BLOCKS)
@pytest.mark.parametrize("method", ["uniq", "bireal", "reactnet"])
def test_at_one_bit_it_trains_is_baked_and_comes_back_from_its_state(name, block, method):
    def fresh() -> nn.Module:
        return build(name, width=4, block=block)

    choice = QuantizerChoice(method)
    network = quantize_model(fresh(), QuantPolicy(1, 1, choice, choice), batches=[images()])
    calibrate(network, [images()])
    network(images(seed=1)).square().sum().backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
    levels = quant_layers(network)["layer2.0.conv2"].input_quantizer(images()).unique()
    assert len(levels) <= 2

    again = apply_plan(fresh(), layer_plan(network))
    again.load_state_dict(network.state_dict(), strict=True)
    expected = network.eval()(images())
    assert torch.equal(again.eval()(images()), expected)
    assert torch.equal(bake(again)(images()), expected)


@pytest.mark.parametrize(("name", "block"), BLOCKS)
def test_behind_a_relu_one_bit_is_zero_and_a_step(name, block):
    choice = QuantizerChoice("lsq")
    policy = QuantPolicy(32, 1, choice, choice, shortcut=8)
    network = build(name, width=4, block=block, activation="relu")
    network = quantize_model(network, policy, batches=[images()])
    calibrate(network, [images()])
    seen: list[Tensor] = []
    quantizer = quant_layers(network)["layer1.0.conv2"].input_quantizer
    quantizer.register_forward_hook(lambda m, args, y: seen.append(y.unique()))
    network(images())
    assert len(seen[0]) == 2
    assert seen[0][0] == 0
    assert seen[0][1] > 0


@pytest.mark.parametrize(("name", "block"), BLOCKS)
def test_it_learns_in_float(name, block):
    network = build(name, width=4, block=block)
    targets = torch.arange(16) % 10
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(15):
        loss = nn.functional.cross_entropy(network(images()), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(("name", "block"), BLOCKS)
@pytest.mark.parametrize("size", [5, 8])
def test_torch_export_gives_the_same_network(name, block, size):
    network = build(name, size=size, width=4, block=block).eval()
    x = images(size=size)
    torch.testing.assert_close(torch.export.export(network, (x,)).module()(x), network(x))


@pytest.mark.parametrize(("name", "block"), BLOCKS)
def test_channels_last_is_safe_and_gives_the_same(name, block):
    network = build(name, width=4, block=block)
    assert not any(
        m.kernel_size == (1, 1) and m.stride != (1, 1)  # whose backward pass writes beyond memory
        for m in network.modules()
        if isinstance(m, nn.Conv2d)
    )
    runs = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        network = build(name, width=4, block=block).to(memory_format=memory_format)
        y = network(images().to(memory_format=memory_format))
        y.square().sum().backward()
        grads = torch.cat([p.grad.flatten() for p in network.parameters()])
        runs.append((y.detach(), grads))
    (y, grads), (y_last, grads_last) = runs
    torch.testing.assert_close(y_last, y)
    assert (grads_last - grads).norm() < 0.05 * grads.norm()  # a value at a kink may change sides


@pytest.mark.parametrize("block", ["basic", "bireal"])
@pytest.mark.parametrize("name", ["preact_resnet8", "cifar_resnet8"])
def test_a_pooled_shortcut_reads_the_mean_of_what_it_skips(name, block):
    unit = build(name, block=block, shortcut="pool").layer2[0]
    x = torch.arange(25.0).view(1, 1, 5, 5)
    expected = torch.tensor([[3.0, 5.0, 6.5], [13.0, 15.0, 16.5], [20.5, 22.5, 24.0]])
    assert torch.equal(unit.shortcut_pool(x)[0, 0], expected)
    assert unit.shortcut.stride == (1, 1)
    assert isinstance(
        build(name, block=block, shortcut="conv").layer2[0].shortcut_pool, nn.Identity
    )


def test_a_pooled_shortcut_of_bottlenecks_keeps_the_size_where_only_channels_change():
    network = build("cifar_resnet20", block="bottleneck", shortcut="pool", width=4)
    assert isinstance(network.layer1[0].shortcut_pool, nn.Identity)
    assert network(images(2, size=7)).shape == (2, 10)


@pytest.mark.parametrize(("name", "block"), BLOCKS)
@pytest.mark.parametrize("size", [4, 5, 7])
@pytest.mark.parametrize("shortcut", ["pool", "conv", "pad"])
def test_the_smallest_images_work(name, block, size, shortcut):
    network = build(name, size=size, width=4, block=block, shortcut=shortcut)
    assert network(images(2, size=size)).shape == (2, 10)


def test_options_left_open_are_those_of_the_block():
    for name, block, activation in (
        ("preact_resnet8", "basic", "relu"),
        ("preact_resnet8", "bireal", "hardtanh"),
        ("cifar_resnet8", "bireal", "hardtanh"),
        ("cifar_resnet8", "react", "rprelu"),
    ):
        shortcut = "conv" if block == "basic" else "pool"
        said = build(name, block=block, activation=activation, shortcut=shortcut)
        assert str(build(name, block=block)) == str(said)


def test_an_activation_comes_before_the_sum_or_after_it_so_preact_has_no_react():
    with pytest.raises(ValueError, match="unknown block 'react'; known: basic, bottleneck, bireal"):
        build("preact_resnet8", block="react")


@pytest.mark.parametrize("block", ["bireal", "react"])
def test_a_clip_is_for_the_relu(block):
    with pytest.raises(ValueError, match="activation_clip is for relu"):
        build("cifar_resnet8", block=block, activation_clip=1.0)
    kinds = {type(m) for m in build("cifar_resnet8", block=block, activation="relu").modules()}
    assert nn.ReLU in kinds

"""Networks by name, from torchvision and from anybody's module."""

from __future__ import annotations

import hashlib
import sys

import pytest
import torch
import torchvision
from bitladder.models import MODELS, build_model, source_hash
from bitladder.quant.registry import UnknownNameError
from torch import nn

NETS = """
import functools
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes, in_channels, hidden=4):
        super().__init__()
        self.body = nn.Conv2d(in_channels, hidden, 3)
        self.head = nn.Linear(hidden, num_classes)
        self.hidden = hidden

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))

    @classmethod
    def wide(cls, num_classes, in_channels):
        return cls(num_classes, in_channels, hidden=32)

def fixed():
    return Net(10, 1)

def anything(**kwargs):
    net = Net(kwargs["num_classes"], kwargs["in_channels"])
    net.seen = kwargs
    return net

def picky(num_classes, *, mode):
    raise RuntimeError(f"no such mode: {mode}")

def a_list(num_classes):
    return [num_classes]

narrow = functools.partial(Net, hidden=2)
number = 3
"""


@pytest.fixture
def nets(tmp_path, monkeypatch):
    """A user's module, importable as `users_nets`."""
    file = tmp_path / "users_nets.py"
    file.write_text(NETS)
    monkeypatch.syspath_prepend(tmp_path)
    yield file
    sys.modules.pop("users_nets", None)


def build(name: str, channels: int = 1, size: int = 8, seed: int = 0, **options: object):
    return build_model(
        name, num_classes=10, in_channels=channels, image_size=size, options=options, seed=seed
    )


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("name", ["preact_resnet8", "cifar_resnet8", "plane2", "tiny_convnet"])
def test_the_seed_decides_the_weights(name):
    assert same_weights(build(name, seed=3), build(name, seed=3))
    assert not same_weights(build(name, seed=3), build(name, seed=4))


@pytest.mark.parametrize("name", ["preact_resnet8", "torchvision:resnet18", "users_nets:Net"])
def test_the_global_generator_is_left_as_it_was(name, nets):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = build(name, channels=3, size=32)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert same_weights(first, build(name, channels=3, size=32))


def test_weights_are_made_on_the_cpu_whatever_the_default_device():
    with torch.device("meta"):
        network = build("tiny_convnet")
    assert {p.device.type for p in network.parameters()} == {"cpu"}


def test_options_reach_the_network():
    assert build("preact_resnet8", width=5).conv1.out_channels == 5


def test_an_unknown_name_lists_the_known_ones_and_the_other_ways():
    with pytest.raises(UnknownNameError) as caught:
        build("preactresnet20")
    text = str(caught.value)
    assert "unknown model 'preactresnet20'; did you mean 'preact_resnet20'?" in text
    assert all(name in text for name in MODELS)
    assert "torchvision:" in text
    assert "package.module:factory" in text


def test_an_unknown_name_close_to_torchvisions_is_found_there():
    with pytest.raises(UnknownNameError, match="'torchvision:mobilenet_v2'"):
        build("mobilenetv2")


@pytest.mark.parametrize("name", ["preact_resnet8", "users_nets:Net"])
def test_an_unknown_option_lists_the_known_ones(name, nets):
    ours = "activation, activation_clip, block, shortcut, widen, width"
    known = {"preact_resnet8": ours}.get(name, "hidden")
    with pytest.raises(UnknownNameError, match=f"unknown {name} option 'depht'; known: {known}$"):
        build(name, depht=3)


@pytest.mark.parametrize("name", ["tiny_convnet", "users_nets:anything"])
@pytest.mark.parametrize("option", ["num_classes", "in_channels", "image_size"])
def test_what_the_data_decide_is_no_option(name, option, nets):
    with pytest.raises(ValueError, match=f"{option} follows from the data"):
        build(name, **{option: 3})


@pytest.mark.parametrize(
    "name", ["torchvision:resnet18", "resnet18", "torchvision.models:resnet18"]
)
def test_torchvisions_resnet18_has_its_own_weights_and_our_classes(name):
    network = build(name, channels=3, size=32).eval()
    assert isinstance(network, torchvision.models.ResNet)
    assert network(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    published = 11_689_512 - 990 * 513  # 1000 classes; each has 512 weights and a bias
    assert sum(p.numel() for p in network.parameters()) == published


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("name", ["mobilenet_v2", "torchvision:resnet18"])
def test_a_torchvision_network_takes_any_number_of_channels(name, channels):
    network = build(name, channels=channels, size=32).eval()
    assert network(torch.rand(2, channels, 32, 32)).shape == (2, 10)
    assert same_weights(network, build(name, channels=channels, size=32))


def test_torchvision_options_are_passed_on():
    narrow = build("mobilenet_v2", channels=3, size=32, width_mult=0.25)
    assert narrow.features[0][0].out_channels == 8


def test_a_vision_transformer_gets_the_image_size():
    # its own default, 224, would fit its patches of 16 pixels
    with pytest.raises(ValueError, match=r"vit_b_16\(.*indivisible by patch size"):
        build("vit_b_16", channels=3, size=40)


def test_an_unknown_torchvision_model_lists_the_known_ones():
    with pytest.raises(UnknownNameError, match=r"did you mean 'resnet18'\? known: alexnet, "):
        build("torchvision:resnet81")


def test_an_option_that_torchvision_refuses_is_shown():
    with pytest.raises(ValueError, match=r"torchvision:resnet18\(.*colour=3\) failed: TypeError"):
        build("torchvision:resnet18", channels=3, colour=3)


def test_a_foreign_factory_gets_what_its_signature_has(nets):
    network = build("users_nets:Net", channels=3, hidden=6)
    assert network.head.out_features == 10
    assert network.body.in_channels == 3
    assert network.hidden == 6
    assert build("users_nets:fixed").head.out_features == 10
    assert build("users_nets:Net.wide").hidden == 32
    assert build("users_nets:narrow").hidden == 2


def test_a_foreign_factory_with_kwargs_gets_everything(nets):
    seen = build("users_nets:anything", colour="red").seen
    assert seen == {"num_classes": 10, "in_channels": 1, "image_size": 8, "colour": "red"}


def test_a_module_in_the_current_folder_is_found(tmp_path, monkeypatch):
    (tmp_path / "nets_right_here.py").write_text("import torch\nNet = torch.nn.Identity\n")
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    monkeypatch.chdir(tmp_path)
    assert isinstance(build("nets_right_here:Net"), nn.Identity)


def test_a_module_that_does_not_exist_is_named(nets):
    with pytest.raises(ValueError, match=r"no module 'users_knots' in the current folder"):
        build("users_knots:Net")
    with pytest.raises(ValueError, match=r"no module 'users_nets.sub'|'users_nets'"):
        build("users_nets.sub:Net")


def test_a_module_that_cannot_be_imported_says_why(tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import a_module_nobody_has\n")
    (tmp_path / "half_written.py").write_text("def net(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"needs_more needs a module: .*'a_module_nobody_has'"):
        build("needs_more:Net")
    with pytest.raises(ValueError, match="importing half_written failed: SyntaxError"):
        build("half_written:Net")


def test_a_factory_that_does_not_exist_lists_those_that_do(nets):
    with pytest.raises(UnknownNameError, match=r"of users_nets 'net'; did you mean 'Net'\? known"):
        build("users_nets:net")


def test_a_factory_that_cannot_be_called_is_refused(nets):
    with pytest.raises(ValueError, match="'users_nets:number' is a int, which cannot be called"):
        build("users_nets:number")


def test_a_factory_that_refuses_its_arguments_shows_them(nets):
    with pytest.raises(ValueError, match=r"picky\(num_classes=10\) failed: TypeError: .*'mode'"):
        build("users_nets:picky")
    with pytest.raises(ValueError, match=r"mode='x'\) failed: RuntimeError: no such mode: x"):
        build("users_nets:picky", mode="x")


def test_a_result_that_is_no_network_is_refused(nets):
    with pytest.raises(ValueError, match=r"made a list, not a torch.nn.Module"):
        build("users_nets:a_list")


@pytest.mark.parametrize("name", ["users_nets:", ":Net", "users/nets.py:Net", "users_nets:Net:x"])
def test_an_import_path_that_is_none_says_its_form(name):
    with pytest.raises(ValueError, match=r"not of the form 'package.module:factory'"):
        build(name)


def test_a_source_hash_is_the_file_of_an_import_path(nets):
    expected = hashlib.sha256(nets.read_bytes()).hexdigest()
    for factory in ("Net", "Net.wide", "fixed", "narrow"):
        assert source_hash(f"users_nets:{factory}") == expected


def test_a_source_hash_follows_a_factory_to_the_file_that_defines_it(nets, tmp_path):
    (tmp_path / "passes_it_on.py").write_text("from users_nets import Net\n")
    assert source_hash("passes_it_on:Net") == source_hash("users_nets:Net")


def test_a_source_hash_of_a_known_model_is_its_version():
    assert source_hash("preact_resnet8") == f"preact_resnet8/v{MODELS['preact_resnet8'].version}"
    expected = f"torchvision:resnet18/{torchvision.__version__}"
    assert source_hash("resnet18") == source_hash("torchvision:resnet18") == expected


def test_a_source_hash_without_a_source_is_refused():
    with pytest.raises(ValueError, match="'builtins:dict' has no source file"):
        source_hash("builtins:dict")


def test_a_source_hash_of_an_unknown_model_is_refused():
    with pytest.raises(UnknownNameError, match="unknown model 'resnot'"):
        source_hash("resnot")

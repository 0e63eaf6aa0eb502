import pytest
import torch
from bitladder.models import build_model
from bitladder.models.tapped import check_layers, tapped
from bitladder.quant import QuantPolicy, quantize_model
from bitladder.quant.calibrate import bake, calibrate
from torch import nn


@pytest.fixture
def x():
    return torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def network():
    return build_model("tiny_convnet", num_classes=10, in_channels=1, image_size=8).eval()


def hooks_of(model):
    return [hook for module in model.modules() for hook in module._forward_hooks.values()]


def test_what_layers_give_comes_with_the_logits(network, x):
    outputs = tapped(network, x, ["bn1", "act2"])
    assert torch.equal(outputs.logits, network(x))
    assert list(outputs.features) == ["bn1", "act2"]
    assert torch.equal(outputs.features["bn1"], network.bn1(network.conv1(x)))
    assert torch.equal(network.fc(outputs.features["act2"].mean((2, 3))), outputs.logits)


def test_a_network_keeps_no_hook_even_when_it_fails(network, x):
    tapped(network, x, ["act1"])
    assert not hooks_of(network)
    with pytest.raises(RuntimeError):
        tapped(network, x[:, :, 0], ["act1"])
    assert not hooks_of(network)


def test_without_layers_nothing_is_hooked(network, x):
    seen = []
    network.conv1.register_forward_hook(lambda *_: seen.append(len(hooks_of(network))))
    assert tapped(network, x).features == {}
    assert seen == [1]


def test_gradients_pass_through_a_feature(network, x):
    feature = tapped(network, x, ["conv2"]).features["conv2"]
    feature.sum().backward()
    assert network.conv1.weight.grad.abs().sum() > 0
    assert network.fc.weight.grad is None


def test_a_quantized_and_a_baked_network_have_the_same_layers(network, x):
    student = quantize_model(network, QuantPolicy(weight_bits=4, activation_bits=4), inputs=x)
    calibrate(student, [x])
    student.eval()
    found = tapped(student, x, ["conv2", "fc"])
    assert torch.equal(found.features["fc"], found.logits)
    assert torch.equal(
        tapped(bake(student), x, ["conv2"]).features["conv2"], found.features["conv2"]
    )


def test_a_layer_that_is_not_there_is_named_with_near_ones():
    network = build_model("preact_resnet8", num_classes=10, in_channels=1, image_size=8)
    with pytest.raises(ValueError, match=r"unknown layer 'layr2'; did you mean 'layer2'\? known: "):
        check_layers(network, ["layer1", "layr2"])
    with pytest.raises(ValueError, match=r"known: layer1\.0\.\w+, layer1\.0"):
        check_layers(network, ["layer1.0.nothing"])


class Reused(nn.Module):
    """One ReLU for two places, another that no pass meets, and a layer that gives a pair."""

    def __init__(self, inplace=False):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.relu = nn.ReLU(inplace=inplace)
        self.idle = nn.ReLU()
        self.pair = nn.LSTM(3, 3)

    def forward(self, x):
        x = self.relu(self.second(self.relu(self.first(x))))
        return self.pair(x)[0]


def test_of_a_layer_that_runs_twice_the_last_output_counts():
    network, x = Reused(), torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    outputs = tapped(network, x, ["relu", "second"])
    assert torch.equal(outputs.features["relu"], outputs.features["second"].relu())


@pytest.mark.parametrize(
    ("layer", "message"),
    [("idle", "'idle' does not run"), ("pair", "'pair' gives no tensor, but tuple")],
)
def test_a_layer_without_a_usable_output_is_refused(layer, message):
    with pytest.raises(ValueError, match=message):
        tapped(Reused(), torch.zeros(2, 3), [layer])


@pytest.mark.parametrize("grad", [True, False])
def test_an_output_that_is_overwritten_is_refused(grad):
    with (
        torch.set_grad_enabled(grad),
        pytest.raises(ValueError, match="'second' gives is overwritten"),
    ):
        tapped(Reused(inplace=True), torch.zeros(2, 3), ["second"])

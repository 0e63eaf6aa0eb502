"""One layer: how its weight is presented, and what it can be asked."""

from __future__ import annotations

import copy

import pytest
import torch
from bitladder.quant import (
    QuantizerChoice,
    QuantLayer,
    QuantPolicy,
    apply_plan,
    bake,
    calibrate,
    float_state_dict,
    ideal_bytes,
    layer_plan,
    layer_report,
    quantize_model,
    weight_bin_regularization,
)
from torch import Tensor, nn

PER_CHANNEL = QuantizerChoice("lsq", {"per_channel": True})


def signal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def low_bit(layer: nn.Module, x: Tensor, bits: int = 3) -> nn.Module:
    policy = QuantPolicy(bits, bits, first_last_bits=bits, first_last_weight=PER_CHANNEL)
    model = quantize_model(layer, policy, inputs=x)
    calibrate(model, [x])
    return model


@pytest.fixture
def transposed() -> tuple[nn.Module, Tensor]:
    x = signal(2, 4, 5, 5)
    layer = nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2, padding=1)
    return low_bit(layer, x), x


def test_a_transposed_weight_is_seen_with_its_output_channels_first(transposed):
    model, x = transposed
    assert model.latent.shape == (4, 3, 3, 3)
    assert model.weight.shape == (3, 4, 3, 3)
    assert model.weight_quantizer.scale.shape == (3,)
    q = model.weight_quantizer.encode(model.weight)
    assert torch.equal(model.weight_quantizer(model.weight), q.dequantize())
    want = nn.functional.conv_transpose2d(
        model.input_quantizer(x),
        q.dequantize().transpose(0, 1),
        model.bias,
        stride=2,
        padding=1,
        groups=2,
    )
    assert torch.equal(model(x), want)


def test_gradient_and_change_in_place_reach_the_latent_weight(transposed):
    model, x = transposed
    model(x).square().mean().backward()
    assert model.latent.grad.abs().sum() > 0
    with torch.no_grad():
        model.weight.fill_(2.0)
    assert (model.latent == 2).all()


def test_what_reads_weights_reads_a_transposed_one(transposed):
    model, x = transposed
    weight_bin_regularization(model).backward()
    assert model.latent.grad.shape == model.latent.shape
    assert layer_report(model, [x])[0]["weight_levels"] <= 8
    packed = -(-model.latent.numel() * 3 // 8)
    assert ideal_bytes(model) == packed + 4 * 3 + 4 + 4 * 6  # scales, the input's, the bias


def test_a_transposed_layer_bakes_and_rebuilds_to_the_same_bits(transposed):
    model, x = transposed
    model.eval()
    want = model(x)
    baked = bake(copy.deepcopy(model))
    assert baked.layer.weight.shape == model.latent.shape
    assert torch.equal(baked(x), want)
    empty = nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2, padding=1)
    rebuilt = apply_plan(empty, layer_plan(model))
    rebuilt.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(rebuilt(x), want)
    assert float_state_dict(model)["weight"].shape == (4, 3, 3, 3)


def test_further_arguments_go_to_the_layer(transposed):
    model, x = transposed
    assert model(x).shape[-2:] == (9, 9)
    assert model(x, output_size=(10, 10)).shape[-2:] == (10, 10)


def test_a_layer_called_by_name_is_quantized_and_calibrated():
    class ByName(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(input=x)

    model = low_bit(ByName(), signal(5, 3))
    assert torch.equal(model(signal(5, 3)), model.fc(signal(5, 3)))


def test_code_around_a_layer_may_read_its_settings():
    conv = low_bit(nn.Conv2d(3, 6, 3, stride=2, bias=False), signal(2, 3, 7, 7))
    assert (conv.in_channels, conv.out_channels, conv.stride) == (3, 6, (2, 2))
    assert conv.bias is None
    linear = low_bit(nn.Linear(3, 2), signal(5, 3))
    assert (linear.in_features, linear.out_features) == (3, 2)
    assert linear.bias is linear.layer.bias


@pytest.mark.parametrize(
    "layer", [nn.Linear(4, 3), nn.Conv1d(4, 3, 1)], ids=lambda m: type(m).__name__
)
def test_hooks_that_hung_on_a_layer_go_on_to_run(layer):
    x = torch.ones(2, 4, *[5] * (layer.weight.dim() - 2))
    plain = QuantLayer(layer, None, None)(x)
    layer.register_forward_hook(lambda _, args, output: 2 * output)
    assert torch.equal(QuantLayer(layer, None, None)(x), 2 * plain)

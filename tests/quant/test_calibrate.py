"""Ranges from data, hand-over, batch norm, and frozen copies."""

from __future__ import annotations

import copy

import pytest
import torch
from bitladder.quant import (
    QuantizerChoice,
    QuantPolicy,
    apply_plan,
    bake,
    calibrate,
    layer_plan,
    quant_layers,
    quantize_model,
    ranges,
    reestimate_batch_norm,
)
from bitladder.quant.calibrate import VALUES, collect_samples
from quant_networks import batches, images, quantized, residual
from torch import nn


def test_calibration_sets_every_step_and_nothing_else():
    model = quantize_model(residual(), QuantPolicy(4, 4), batches=batches(1)).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    calibrate(model, batches())
    for name, value in model.state_dict().items():
        changed = not torch.equal(value, before[name])
        assert changed == ("quantizer" in name), name
    assert all(m.training for m in model.modules())
    assert all(layer.input_quantizer is not None for layer in quant_layers(model).values())


def test_calibration_repeats_to_the_bit():
    one, other = quantized(), quantized()
    for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_calibration_makes_eight_bits_nearly_exact():
    model = residual().eval()
    want = model(images())
    quantize_model(model, QuantPolicy(8, 8), batches=batches(1))
    calibrate(model, batches())
    reestimated = (model(images()) - want).abs().max()
    assert reestimated < 0.03 * want.abs().max()


def test_calibration_does_not_depend_on_stale_batch_norm():
    steps = []
    for factor in (1.0, 100.0):
        model = quantize_model(residual(), QuantPolicy(4, 4), batches=batches(1))
        model.body.norm.running_var.mul_(factor)
        calibrate(model, batches())
        steps.append(model.body.conv2.input_quantizer.scale.item())
    assert steps[0] == steps[1]


def test_a_sample_is_bounded_and_holds_the_extremes():
    model = quantize_model(nn.Conv2d(3, 4, 1), QuantPolicy(4, 4), batches=[images()])
    data = [images(64, seed=i, size=32) for i in range(12)]
    sample = collect_samples(model, data)[""]
    assert len(sample) <= VALUES + 2 * len(data)
    assert sample.max() == max(x.max() for x in data)
    assert sample.min() == min(x.min() for x in data)


def test_calibration_of_inputs_needs_batches():
    model = quantize_model(residual(), QuantPolicy(4, 4), batches=batches(1))
    with pytest.raises(ValueError, match="at least one batch"):
        calibrate(model, [])
    rules_free = QuantPolicy(4, 32, first_last_bits=32)
    weights_only = quantize_model(residual(), rules_free, batches=batches(1))
    calibrate(weights_only, [])


@pytest.mark.parametrize("weight", ["lsq", "uniq", "dorefa"])
@pytest.mark.parametrize("bits", [8, 4, 3])
def test_ranges_go_from_any_method_to_any_other(weight, bits):
    model = quantized(bits, bits, weight=QuantizerChoice(weight))
    kept = ranges(model)
    assert set(kept) >= {"stem.weight_quantizer", "body.conv1.input_quantizer"}
    for low, high in kept.values():
        assert (low < high).all()
    below = quantize_model(
        residual(), QuantPolicy(2, 2, weight=QuantizerChoice("uniq")), batches=batches(1)
    )
    calibrate(below, batches(), keep=kept)
    plain = quantized(2, 2)
    for name, layer in quant_layers(below).items():
        if layer.plan.weight_bits != 2:
            continue
        w = layer.weight
        other = quant_layers(plain)[name].weight_quantizer
        error = (layer.weight_quantizer(w) - w).square().mean()
        assert error <= (other(w) - w).square().mean() * 1.0001


def test_batch_norm_becomes_the_average_over_the_batches():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5)).train()
    model[0].momentum = 0.3
    data = [images(16, seed=i) * 3 + 1 for i in range(4)]
    reestimate_batch_norm(model, data)
    mean = torch.stack([x.mean((0, 2, 3)) for x in data]).mean(0)
    var = torch.stack([x.var((0, 2, 3)) for x in data]).mean(0)
    torch.testing.assert_close(model[0].running_mean, mean)
    torch.testing.assert_close(model[0].running_var, var)
    assert model[0].momentum == 0.3
    assert model.training
    assert model[0].training


def test_batch_norm_keeps_its_statistics_when_there_is_no_batch():
    model = nn.Sequential(nn.BatchNorm2d(3))
    model(images())
    before = model[0].running_mean.clone()
    with pytest.raises(ValueError, match="at least one batch"):
        reestimate_batch_norm(model, [])
    assert torch.equal(model[0].running_mean, before)


def test_a_model_without_batch_norm_is_unchanged():
    model = quantize_model(nn.Conv2d(3, 4, 1), QuantPolicy(4, 4), batches=[images()])
    calibrate(model, [images()])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    reestimate_batch_norm(model, [])
    reestimate_batch_norm(model, [images()])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("weight", ["lsq", "uniq", "dorefa", "range_linear"])
def test_a_baked_model_gives_the_same_bits(weight):
    model = quantized(4, 4, weight=QuantizerChoice(weight)).eval()
    want = model(images())
    latent = model.body.conv1.layer.weight.clone()
    frozen = bake(copy.deepcopy(model).train())
    assert torch.equal(frozen(images()), want)
    assert not any(p.requires_grad for p in frozen.parameters())
    assert not any(m.training for m in frozen.modules())
    assert all(layer.weight_quantizer is None for layer in quant_layers(frozen).values())
    assert len(frozen.body.conv1.layer.weight.unique()) <= 16
    assert torch.equal(model.body.conv1.layer.weight, latent)


def test_calibrated_state_loads_strictly_with_every_method():
    for weight in ("lsq", "uniq", "dorefa", "range_linear"):
        choice = QuantizerChoice(weight)
        model = quantized(4, 4, weight=choice, activation=QuantizerChoice("range_linear")).eval()
        other = apply_plan(residual(seed=2), layer_plan(model)).eval()
        other.load_state_dict(model.state_dict(), strict=True)
        assert torch.equal(other(images()), model(images()))


class ByReference(nn.Module):
    """Calls a layer by a reference of its own, which a swap does not reach."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.order = [self.first, self.second]

    def forward(self, x):
        for layer in self.order:
            x = layer(x)
        return x


@pytest.mark.parametrize("bits", [(4, 4), (4, 32)])
def test_a_layer_that_would_run_in_float_is_named(bits):
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    policy = QuantPolicy(*bits, first_last_activation_bits=bits[1])
    model = quantize_model(ByReference(), policy, inputs=x)
    with pytest.raises(ValueError, match=r"'first' .* call it by its attribute"):
        calibrate(model, [x])

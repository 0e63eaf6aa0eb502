"""Levels in use, cost, and how well values fit their levels."""

from __future__ import annotations

import math

import pytest
import torch
from bitladder.quant import (
    QUANTIZERS,
    QuantizerChoice,
    QuantLayer,
    QuantPolicy,
    Site,
    bit_operations,
    effectiveness,
    ideal_bytes,
    layer_plan,
    layer_report,
    max_levels,
    probe,
    quantize_model,
    sqnr,
)
from quant_networks import batches, images, quantized, residual
from torch import nn


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_no_quantizer_uses_more_codes_than_its_width_has(bits):
    model = quantized(bits, bits)
    levels = max_levels(model, batches())
    plan = layer_plan(model)
    for name, layer in plan.items():
        assert 1 < levels[f"{name}.weight_quantizer"] <= 2**layer.weight_bits
        assert 1 < levels[f"{name}.input_quantizer"] <= 2**layer.activation_bits
    if bits <= 2:
        assert levels["body.conv1.weight_quantizer"] == 2**bits


def test_levels_are_counted_over_all_batches_and_per_scale_group():
    quantizer = QUANTIZERS["lsq"].factory(Site("weight", 8, True, 2), per_channel=True)
    layer = nn.Linear(3, 2)
    layer.weight.data = torch.tensor([[1.0, 1.0, 2.0], [3.0, 4.0, 5.0]])
    model = QuantLayer(layer, quantizer, QUANTIZERS["lsq"].factory(Site("activation", 8, True, 3)))
    data = [torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[3.0, 4.0, 5.0]])]
    assert max_levels(model, data) == {"weight_quantizer": 3, "input_quantizer": 5}


def test_bit_operations_weigh_each_layer_by_its_widths():
    model = residual()
    found = probe(model, batches(1))
    macs = {name: facts.macs for name, facts in found.layers.items()}
    total = sum(macs.values())
    assert bit_operations(found, {}) == total * 32 * 32
    plan = QuantPolicy(4, 2).resolve(found)
    edges = macs["stem"] + macs["head"]
    assert bit_operations(found, plan) == edges * 64 + (total - edges) * 8
    quantize_model(model, QuantPolicy(2, 32, first_last_bits=32), found)
    want = edges * 1024 + (total - edges) * 64
    assert bit_operations(found, layer_plan(model)) == want


def test_ideal_bytes_count_codes_scales_and_the_float_rest():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(6, 4, bias=False))
    float_bytes = 4 * (3 * 4 * 9 + 4 + 4 * 4 + 24)
    assert ideal_bytes(model) == float_bytes
    policy = QuantPolicy(3, 4, first_last_weight=QuantizerChoice("lsq", {"per_channel": True}))
    quantize_model(model, policy, batches=[images()])
    codes = 3 * 4 * 9 + 24  # 8 bits: first and last layer
    scales = 4 * (4 + 1) + 4 * (4 + 1)
    assert ideal_bytes(model) == codes + scales + 4 * (4 + 4 * 4)


def test_low_widths_shrink_the_network():
    sizes = [ideal_bytes(quantized(bits, bits)) for bits in (8, 4, 2, 1)]
    assert sizes == sorted(sizes, reverse=True)
    assert ideal_bytes(quantized(8, 8)) < ideal_bytes(residual()) / 2.5


def test_the_report_has_a_row_a_layer():
    model = quantized(2, 3)
    rows = {row["layer"]: row for row in layer_report(model, batches())}
    assert set(rows) == set(layer_plan(model))
    row = rows["body.conv1"]
    assert (row["weight_bits"], row["activation_bits"]) == (2, 3)
    assert (row["weight_quantizer"], row["activation_quantizer"]) == ("uniq", "uniq")
    step = model.body.conv1.weight_quantizer.scale.item()
    assert row["weight_scale"] == pytest.approx(step)
    assert row["weight_high"] == pytest.approx(1.5 * step)
    assert row["weight_low"] == pytest.approx(-1.5 * step)
    w = model.body.conv1.weight.detach()
    assert row["weight_clipped"] == pytest.approx((w.abs() > 2 * step).float().mean().item())
    quantized_weight = model.body.conv1.weight_quantizer(w)
    assert row["weight_sqnr_db"] == pytest.approx(sqnr(w, quantized_weight), rel=1e-4)
    assert 0 <= row["activation_clipped"] < 0.2
    assert row["activation_levels"] <= 8


def test_the_report_says_none_where_nothing_is_quantized():
    model = quantized(4, 32, first_last_bits=32)
    row = layer_report(model, batches())[0]
    assert row["activation_bits"] == 32
    assert row["activation_quantizer"] is None
    assert row["activation_scale"] is None
    assert row["weight_levels"] > 1


def test_sqnr_gains_six_decibels_a_bit():
    x = torch.rand(100_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    values = []
    for bits in (4, 5):
        q = QUANTIZERS["uniq"].factory(Site("weight", bits, True, 1))
        q.calibrate(x, keep=(torch.tensor(-1.0), torch.tensor(1.0)))
        values.append(sqnr(x, q(x)))
    assert values[1] - values[0] == pytest.approx(6.02, abs=0.5)
    assert sqnr(x, x) == math.inf


def test_effectiveness_is_one_on_the_levels_and_zero_spread_evenly():
    q = QUANTIZERS["uniq"].factory(Site("weight", 3, True, 1))
    spread = torch.linspace(-4, 4, 100_001)
    q.scale.data.fill_(1.0)
    on_levels = q(spread).detach()
    assert effectiveness(on_levels, q.encode(on_levels)) == 1
    assert effectiveness(spread, q.encode(spread)) == pytest.approx(0, abs=1e-3)
    tight = on_levels + 0.1 * (spread - on_levels)
    assert 0.98 < effectiveness(tight, q.encode(tight)) < 1


@pytest.mark.parametrize(
    ("name", "bits", "signed", "numbers"),
    [("bireal", 1, True, 0), ("reactnet", 1, True, 6), ("n2uq", 2, False, 3), ("lcq", 2, False, 3)],
)
def test_what_rounding_an_input_needs_is_counted(name, bits, signed, numbers):
    quantizer = QUANTIZERS[name].factory(Site("activation", bits, signed, 6))
    assert quantizer.encoding_constants == numbers

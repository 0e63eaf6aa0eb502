"""Histograms and staircases of quantizers."""

from __future__ import annotations

import json

import pytest
import torch
from bitladder.quant import QuantizerChoice, layer_report
from bitladder.quant.views import BINS, layer_views
from quant_networks import batches, quantized, residual


def step_function(view, x):
    """What a view's staircase gives for values (in units of the scale), as drawn."""
    corners, heights = (torch.tensor(axis) for axis in view["stairs"])
    return heights[2 * torch.bucketize(x, corners[1:-1:2].contiguous())]


def test_a_view_says_of_a_layer_what_its_report_says():
    model = quantized(2, 3, first_last_bits=32)
    rows = {row["layer"]: row for row in layer_views(model, batches())}
    for report in layer_report(model, batches()):
        for half in ("weight", "activation"):
            view = rows[report["layer"]][half]
            assert view["quantizer"] == "uniq"
            assert view["levels_used"] == report[f"{half}_levels"]
            for key in ("bits", "scale", "low", "high", "clipped", "sqnr_db"):
                assert view[key] == pytest.approx(report[f"{half}_{key}"], rel=1e-4), key
    json.dumps(list(rows.values()), allow_nan=False)


def test_values_of_groups_with_other_scales_lie_on_one_axis():
    model = quantized(3, 32, weight=QuantizerChoice("lsq", {"per_channel": True}))
    (view,) = [r["weight"] for r in layer_views(model, []) if r["layer"] == "body.conv1"]
    layer = model.body.conv1
    values = (layer.weight / layer.weight_quantizer.scale.view(-1, 1, 1, 1)).detach().flatten()
    low, high = view["span"]
    want = torch.histc(values.clamp(low, high), BINS, low, high)
    assert (torch.tensor(view["before"]) - want).abs().sum() <= 4  # of those between two bins
    assert view["levels"] == [-4, -3, -2, -1, 0, 1, 2, 3]
    rounded = values.round().clamp(-4, 3)
    shares = [float((rounded == level).float().mean()) for level in view["levels"]]
    assert view["after"] == pytest.approx(shares, rel=1e-4)


@pytest.mark.parametrize("name", ["uniq", "apot", "n2uq"])
def test_the_stairs_of_an_input_are_what_its_quantizer_does(name):
    model = quantized(32, 3, activation=QuantizerChoice(name), first_last_bits=32).eval()
    rows = {row["layer"]: row["activation"] for row in layer_views(model, batches())}
    view, quantizer = rows["body.conv1"], model.body.conv1.input_quantizer
    x = torch.linspace(*view["span"], 997)
    scale = quantizer.encode(torch.zeros(1, 6, 1, 1)).scale
    values = (x * scale)[:, None, None, None].expand(-1, 6, 1, 1)
    wanted = quantizer(values)[:, 0, 0, 0].detach() / scale
    # a threshold is known as well as the values beside it lie close
    assert (step_function(view, x) - wanted).abs().lt(1e-3).float().mean() > 0.9


def test_every_width_has_a_view_that_can_be_drawn():
    for bits in (1, 8, 16):
        rows = {row["layer"]: row for row in layer_views(quantized(bits, bits), batches(1))}
        for half in ("weight", "activation"):
            view = rows["body.conv2"][half]
            assert view["bits"] == bits
            assert len(view["levels"]) == len(view["after"]) == min(2**bits, 256)
            assert len(view["stairs"][0]) == len(view["stairs"][1]) <= 600
            assert sum(view["after"]) == pytest.approx(1, abs=1e-3)


def test_a_network_in_float_shows_its_weights_alone():
    rows = layer_views(residual(), [])
    assert [row["layer"] for row in rows] == [
        *("head", "stem", "body.conv1", "body.conv2", "body.shortcut")
    ]
    for row in rows:
        assert row["activation"] is None
        assert row["weight"]["bits"] == 32
        assert row["weight"]["levels"] is None
        assert sum(row["weight"]["before"]) > 0


def test_looking_leaves_the_model_as_it_was():
    model = quantized(4, 2).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    layer_views(model, batches())
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())

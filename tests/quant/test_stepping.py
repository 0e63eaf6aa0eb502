"""What runs around each step of the optimizer."""

from __future__ import annotations

import torch
from bitladder.quant import QUANTIZERS, QuantizerChoice, QuantLayer, Site, Stepping, quant_layers
from bitladder.quant.core import Quantizer
from quant_networks import quantized
from torch import nn


def recording(monkeypatch, kind, name):
    """Gives a quantizer class a hook that notes what it was called with."""
    calls = []

    def hook(self, argument):
        calls.append((self, argument, torch.is_grad_enabled()))

    monkeypatch.setattr(kind, name, hook)
    return calls


def test_quantizers_that_anneal_hear_how_far_the_stage_is(monkeypatch):
    model = quantized(2, 4)
    annealed = model.body.conv1.input_quantizer
    calls = recording(monkeypatch, type(annealed), "at_progress")
    stepping = Stepping(model)
    stepping.before(0.25)
    stepping.after()
    assert {progress for _, progress, _ in calls} == {0.25}
    assert annealed in [quantizer for quantizer, _, _ in calls]


def test_weights_are_mended_in_place_as_their_quantizer_sees_them(monkeypatch):
    model = quantized(4, 4, weight=QuantizerChoice("lsq"), first_last_bits=32)
    calls = recording(monkeypatch, type(model.body.conv1.weight_quantizer), "after_step")
    Stepping(model).after()
    layers = {layer.weight_quantizer: layer for layer in quant_layers(model).values()}
    assert len(layers) == 3
    assert {quantizer for quantizer, _, _ in calls} == set(layers)
    for quantizer, weight, gradients in calls:
        assert weight.data_ptr() == layers[quantizer].weight.data_ptr()
        assert weight.shape == layers[quantizer].weight.shape
        assert not gradients


def test_xnor_clamps_the_stored_weight_after_a_step():
    model = quantized(1, 32, weight=QuantizerChoice("xnor"), first_last_bits=32, shortcut=1)
    weight = model.body.conv1.layer.weight
    with torch.no_grad():
        weight.mul_(100)
    Stepping(model).after()
    assert weight.abs().max() == 1
    assert weight.requires_grad


def test_a_weight_of_a_transposed_convolution_is_presented_output_channels_first(monkeypatch):
    quantizer = QUANTIZERS["lsq"].factory(Site("weight", 4, signed=True, channels=5))
    calls = recording(monkeypatch, type(quantizer), "after_step")
    Stepping(nn.Sequential(QuantLayer(nn.ConvTranspose2d(3, 5, 2), quantizer, None))).after()
    assert calls[0][1].shape == (5, 3, 2, 2)


def test_quantizers_without_hooks_are_not_called(monkeypatch):
    model = quantized(4, 4)
    stepping = Stepping(model)
    calls = []
    monkeypatch.setattr(Quantizer, "at_progress", lambda self, _: calls.append(self))
    monkeypatch.setattr(Quantizer, "after_step", lambda self, _: calls.append(self))
    stepping.before(0.5)
    stepping.after()
    assert calls == []

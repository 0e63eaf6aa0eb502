"""Sums of whole numbers against those of the training network's codes, counted another way."""

import pytest
import torch
import torch.nn.functional as F
from bitladder.quant import QuantizerChoice, QuantPolicy, calibrate, quantize_model
from bitladder.quant.export.canonical import coded_weights, make_canonical
from bitladder.quant.export.integer import IntegerLayer, as_integers, integer_reference
from hypothesis import given, settings
from hypothesis import strategies as st
from shipped_networks import cases, images, of_method, quantized
from torch import nn

TABLES = {"nulsq", "lcq"}  # levels without a common unit


class OneLayer(nn.Module):
    """Three convolutions, of which the second is of the width in question."""

    def __init__(self, channels, out, kernel, stride, padding, groups):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 1)
        self.inner = nn.Conv2d(
            channels, out, kernel, stride, padding, groups=groups, bias=groups > 1
        )
        self.head = nn.Conv2d(out, 2, 1)

    def forward(self, x):
        return self.head(self.inner(self.stem(x).relu())).mean((2, 3))


def sums_by_hand(layer, x):
    """Of the training network's own codes, in int64, pixel by pixel; zero points taken off."""
    q, w = layer.input_quantizer.encode(x), layer.weight_quantizer.encode(layer.weight)
    codes = 2 * q.codes.long() - int(2 * q.zero_point)
    weight = 2 * w.codes.long() - int(2 * w.zero_point)
    plain = layer.layer
    columns = F.unfold(
        codes.double(), plain.kernel_size, plain.dilation, plain.padding, plain.stride
    ).long()
    n, _, places = columns.shape
    columns = columns.view(n, plain.groups, -1, places)
    rows = weight.view(plain.groups, plain.out_channels // plain.groups, -1)
    return torch.einsum("gok,ngkp->ngop", rows, columns).reshape(n, plain.out_channels, places)


@settings(max_examples=25)
@given(
    method=st.sampled_from(["lsq", "uniq", "dorefa", "range_linear", "n2uq"]),
    bits=st.sampled_from([2, 3, 4, 8]),
    groups=st.sampled_from([1, 2]),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    seed=st.integers(0, 2**16),
)
def test_sums_are_those_of_the_training_networks_codes(
    method, bits, groups, kernel, stride, padding, seed
):
    torch.manual_seed(seed)
    choice = QuantizerChoice(method if (method, bits) != ("range_linear", 2) else "lsq")
    policy = QuantPolicy(bits, bits, weight=choice, activation=choice)
    model = quantize_model(
        OneLayer(4, 6, kernel, stride, padding, groups), policy, inputs=images(4)
    )
    calibrate(model, [images(4, seed=seed)])
    model.eval()
    seen = {}
    model.inner.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    model(images(4, seed=seed + 1))
    by_hand = sums_by_hand(model.inner, seen["x"])
    weights = coded_weights(model)
    whole = as_integers(weights["inner"])
    layer = IntegerLayer(model.inner, whole)
    sums, _ = layer.accumulate(seen["x"])
    inputs = model.inner.input_quantizer.encode(seen["x"])
    # counted by hand in halves of a step, of both; integers are halves only where they have to be
    halves = [1 if float(q.zero_point) % 1 else 2 for q in (weights["inner"], inputs)]
    assert torch.equal(sums.flatten(2) * halves[0] * halves[1], by_hand.double())


@pytest.mark.parametrize(("method", "bits"), cases())
def test_the_integer_network_is_the_canonical_one(method, bits):
    model = of_method(method, bits)
    weights = coded_weights(model)
    make_canonical(model, weights)
    reference = integer_reference(model, weights)
    whole = [m for m in reference.modules() if isinstance(m, IntegerLayer)]
    assert whole if method in TABLES else len(whole) == len(weights)
    # layer by layer: an error of the last digit could change a later code
    for name, layer in list(reference.named_modules()):
        if isinstance(layer, IntegerLayer):
            float_layer = model.get_submodule(name)
            shape = (2, layer.input_quantizer.site.channels)
            x = torch.randn(*shape, *([4, 4] if hasattr(layer.layer, "kernel_size") else []))
            expected = float_layer(x)
            error = (layer(x) - expected).abs().max() / expected.abs().max().clamp_min(1e-6)
            assert error < 1e-5, name


def test_a_table_without_a_unit_has_no_integers():
    model = quantized(3, "nulsq")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("weight_quantizer.steps"):
                parameter.mul_((torch.arange(len(parameter)) + 2.0).sqrt())
    found = {name: as_integers(q) for name, q in coded_weights(model).items()}
    assert found["layer1.0.conv1"] is None
    assert found["conv1"] is not None  # range_linear at 8 bits


def test_the_levels_of_apot_are_multiples_of_its_unit():
    weights = coded_weights(quantized(4, "apot"))
    q = weights["layer1.0.conv1"]
    whole = as_integers(q)
    assert whole.integers.abs().max() <= 127
    torch.testing.assert_close((whole.integers * whole.unit).float(), q.dequantize())

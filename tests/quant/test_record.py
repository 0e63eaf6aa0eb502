"""Looking at tensors inside a network."""

from __future__ import annotations

import pytest
import torch
from bitladder.models import build_model
from bitladder.quant import (
    QuantizerChoice,
    QuantPolicy,
    absorb_relus,
    calibrate,
    quant_layers,
    quantize_model,
    record,
    scales,
)
from quant_networks import images, quantized, residual
from torch import nn

LAYERS = ["head", "stem", "body.conv1", "body.conv2", "body.shortcut"]


def hooks_of(model):
    return [
        hook
        for module in model.modules()
        for hooks in (module._forward_pre_hooks, module._forward_hooks)
        for hook in hooks.values()
    ]


def test_a_layer_s_output_is_what_follows_from_its_quantized_input():
    model, x = quantized(4, 2).eval(), images()
    seen = {}
    for stage in ("input", "quantized", "output"):
        with record(model, "body.*", stage) as found:
            model(x)
        seen[stage] = found
    assert list(seen["quantized"]) == ["body.conv1", "body.conv2", "body.shortcut"]
    for name, rounded in seen["quantized"].items():
        layer = model.get_submodule(name)
        assert len(rounded.unique()) <= 4
        assert torch.equal(layer.input_quantizer(seen["input"][name]), rounded)
        layer.input_quantizer = None
        assert torch.equal(layer(rounded), seen["output"][name])
    assert "body.norm" in seen["output"]


def test_every_layer_of_any_network_is_seen_unless_some_are_named():
    model = residual().eval()
    with record(model) as found:
        model(images())
    assert set(found) == {*LAYERS, "norm", "act", "act#2", "body.norm"}
    with record(model, ["stem", "*.conv?", "body"], "output") as found:
        model(images())
    assert list(found) == ["stem", "body.conv1", "body.conv2", "body"]


def test_nothing_is_copied_and_the_last_pass_stays():
    model = quantized(4, 2)
    with record(model, "head", "output") as found:
        model(images(seed=1))
        logits = model(images())
    assert found["head"].data_ptr() == logits.data_ptr()
    assert not found["head"].requires_grad


def test_what_reduce_gives_is_kept_instead_of_the_tensor():
    model, passes = quantized(4, 2), []
    with record(model, "stem", reduce=lambda name, x: passes.append(name) or x.shape) as found:
        for n in (1, 3):
            model(images(n))
            assert found == {"stem": (n, 3, 8, 8)}
    assert passes == ["stem", "stem"]


def test_no_hook_outlives_the_context_even_of_a_pass_that_fails():
    model = quantized(4, 2)
    before = len(hooks_of(model))
    with record(model):
        assert len(hooks_of(model)) == before + 10
    with pytest.raises(RuntimeError), record(model, attached=True):
        model(torch.zeros(1, 7, 8, 8))
    with pytest.raises(ValueError, match="unknown layer"), record(model, ["stem", "limb"]):
        pass
    assert len(hooks_of(model)) == before


def test_an_absorbed_relu_is_applied_to_what_is_seen():
    model = build_model("preact_resnet8", num_classes=10, in_channels=3, image_size=16, seed=0)
    policy = QuantPolicy(4, 4, weight=QuantizerChoice("lsq"), activation=QuantizerChoice("lsq"))
    model = quantize_model(model, policy, inputs=images(size=16))
    calibrate(model, [images(size=16)])
    assert absorb_relus(model) > 0
    clamped = {n for n, m in quant_layers(model).items() if m.input_quantizer.absorbs}
    with record(model, clamped) as found:
        model(images(size=16))
    assert {name: float(x.min()) for name, x in found.items()} == dict.fromkeys(clamped, 0.0)


def test_a_tensor_that_is_overwritten_is_an_error_but_not_to_reduce():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    with record(model, "0", "output") as found, pytest.raises(ValueError, match="reduce=lambda"):
        model(x)
    with record(model, "0", "output", reduce=lambda _, y: y.clone()) as found:
        model(x)
    assert torch.equal(found["0"], model[0](x))
    with torch.inference_mode(), record(model, "1", "output") as found:
        model(x)
    assert found["1"].min() == 0


def test_a_layer_in_float_has_no_quantized_input():
    with pytest.raises(ValueError, match="not quantized"), record(residual(), stage="quantized"):
        pass
    model = quantized(4, 32, first_last_bits=32)
    with pytest.raises(ValueError, match="not quantized"), record(model, "stem", "quantized"):
        pass


def test_scales_are_the_largest_of_every_quantizer():
    model = quantized(3, 2, weight=QuantizerChoice("lsq", {"per_channel": True}))
    found = scales(model)
    assert len(found) == 10
    layer = model.body.conv1
    assert found["body.conv1.weight"] == layer.weight_quantizer.scale.amax().item()
    assert found["body.conv1.activation"] == layer.input_quantizer.scale.item()
    assert scales(residual()) == {}

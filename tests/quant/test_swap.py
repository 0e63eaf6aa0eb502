"""Float networks become quantized ones, and can be read back."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from bitladder.quant import (
    QuantizerChoice,
    QuantLayer,
    QuantPolicy,
    apply_plan,
    calibrate,
    float_state_dict,
    layer_plan,
    plan_as_dict,
    plan_from_dict,
    probe,
    quant_layers,
    quantize_model,
    quantizer_parameters,
    unquantized,
)
from quant_networks import Residual, batches, images, quantized, residual
from torch import Tensor, nn


def test_the_probe_sees_order_size_and_cost():
    found = probe(residual(), batches(2))
    assert list(found.layers) == ["stem", "body.conv1", "body.conv2", "body.shortcut", "head"]
    conv2 = found.layers["body.conv2"]
    assert conv2.output_shape == (8, 4, 4)
    assert conv2.macs == 8 * 4 * 4 * (8 // 2) * 9
    assert found.layers["head"].macs == 8 * 5
    assert (conv2.in_channels, conv2.out_channels, conv2.kernel) == (8, 8, (3, 3))


def test_the_probe_leaves_the_model_as_it_was():
    model = residual().train()
    model.body.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    probe(model, batches(2))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks for m in model.modules())


def test_a_sign_that_shows_in_the_last_batch_only_counts():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1))
    first, last = images().abs(), images()
    assert not probe(model, [first]).layers["0"].signed_input
    assert probe(model, [first, last]).layers["0"].signed_input


def test_a_probe_without_batches_is_refused():
    with pytest.raises(ValueError, match="at least one batch"):
        probe(residual(), [])


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(4, 6, 3, padding=2, dilation=2), (2, 4, 9)),
        (nn.Conv2d(4, 6, 3, groups=2, padding=1, padding_mode="circular"), (2, 4, 7, 7)),
        (nn.Conv2d(4, 4, 3, groups=4, stride=2, bias=False), (2, 4, 7, 7)),
        (nn.Conv3d(2, 3, 2), (2, 2, 4, 4, 4)),
        (nn.ConvTranspose1d(4, 6, 3, dilation=2), (2, 4, 9)),
        (nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2, output_padding=1), (2, 4, 7, 7)),
        (nn.ConvTranspose2d(4, 4, 3, groups=4, bias=False), (2, 4, 5, 5)),
        (nn.ConvTranspose3d(2, 3, 2), (2, 2, 4, 4, 4)),
        (nn.Linear(5, 7), (2, 3, 5)),
        (nn.Linear(5, 7), (2, 3, 2, 5)),
        (nn.Linear(5, 7, bias=False), (2, 5)),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_layer_keeps_its_form(layer, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    plain = QuantLayer(layer, None, None)
    assert torch.equal(plain(x), layer(x))
    model = quantize_model(layer, QuantPolicy(8, 8), batches=[x])
    assert isinstance(model, QuantLayer)
    calibrate(model, [x])
    error = (model(x) - plain(x)).abs().max()
    assert 0 < error < 0.1 * plain(x).abs().max()


def test_a_layer_with_a_forward_of_its_own_keeps_it():
    class Doubled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    layer = Doubled(3, 4, 1)
    model = quantize_model(layer, QuantPolicy(8, 8), batches=[images()])
    model.input_quantizer = None
    calibrate(model, [])
    weight = model.weight_quantizer(layer.weight)
    want = 2 * torch.nn.functional.conv2d(images(), weight, layer.bias)
    assert torch.equal(model(images()), want)


def test_at_32_bits_the_model_stays_as_it_is():
    model = residual()
    before = model(images())
    assert quantize_model(model, QuantPolicy(32, 32), batches=batches()) is model
    assert not quant_layers(model)
    assert torch.equal(model(images()), before)


def test_the_model_is_rebuilt_from_the_recorded_plan_without_data():
    model = quantized(2, 3).eval()
    record = json.dumps(plan_as_dict(layer_plan(model)))
    rebuilt = apply_plan(Residual(), plan_from_dict(json.loads(record))).eval()
    rebuilt.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(rebuilt(images()), model(images()))


def test_a_state_of_another_plan_does_not_load():
    model = quantized(4, 4)
    other = quantize_model(residual(), QuantPolicy(4, 32), batches=batches(1))
    with pytest.raises(RuntimeError, match="input_quantizer"):
        other.load_state_dict(model.state_dict())


def test_a_plan_of_another_model_is_refused_and_nothing_is_swapped():
    plan = layer_plan(quantized())
    model = nn.Sequential(nn.Conv2d(3, 3, 1))
    with pytest.raises(ValueError, match=r"no layer body\.conv1"):
        apply_plan(model, plan)
    assert not quant_layers(model)


def test_quantizing_twice_is_refused():
    model = quantized()
    with pytest.raises(ValueError, match="already"):
        quantize_model(model, QuantPolicy(4, 4), batches=batches(1))
    with pytest.raises(ValueError, match="already"):
        apply_plan(model, {})


def test_the_latent_weights_load_into_the_float_model():
    model = quantized()
    state = float_state_dict(model)
    plain = residual(seed=1)
    plain.load_state_dict(state, strict=True)
    assert torch.equal(plain.body.conv2.weight, model.body.conv2.layer.weight)
    assert list(state) == list(plain.state_dict())
    single = quantize_model(nn.Linear(3, 4), QuantPolicy(8, 8), batches=[torch.randn(2, 3)])
    assert list(float_state_dict(single)) == ["weight", "bias"]


def test_quantizer_parameters_are_the_steps_and_nothing_else():
    model = quantized()
    named = dict(quantizer_parameters(model))
    assert set(named) == {n for n, _ in model.named_parameters() if n.endswith("quantizer.scale")}
    assert "body.conv1.weight_quantizer.scale" in named
    assert "stem.weight_quantizer.scale" not in named  # range_linear learns nothing


class Twice(nn.Module):
    """One convolution that runs twice, and one that has two names."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 3, 1)
        self.inner = nn.Conv2d(3, 3, 1)
        self.alias = self.inner
        self.head = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.alias(self.inner(self.stem(x).relu())))


def test_a_layer_at_two_places_is_swapped_once_and_named(caplog):
    model = Twice()
    found = probe(model, [images()])
    assert found.shared == ("inner",)
    assert found.layers["inner"].calls == 2
    assert found.layers["inner"].aliases == ("alias",)
    assert found.layers["inner"].signed_input  # on its second run
    assert found.layers["inner"].macs == 2 * 3 * 3 * 64
    with caplog.at_level(logging.INFO):
        quantize_model(model, QuantPolicy(4, 4), found)
    assert "inner" in caplog.text
    assert model.inner is model.alias
    assert isinstance(model.inner, QuantLayer)
    calibrate(model, [images()])
    rebuilt = apply_plan(Twice(), layer_plan(model))
    rebuilt.load_state_dict(model.state_dict())
    Twice().load_state_dict(float_state_dict(model))


class Unusual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 2, stride=2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.recurrent = nn.GRU(8, 8, batch_first=True)
        self.up = nn.ConvTranspose1d(16, 8, 1)
        self.unused = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).mT  # (N, H*W, C)
        x = self.recurrent(self.attention(x, x, x)[0])[0]
        return self.head(self.up(x.reshape(x.shape[0], 16, -1)).mean(2))


def test_what_cannot_be_quantized_is_named_and_still_runs(caplog):
    model = Unusual()
    with caplog.at_level(logging.INFO):
        quantize_model(model, QuantPolicy(4, 4), batches=[images()])
    calibrate(model, [images()])
    assert set(quant_layers(model)) == {"stem", "up", "head"}
    for name in ("attention", "recurrent", "unused", "attention.out_proj"):
        assert name in unquantized(model)
        assert name in caplog.text
    assert model(images()).shape == (4, 4)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_networks_nobody_here_wrote_are_quantized(name):
    from torchvision import models

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = models.get_model(name, weights=None, num_classes=7)
    x = images(2, size=64)
    found = probe(model, [x])
    assert not found.skipped
    quantize_model(model, QuantPolicy(4, 4), found)
    layers = quant_layers(model)
    assert len(layers) == sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules())
    assert not unquantized(model)
    calibrate(model, [x])
    loss = model.train()(x).square().mean()
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None for p in model.parameters())


def test_torchvision_shortcuts_take_eight_bits_at_w1a1():
    from torchvision import models

    model = models.resnet18(weights=None)
    found = probe(model, [images(1, size=64)])
    plan = QuantPolicy(1, 1, weight=QuantizerChoice("uniq")).resolve(found)
    wide = {name for name, p in plan.items() if p.weight_bits == 8}
    downsample = {f"layer{i}.0.downsample.0" for i in (2, 3, 4)}
    assert wide == {"conv1", "fc"} | downsample

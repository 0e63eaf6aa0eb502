"""The activation with two signs, and networks that have it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from bitladder.models import build_model
from bitladder.models.rprelu import RPReLU
from bitladder.quant import (
    QuantizerChoice,
    QuantPolicy,
    calibrate,
    probe,
    quant_layers,
    quantize_model,
)
from torch import nn

FAMILIES = ["preact_resnet8", "cifar_resnet8", "plane4", "tiny_convnet"]
GOLDEN = Path(__file__).parents[1] / "golden"
ENTRIES = [
    e
    for e in json.loads((GOLDEN / "index.json").read_text())["entries"]
    if e["quantizer"] == "reactnet" and e["variant"] == "RPReLU"
]


def build(name: str, **options: object) -> nn.Module:
    return build_model(name, num_classes=10, in_channels=1, image_size=8, options=options)


def images(seed: int = 0) -> torch.Tensor:
    return torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_there_are_golden_cases():
    assert ENTRIES


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["id"])
def test_rprelu_agrees_with_the_original(entry):
    with np.load(GOLDEN / "golden.npz") as file:
        case = {k: torch.from_numpy(file[f"{entry['id']}/{k}"]) for k in entry["arrays"]}
    module = RPReLU(case["x"].shape[1])
    names = {"bias1": "shift_in", "slope": "slope", "bias2": "shift_out"}
    for golden, ours in names.items():
        module.get_parameter(ours).data = case[f"param_{golden}"].flatten()
    x = case["x"].requires_grad_()
    y = module(x)
    y.backward(case["upstream"])
    got = {"y": y, "grad_x": x.grad}
    for golden, ours in names.items():
        got[f"grad_{golden}"] = module.get_parameter(ours).grad
    for name, value in got.items():
        want = case[name]
        atol = entry["atol_rel_to_max"] * want.abs().max().item()
        torch.testing.assert_close(
            value.detach().view_as(want), want, rtol=entry["rtol"], atol=atol
        )


def test_it_starts_as_a_leaky_relu_and_keeps_the_memory_format():
    x = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    y = RPReLU(3)(x)
    assert torch.equal(y, nn.functional.leaky_relu(x, 0.25))
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_activation_of_the_network_is_one(name):
    plain, network = build(name), build(name, activation="rprelu")
    kinds = {k: type(m) for k, m in network.named_modules()}
    relus = {k for k, m in plain.named_modules() if isinstance(m, nn.ReLU)}
    assert relus == {k for k, kind in kinds.items() if kind is RPReLU}
    assert nn.ReLU not in kinds.values()
    network(images()).square().sum().backward()
    assert all(p.grad is not None and (p.grad != 0).any() for p in network.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_all_other_weights_are_those_of_the_network_without(name):
    network = build(name, activation="rprelu").state_dict()
    for key, value in build(name).state_dict().items():
        assert torch.equal(network[key], value)


@pytest.mark.parametrize("name", FAMILIES)
def test_inputs_of_all_layers_behind_it_are_signed(name):
    facts = probe(build(name, activation="rprelu"), [images()]).layers
    stem = next(iter(facts))
    assert all(fact.signed_input for layer, fact in facts.items() if layer != stem)
    relu = probe(build(name), [images()]).layers
    assert not any(fact.signed_input for layer, fact in relu.items() if layer != stem)


@pytest.mark.parametrize("method", ["n2uq", "nulsq", "reactnet"])
def test_a_network_of_it_is_quantized_and_gets_gradients(method):
    bits = 1 if method == "reactnet" else 2
    network = build("preact_resnet8", width=4, activation="rprelu")
    policy = QuantPolicy(bits, bits, QuantizerChoice(method), QuantizerChoice(method))
    network = quantize_model(network, policy, batches=[images()])
    calibrate(network, [images()])
    assert quant_layers(network)["layer1.0.conv2"].input_quantizer.signed
    network(images(1)).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad.isfinite().all(), name
    shifts = [p for name, p in network.named_parameters() if "shift" in name]
    assert all((p.grad != 0).any() for p in shifts)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_clip_of_it_is_refused(name):
    with pytest.raises(ValueError, match="activation_clip is for relu"):
        build(name, activation="rprelu", activation_clip=6)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_unknown_activation_lists_the_known_ones(name):
    with pytest.raises(
        ValueError, match="unknown activation 'gelu'; known: relu, rprelu, hardtanh"
    ):
        build(name, activation="gelu")

"""Bin regularization over a whole network."""

from __future__ import annotations

import pytest
import torch
from bitladder.quant import (
    QuantizerChoice,
    activation_bin_regularization,
    bin_regularization,
    collect_inputs,
    quant_layers,
    quantizer_parameters,
    weight_bin_regularization,
)
from quant_networks import images, quantized


def test_the_weight_loss_sums_over_all_quantized_layers():
    model = quantized(2, 32)
    total = weight_bin_regularization(model)
    parts = [
        bin_regularization(layer.weight, layer.weight_quantizer.encode(layer.weight))
        for layer in quant_layers(model).values()
    ]
    torch.testing.assert_close(total, sum(parts))
    assert len(parts) == 5


def test_descent_on_the_weight_loss_pulls_weights_to_their_levels():
    model = quantized(1, 32, first_last_bits=32, shortcut=1)
    weights = [layer.weight for layer in quant_layers(model).values()]
    optimizer = torch.optim.SGD(weights, lr=1.0)
    start = weight_bin_regularization(model).item()
    for _ in range(300):
        optimizer.zero_grad()
        weight_bin_regularization(model, attach_scale=False).backward()
        optimizer.step()
    assert weight_bin_regularization(model).item() < 0.05 * start


def test_steps_get_a_gradient_only_when_attached_and_scaled_as_asked():
    model = quantized(2, 32, first_last_bits=32)
    steps = dict(quantizer_parameters(model))
    weight_bin_regularization(model, attach_scale=False).backward()
    assert all(step.grad is None for step in steps.values())
    grads = []
    for factor in (1.0, 0.25, None):
        model.zero_grad()
        weight_bin_regularization(model, grad_scale=factor).backward()
        grads.append(torch.stack([step.grad for step in steps.values()]))
    torch.testing.assert_close(grads[1], grads[0] / 4)
    own = [
        layer.weight_quantizer.grad_factor(layer.weight) for layer in quant_layers(model).values()
    ]
    torch.testing.assert_close(grads[2], grads[0] * torch.tensor(own))


def test_dorefa_is_regularized_where_it_rounds():
    model = quantized(2, 32, weight=QuantizerChoice("dorefa"), first_last_bits=32)
    weight_bin_regularization(model).backward()
    layer = model.body.conv1
    w = layer.weight.detach()
    q = layer.weight_quantizer.encode(w)
    latent = w.tanh().requires_grad_()
    bin_regularization(latent, q).backward()
    torch.testing.assert_close(layer.weight.grad, latent.grad * (1 - w.tanh() ** 2))


def test_inputs_are_collected_with_their_gradient_and_replaced_at_each_step():
    model = quantized(4, 2)
    with collect_inputs(model) as inputs:
        model(images())
        assert set(inputs) == {f"{name}.input_quantizer" for name in quant_layers(model)}
        first = inputs["body.conv1.input_quantizer"]
        assert first.requires_grad
        model(images(seed=1))
        assert len(inputs) == 5
        assert inputs["body.conv1.input_quantizer"] is not first
        loss = activation_bin_regularization(model, inputs)
        loss.backward()
        assert model.stem.layer.weight.grad.abs().sum() > 0
        with torch.no_grad():
            model(images())
        assert not inputs
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("attached", [False, True])
def test_activation_steps_get_a_gradient_only_when_attached(attached):
    model = quantized(4, 2)
    with collect_inputs(model) as inputs:
        model(images())
        activation_bin_regularization(model, inputs, attach_scale=attached).backward()
    grad = model.head.input_quantizer.scale.grad  # the others get one through later layers
    assert (grad is not None) == attached


def test_collecting_changes_no_output():
    model = quantized(4, 2).eval()
    want = model(images())
    with collect_inputs(model):
        assert torch.equal(model(images()), want)

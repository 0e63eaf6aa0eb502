"""torchvision's networks, quantized as they come."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from bitladder.quant import (
    QuantPolicy,
    bake,
    calibrate,
    describe,
    probe,
    quant_layers,
    quantize_model,
    unquantized,
)
from quant_networks import images
from torch import nn
from torch.nn.functional import cross_entropy


def resnet18() -> nn.Module:
    from torchvision import models

    return models.resnet18(num_classes=7)


def mobilenet_v3_small() -> nn.Module:
    from torchvision import models

    return models.mobilenet_v3_small(num_classes=7)


def tiny_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(
        image_size=32,
        patch_size=8,
        num_layers=2,
        num_heads=2,
        hidden_dim=16,
        mlp_dim=32,
        num_classes=7,
    )


def tiny_swin() -> nn.Module:
    from torchvision.models import SwinTransformer

    return SwinTransformer(
        patch_size=[4, 4],
        embed_dim=8,
        depths=[1, 1],
        num_heads=[2, 2],
        window_size=[4, 4],
        stochastic_depth_prob=0.0,
        num_classes=7,
    )


NETWORKS = [resnet18, mobilenet_v3_small, tiny_vit, tiny_swin]


@pytest.fixture(params=NETWORKS, ids=lambda make: make.__name__)
def network(request: pytest.FixtureRequest) -> nn.Module:
    make: Callable[[], nn.Module] = request.param
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def test_a_network_is_quantized_trains_a_step_and_encodes_exactly(network):
    x = images(2, size=32)
    found = probe(network, [x])
    model = quantize_model(network, QuantPolicy(4, 4), found)
    calibrate(model, [x])
    layers = quant_layers(model)
    assert set(layers) == set(found.layers)
    for layer in layers.values():
        q = layer.weight_quantizer
        assert torch.equal(q(layer.weight), q.encode(layer.weight).dequantize())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(2):
        loss = cross_entropy(model.train()(x), torch.tensor([0, 1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert torch.tensor(losses).isfinite().all()
    assert losses[0] != losses[1]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_every_weight_is_quantized_or_named_with_a_reason(network):
    weights = {name for name, p in network.named_parameters() if p.dim() > 1}
    x = images(2, size=32)
    found = probe(network, [x])
    model = quantize_model(network, QuantPolicy(4, 4), found)
    told = describe(model, found)
    assert all(row["note"] for row in told if row["weight_bits"] == 32)
    for weight in weights:
        owner, _, own = weight.rpartition(".")
        assert any(row["layer"] in (weight, owner) for row in told), (weight, own)
    assert set(unquantized(model, found)) == set(found.skipped)


def test_evaluation_runs_what_training_runs(network):
    x = images(2, size=32)
    model = quantize_model(network, QuantPolicy(4, 4), inputs=x)
    calibrate(model, [x])
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.Dropout)):
            module.eval = module.train = lambda *_, module=module: module
            module.training = False
    with torch.no_grad():
        trained, evaluated = model.train()(x), model.eval()(x)
        torch.testing.assert_close(evaluated, trained, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(bake(model)(x), evaluated, rtol=0, atol=0)

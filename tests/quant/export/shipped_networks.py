"""Small trained-looking networks to be packed and exported."""

from __future__ import annotations

import torch
from bitladder.models import build_model
from bitladder.quant import QuantizerChoice, QuantPolicy, calibrate, quantize_model
from torch import Tensor, nn

EVERY_METHOD = [
    ("lsq", (2, 3, 4, 5, 8)),
    ("uniq", (1, 2, 4, 8)),
    ("dorefa", (1, 2, 3, 8)),
    ("range_linear", (3, 4, 8)),
    ("pact", (2, 4, 8)),
    ("apot", (2, 3, 4)),
    ("pot", (3, 4)),
    ("nulsq", (2, 3)),
    ("lcq", (2, 3, 4)),
    ("n2uq", (2, 4)),
    ("wrpn", (2, 4)),
]
SIGNED_ONE_BIT = ("bireal", "reactnet", "xnor")  # need inputs of both signs


def images(count: int = 8, channels: int = 3, size: int = 8, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, channels, size, size, generator=generator)


def settled(model: nn.Module) -> nn.Module:
    """With batch norms that do something, of both signs."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.3, generator=generator)
                module.running_var.uniform_(0.5, 2.0, generator=generator)
                module.weight.normal_(generator=generator)
                module.bias.normal_(std=0.3, generator=generator)
    return model


def build(name: str = "preact_resnet8", **options: object) -> nn.Module:
    options = {"width": 4} | options
    return build_model(name, num_classes=5, in_channels=3, image_size=8, options=options, seed=0)


def quantized(
    bits: int,
    weight: str,
    activation: str | None = None,
    name: str = "preact_resnet8",
    **more: object,
) -> nn.Module:
    """Calibrated, in evaluation mode."""
    model = settled(build(name, **more))
    if bits < 32:
        of = QuantizerChoice
        methods = {"weight": of(weight), "activation": of(activation or weight)}
        model = quantize_model(model, QuantPolicy(bits, bits, **methods), inputs=images())
        calibrate(model, [images()])
    return model.eval()


def of_method(method: str, bits: int) -> nn.Module:
    """A network all of whose inner weights, and inputs where it has such, are of one method."""
    if method in SIGNED_ONE_BIT:
        return quantized(bits, method, name="cifar_resnet8", block="react")
    weight = method if method != "pact" else "lsq"
    return quantized(bits, weight, method)


def cases() -> list[tuple[str, int]]:
    ordinary = [(method, bits) for method, widths in EVERY_METHOD for bits in widths]
    return ordinary + [(method, 1) for method in SIGNED_ONE_BIT]


def agree(own: Tensor, expected: Tensor) -> bool:
    """Up to rounding; where a code has flipped, most images are still the same."""
    error = (own - expected).abs().amax(1) / expected.std()
    return float((error < 1e-4).float().mean()) >= 0.75

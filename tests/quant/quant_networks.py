"""Small networks and batches that several test files share."""

from __future__ import annotations

import torch
from bitladder.quant import QuantizerChoice, QuantPolicy, calibrate, quantize_model
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(6, 8, 3, padding=1, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=2, padding_mode="reflect")
        self.shortcut = nn.Conv2d(6, 8, 1, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.norm(self.conv1(x))) + self.shortcut(x)


class Residual(nn.Module):
    """Stem, a block with a shortcut and a signed inner input, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        # the classifier stands first in the module list and runs last
        self.head = nn.Linear(8, 5)
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.body = Block()
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.stem(x)))
        return self.head(self.act(self.body(x)).mean((2, 3)))


def images(n: int = 4, seed: int = 0, size: int = 8) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def batches(count: int = 3, n: int = 8) -> list[tuple[Tensor, Tensor]]:
    return [(images(n, seed=i), torch.zeros(n, dtype=torch.int64)) for i in range(count)]


def residual(seed: int = 0) -> Residual:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Residual()


def quantized(weight_bits: int = 4, activation_bits: int = 4, **options: object) -> nn.Module:
    """A calibrated `Residual`; uniq, which has every width, unless said otherwise."""
    options = {"weight": QuantizerChoice("uniq"), "activation": QuantizerChoice("uniq")} | options
    policy = QuantPolicy(weight_bits, activation_bits, **options)
    model = quantize_model(residual(), policy, batches=batches(1))
    calibrate(model, batches())
    return model

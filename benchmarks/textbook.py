"""Learned step size quantization as it is copied from the paper: what ours is measured against.

Source: Esser et al., ICLR 2020, arXiv:1902.08153, equations 1 to 5 and the pseudocode of its
appendix: the rounding and the gradient's scale as detach tricks, everything else left to autograd.
Inner convolutions alone are quantized; the first one and the classifier stay in FP32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TextbookLSQ(nn.Module):
    """A quantizer with one learned step, which starts from the first tensor that it sees."""

    def __init__(self, bits: int, *, signed: bool) -> None:
        super().__init__()
        self.low = -(2 ** (bits - 1)) if signed else 0
        self.high = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
        self.step = nn.Parameter(torch.ones(()))
        self.started = False

    def forward(self, x: Tensor) -> Tensor:
        """Equations 1 and 2."""
        if not self.started:
            with torch.no_grad():
                self.step.copy_(2 * x.abs().mean() / self.high**0.5)
            self.started = True
        step = _scale_gradient(self.step, (x.numel() * self.high) ** -0.5)
        return _round((x / step).clamp(self.low, self.high)) * step


class TextbookConv(nn.Module):
    """A convolution on its quantized weight and its quantized input."""

    def __init__(self, conv: nn.Conv2d, bits: int) -> None:
        super().__init__()
        self.conv = conv
        self.weight = TextbookLSQ(bits, signed=True)
        self.input = TextbookLSQ(bits, signed=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, O, H', W')."""
        return self.conv._conv_forward(self.input(x), self.weight(self.conv.weight), self.conv.bias)


def textbook(model: nn.Module, images: Tensor, bits: int) -> nn.Module:
    """The network with all convolutions but the first quantized, its steps set from a batch."""
    model = swap_inner_convolutions(model, lambda conv: TextbookConv(conv, bits))
    with torch.no_grad():
        model(images)
    return model


def swap_inner_convolutions(model: nn.Module, swapped) -> nn.Module:  # type: ignore[no-untyped-def]
    """Puts another module in the place of each convolution but the first, in place."""
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    for name in names[1:]:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, swapped(model.get_submodule(name)))
    return model


def _scale_gradient(x: Tensor, factor: float) -> Tensor:
    scaled = x * factor
    return (x - scaled).detach() + scaled


def _round(x: Tensor) -> Tensor:
    return (x.round() - x).detach() + x

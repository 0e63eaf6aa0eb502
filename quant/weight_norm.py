"""Weight normalization: weights of mean 0 and deviation 1 for a quantizer to work on."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from .core import QTensor, Range
from .functional import straight_through, wide

WeightNorm = Literal["restored", "normalized", "none"]

LEAST_SPREAD = 1e-5  # of the largest weight: below it the deviation is rounding noise


def normalize(weight: Tensor, *, detach: bool = False) -> tuple[Tensor, Tensor]:
    """The weights with mean 0 and standard deviation 1, and that deviation.

    Statistics are those of the whole tensor, the deviation unbiased. Weights without a spread (one
    weight, all alike, all zero) come back as they are, with 1 for their deviation.

    Args:
        weight: (O, I, *kernel).
        detach: True keeps the gradient from passing through mean and deviation.

    Returns:
        Both in float32: normalized weights in the shape of `weight`; deviation ().
    """
    x = wide(weight)
    known = x.detach() if detach else x
    mean = known.mean()
    variance = (known - mean).square().sum() / max(x.numel() - 1, 1)
    spread = variance.detach().sqrt() > LEAST_SPREAD * x.detach().abs().amax()
    # chosen before the root, whose gradient at 0 would not be finite
    deviation = torch.where(spread, variance, 1.0).sqrt()
    return (x - torch.where(spread, mean, 0.0)) / deviation, deviation


def normalized_range(keep: Range, deviation: Tensor) -> Range:
    """The range of another quantizer of the weight, for its normalized form."""
    low, high = (end.to(deviation.device) / deviation for end in keep)
    return low, high


def scaled(q: QTensor, deviation: Tensor) -> QTensor:
    """`q`, a quantized normalized weight, on the scale of the weight itself."""
    return replace(q, scale=q.scale * deviation.detach())


def restored(rounded: Tensor, deviation: Tensor, q: QTensor) -> Tensor:
    """deviation * `rounded` for the gradient; in value exactly what `q` stands for.

    The product of a level with both scales depends on the order in the last bit.

    Args:
        rounded: the quantized normalized weight, with its gradient.
        deviation: (), with a gradient where it is to pass.
        q: what `encode` gives for the weight.
    """
    return straight_through(q.dequantize(), deviation * rounded)

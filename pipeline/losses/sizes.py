"""Layers of two networks brought to one height and width."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int]


def common_size(student: Sequence[int], teacher: Sequence[int]) -> Size:
    """The smaller height and the smaller width of two outputs; 1 x 1 if one has none.

    Args:
        student: (N, C, H, W) or (N, C).
        teacher: the same.

    Raises:
        ValueError: an output has another number of dimensions.
    """
    maps = []
    for size in (student, teacher):
        if len(size) not in (2, 4):
            raise ValueError(f"outputs must be (N, C, H, W) or (N, C), not {len(size)}-dimensional")
        maps.append((size[2], size[3]) if len(size) == 4 else (1, 1))
    (h, w), (other_h, other_w) = maps
    return min(h, other_h), min(w, other_w)


def pooled(x: Tensor, size: Size) -> Tensor:
    """Averaged down to a height and width; (N, C) becomes (N, C, 1, 1)."""
    if x.dim() == 2:
        x = x[:, :, None, None]
    return x if tuple(x.shape[2:]) == size else F.adaptive_avg_pool2d(x, size)

"""Where a learned step starts: from a table, a formula or a search, per tensor or per channel.

All functions read `rows`, (groups, values): one row for each scale, float32.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .functional import round_to_level

StepInit = Literal["nmse", "lsq", "mse"]

# Step of the uniform quantizer with the least squared error, in standard deviations of a
# Gaussian (mid-rise, signed) and of the Gaussian that a ReLU cut in half (from zero, unsigned).
GAUSSIAN_STEP = (1.595769, 0.995687, 0.586019, 0.335201, 0.188139, 0.104063, 0.056868, 0.030762)
RECTIFIED_STEP = (1.223992, 0.650770, 0.353409, 0.193249, 0.105488, 0.057266, 0.030871, 0.016529)
SMALLEST_STEP = 1e-12


def rows_of(x: Tensor, *, channel_axis: int | None) -> Tensor:
    """`x` as (groups, values) in float32: a row for each scale."""
    x = x.detach().float()
    return x.reshape(1, -1) if channel_axis is None else x.movedim(channel_axis, 0).flatten(1)


def nmse_step(rows: Tensor, *, bits: int, signed: bool, centered: bool = True) -> Tensor:
    """The Gaussian-optimal step for the spread of each row, up to 8 bits.

    Args:
        rows: (groups, values).
        bits: 1 to 8.
        signed: False for the output of a ReLU.
        centered: whether the spread is the unbiased standard deviation (weights) or, for signed
            activations, the root mean square: their grid is centred on zero, not on the mean.
    """
    if not signed:
        return (2 * rows.square().mean(1)).sqrt() * RECTIFIED_STEP[bits - 1]
    if centered and rows.shape[1] > 1:
        return rows.std(1) * GAUSSIAN_STEP[bits - 1]
    return rows.square().mean(1).sqrt() * GAUSSIAN_STEP[bits - 1]


def lsq_step(rows: Tensor, *, qmax: float) -> Tensor:
    """2 * mean|x| / sqrt(qmax), the start of the LSQ paper."""
    return 2 * rows.abs().mean(1) / max(qmax, 1.0) ** 0.5


def covering_step(rows: Tensor, *, low: float, high: float) -> Tensor:
    """The smallest step whose range holds every value of the row."""
    below = rows.amin(1) / low if low < 0 else torch.zeros_like(rows[:, 0])
    return torch.maximum(below, rows.amax(1) / high)


def usable(step: Tensor, rows: Tensor, *, low: float, high: float) -> Tensor:
    """`step` where it is finite and positive; else one that covers the row; else 1.

    A range under a hundred-thousandth of the largest value is no range: the standard deviation
    of a constant row is rounding noise, not 0.
    """
    noise = 1e-5 * rows.abs().amax(1)
    for fallback in (covering_step(rows, low=low, high=high), torch.ones_like(step)):
        good = step.isfinite() & (step > SMALLEST_STEP) & (step * high > noise)
        step = torch.where(good, step, fallback)
    return step


def best_step(
    rows: Tensor, candidates: Tensor, *, low: float, high: float, midrise: bool
) -> Tensor:
    """Of the candidates (K, groups) the step with the least squared error on each row."""
    best, least = candidates[0], torch.full_like(candidates[0], torch.inf)
    for step in candidates:
        column = step[:, None]
        rounded = round_to_level(rows / column, low, high, midrise=midrise) * column
        error = (rounded - rows).square().mean(1)
        best = torch.where(error < least, step, best)
        least = torch.minimum(error, least)
    return best


def search_candidates(rows: Tensor, *, low: float, high: float) -> Tensor:
    """Steps from a hundredth of the covering one up to it, 64 in a geometric row: (64, groups)."""
    factors = torch.logspace(-2, 0, 64, device=rows.device)
    return factors[:, None] * covering_step(rows, low=low, high=high)

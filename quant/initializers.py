"""Where a learned step starts: from a table, a formula or a search, per tensor or per channel.

All functions read `rows`, (groups, values): one row for each scale, float32.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from .core import Range
from .functional import round_to_level

StepInit = Literal["nmse", "lsq", "mse", "max", "percentile", "constant"]

PERCENTILE = 0.999  # of the sizes |x|: what "percentile" covers

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


def kept_step(keep: Range, rows: Tensor, *, low: float, high: float) -> Tensor:
    """The step whose range is that of another quantizer of the same values, (groups,)."""
    ends = (bound.to(rows.device).float().reshape(-1) for bound in keep)
    kept_low, kept_high = ends
    step = kept_high / high
    if low < 0:
        step = torch.maximum(step, kept_low / low)
    return step.amax().expand(len(rows)) if len(step) != len(rows) else step


def percentile_step(rows: Tensor, *, low: float, high: float) -> Tensor:
    """The step whose range holds all but a thousandth of the row, by size."""
    rank = max(1, math.ceil(PERCENTILE * rows.shape[1]))
    size = rows.abs().kthvalue(rank, dim=1).values
    return size / max(high, -low if low < 0 else high)


def starting_steps(
    rows: Tensor,
    *,
    init: StepInit,
    low: float,
    high: float,
    bits: int,
    signed: bool,
    centered: bool = True,
    lsq_levels: float | None = None,
) -> Tensor:
    """The steps that a choice of start proposes for a uniform grid of `low` .. `high` steps.

    "nmse" Gaussian table; "lsq" the LSQ paper's formula; "mse" the table and a search, for the
    least squared error; "max" covers every value; "percentile" all but a thousandth;
    "constant" 3 / high for signed values and 8 / high for unsigned ones, as APoT starts its clips.

    Args:
        rows: (groups, values).
        centered: see `nmse_step`.
        lsq_levels: the Qp of the formula; `high` if None.

    Returns:
        (candidates, groups); more than one only with "mse". Not yet made `usable`.
    """
    if init == "lsq":
        return lsq_step(rows, qmax=high if lsq_levels is None else lsq_levels)[None]
    if init == "constant":
        return torch.full_like(rows[:, 0], (3.0 if signed else 8.0) / high)[None]
    if init == "percentile":
        return percentile_step(rows, low=low, high=high)[None]
    if init == "max" or (bits > 8 and init == "nmse"):  # no table above 8 bits: cover the values
        return covering_step(rows, low=low, high=high)[None]
    search = search_candidates(rows, low=low, high=high)
    if bits > 8:
        return search
    table = nmse_step(rows, bits=bits, signed=signed, centered=centered)[None]
    return torch.cat([table, search]) if init == "mse" else table


def fitting_step(
    rows: Tensor,
    *,
    keep: Range | None,
    init: StepInit,
    low: float,
    high: float,
    bits: int,
    signed: bool,
    centered: bool,
    midrise: bool = False,
    lsq_levels: float | None = None,
) -> Tensor:
    """The step, (groups,), at which a uniform grid starts: the best of all that are proposed.

    Args:
        rows: (groups, values).
        keep: the range of another quantizer of the same values, tried as well.
        init, low, high, bits, signed, centered, lsq_levels: see `starting_steps`.
        midrise: see `best_step`.
    """
    candidates = starting_steps(
        rows,
        init=init,
        low=low,
        high=high,
        bits=bits,
        signed=signed,
        centered=centered,
        lsq_levels=lsq_levels,
    )
    if keep is not None:
        candidates = torch.cat([candidates, kept_step(keep, rows, low=low, high=high)[None]])
    fits = torch.stack([usable(step, rows, low=low, high=high) for step in candidates])
    return best_step(rows, fits, low=low, high=high, midrise=midrise)


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

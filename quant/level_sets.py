"""Levels that are powers of two, sums of two or three of them, or evenly spaced."""

from __future__ import annotations

from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor

from .core import QTensor, Site
from .functional import inside, look_up, wide
from .initializers import StepInit
from .learned_clip import ClipGradScale, LearnedClipQuantizer
from .weight_norm import WeightNorm

Form = Literal["cifar", "imagenet"]

LOWEST = -1e30  # stands for no lower bound
# exponents of the terms that are added up, by magnitude bits; each set also holds 0
APOT_TERMS: dict[int, tuple[tuple[int, ...], ...]] = {
    2: ((1, 2, 3),),
    3: ((1, 2, 4), (3,)),
    4: ((1, 3, 5), (2, 4, 6)),
    5: ((1, 3, 6), (2, 4, 7), (5,)),
    6: ((1, 4, 7), (2, 5, 8), (3, 6, 9)),
}


def pot_levels(bits: int) -> tuple[int, ...]:
    """0 and the powers 2^-i, i = 0 .. 2^bits - 2, in units of the smallest; ascending."""
    return (0, *(2**i for i in range(2**bits - 1)))


def apot_levels(bits: int) -> tuple[int, ...]:
    """All sums of one term from each set of `APOT_TERMS`, as integers of one unit; ascending.

    At 1 bit, for which the origin has no sets, 0 and 1, its two-bit (ternary) weights.
    """
    if bits == 1:
        return 0, 1
    finest = max(map(max, APOT_TERMS[bits]))
    terms = [(0, *(2 ** (finest - i) for i in exponents)) for exponents in APOT_TERMS[bits]]
    return tuple(sorted(map(sum, product(*terms))))


def uniform_levels(bits: int) -> tuple[int, ...]:
    """0 .. 2^bits - 1."""
    return tuple(range(2**bits))


class LevelSetQuantizer(LearnedClipQuantizer):
    """Maps each value to the nearest of a fixed set of levels between 0 and a learned clip.

    Args:
        magnitudes: the levels from 0 up as integers; the last is the clip.
        uniform: whether the codes are the levels, so that no codebook is needed.
    """

    declares: frozenset[str] = frozenset({"nearest", "idempotent", "monotone"})

    levels: Tensor
    cells: Tensor  # the code of each half unit
    cell_levels: Tensor

    def __init__(
        self,
        site: Site,
        *,
        magnitudes: tuple[int, ...],
        uniform: bool,
        form: Form,
        init: StepInit,
        grad_scale: ClipGradScale,
        weight_norm: WeightNorm,
    ) -> None:
        super().__init__(
            site,
            unit=magnitudes[-1] if uniform else 1,
            init=init,
            grad_scale=grad_scale,
            weight_norm=weight_norm,
            detach_statistics=form == "cifar",
        )
        weight = site.target == "weight"
        self.uniform = uniform
        # the calibrated gradient of the origin: clipped weights get theirs too
        self.clipped = not weight or (form == "imagenet" and self.bits > 2)
        self.low = -1.0 if self.signed else 0.0
        self.lower_bound = LOWEST if form == "cifar" and not self.signed else self.low
        marks = [-m for m in magnitudes[:0:-1]] if self.signed else []
        table = torch.tensor([*marks, *magnitudes], dtype=torch.float64)
        # a level is a whole number of units, so half-way between two is a whole number of half
        # units: in these, rounding up finds the cell, and the cell knows its level
        self.half_units = 2 * magnitudes[-1]
        first = int(self.low * self.half_units)
        cells = torch.arange(first, self.half_units + 1, dtype=torch.float64)
        codes = torch.bucketize(cells, table[1:] + table[:-1], out_int32=True)
        levels = (table * (self.unit / magnitudes[-1])).float()
        self.register_buffer("levels", levels, persistent=False)
        # code 0 for what is not a number, whose level is not one either
        self.register_buffer("cells", torch.cat([codes, codes.new_zeros(1)]), persistent=False)
        not_a_number = levels.new_full((1,), torch.nan)
        values = torch.cat([levels[codes.long()], not_a_number])
        self.register_buffer("cell_levels", values, persistent=False)

    def rounded(self, x: Tensor) -> Tensor:
        """See `LearnedClipQuantizer.rounded`."""
        return _LevelSet.apply(x, self.clip, self, self.grad_factor(x))

    def encoded(self, x: Tensor) -> QTensor:
        """See `LearnedClipQuantizer.encoded`."""
        codes = look_up(self.cells, self.cell_of(x, self.limit()))
        return QTensor(
            codes.to(torch.uint8 if self.bits <= 8 else torch.int32),
            self.limit() / self.unit,
            bits=self.bits,
            num_levels=len(self.levels),
            zero_point=0.0 - self.low * self.unit if self.uniform else 0.0,
            codebook=None if self.uniform else self.levels.clone(),
        )

    def cell_of(self, x: Tensor, limit: Tensor) -> Tensor:
        """In which half unit each value lies, int32; a value on a threshold takes the lower."""
        cell = (wide(x) / (limit / self.half_units)).clamp_(
            self.low * self.half_units, self.half_units
        )
        cell = cell.ceil_().nan_to_num_(nan=self.half_units + 1)
        return cell.sub_(self.low * self.half_units).int()


class _LevelSet(torch.autograd.Function):
    """Looks the level up; with u = x / clip, dL/dclip = sum of G * (level - u where in range)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, clip: Tensor, quantizer: LevelSetQuantizer, grad_scale: float
    ) -> Tensor:
        limit = torch.maximum(clip, quantizer.clip_floor)
        table = limit / quantizer.unit * quantizer.cell_levels
        value = look_up(table, quantizer.cell_of(x, limit))
        y = value.to(x.dtype)
        # the layer keeps y anyway; in half precision it is too coarse for the clip's gradient
        ctx.save_for_backward(x, limit, table, y if y.dtype == value.dtype else None)
        ctx.quantizer, ctx.grad_scale = quantizer, grad_scale
        ctx.absorbs = quantizer.absorbs
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, limit, table, value = ctx.saved_tensors
        quantizer = ctx.quantizer
        wide_grad = wide(grad)
        low = 0.0 if ctx.absorbs else quantizer.lower_bound
        grad_in = inside(wide_grad, wide(x) / limit, low, 1.0, open_low=ctx.absorbs)
        grad_clip = None
        if ctx.needs_input_grad[1]:
            if value is None:
                value = look_up(table, quantizer.cell_of(x, limit))
            error = (value * wide_grad).addcmul_(grad_in, wide(x), value=-1)
            grad_clip = error.sum() / limit * ctx.grad_scale
        grad_x = grad_in.to(x.dtype) if quantizer.clipped else grad
        return grad_x, grad_clip, None, None

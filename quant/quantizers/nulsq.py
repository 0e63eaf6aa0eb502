"""nuLSQ: a learned step size for every interval between two levels."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import world
from ..core import QUANTIZERS, QTensor, Quantizer, Range, Site
from ..free_levels import (
    ROWS,
    add_by_place,
    by_place,
    chunks,
    code_table,
    look_up_by_place,
    marks_of,
    over_intervals,
)
from ..functional import from_stored_order, inside, stored_order, wide
from ..initializers import StepInit, fitting_step, rows_of
from ..learned_step import LOWEST_STEP

GradScale = Literal["numel", "channel_count", "none"]

LARGEST = 3.4e38  # stands for no upper bound


@QUANTIZERS.register("nulsq")
class NuLSQ(Quantizer):
    """Rounds to the nearest of 2^b levels whose distances are all learned.

    `steps` holds the distances from zero outward: unsigned 2^b-1 upward; signed first 2^(b-1)
    downward, then 2^(b-1)-1 upward. All start as the step of LSQ, whose levels and gradients
    these are while the steps are equal. A value half-way between two levels takes the lower. A
    step is used no smaller than `steps_floor`, a ten-thousandth of its start, and the gradient
    ignores that, so that a step which an update threw below zero comes back.

    8 bits are 255 steps, each with a 255th of the gradient: slower and worse conditioned than
    LSQ, which is the better choice there.

    Options:
        init: the start of the steps; see `initializers.starting_steps`.
        grad_scale: the count N in the factor on the steps' gradient. "numel": all values,
            1 / sqrt(N * (2^b-1)) unsigned, as in LSQ, and 2 / sqrt(N * m) for the m steps of
            either side. "channel_count": the channels of an activation, as in the public code;
            weights as before. "none": no factor, as in its CIFAR configuration, where AdamW has
            the steps. The last two are too much for SGD.

    Source: Gongyo et al., ACCV 2024. Differs from it in: a step below its floor counts as the
    floor; theirs stops the training.
    """

    declares: frozenset[str] = frozenset({"nearest", "idempotent", "monotone"})

    steps: nn.Parameter
    steps_floor: Tensor

    def __init__(
        self, site: Site, *, init: StepInit = "nmse", grad_scale: GradScale = "numel"
    ) -> None:
        super().__init__(site)
        self.init = init
        self.grad_scale = grad_scale
        self.intervals = 2**self.bits - 1
        self.below = 2 ** (self.bits - 1) if self.signed else 0  # steps below zero
        self.steps = nn.Parameter(torch.ones(self.intervals))
        self.register_buffer("steps_floor", torch.full((self.intervals,), LOWEST_STEP))

    @classmethod
    def check(cls, site: Site) -> None:
        """Refuses one signed bit, which has no positive step, and more than 8 bits."""
        if site.signed and site.bits == 1:
            raise ValueError("nulsq has no signed 1 bit (no level above 0); use uniq")
        if site.bits > 8:
            raise ValueError(f"nulsq has up to 8 bits (255 steps), not {site.bits}; use lsq")

    @torch.no_grad()
    def calibrate(self, x: Tensor, *, keep: Range | None = None) -> None:
        """Sets all steps to that of the best uniform grid; see `Quantizer.calibrate`."""
        step = fitting_step(
            rows_of(x, channel_axis=None),
            keep=keep,
            init=self.init,
            low=-float(self.below),
            high=float(self.intervals - self.below),
            bits=self.bits,
            signed=self.signed,
            centered=self.site.target == "weight",
        )
        self.steps.copy_(step.expand_as(self.steps))
        self.steps_floor.copy_(self.steps * LOWEST_STEP)

    def forward(self, x: Tensor) -> Tensor:
        """The quantized values, in the dtype and memory format of `x`, with a gradient."""
        return _FreeSteps.apply(x, self.steps, self)

    @property
    def clamps_at_zero(self) -> bool:
        """See `Quantizer.clamps_at_zero`."""
        return not self.signed

    @torch.no_grad()
    def encode(self, x: Tensor) -> QTensor:
        """The same values as codes."""
        levels = self.levels()
        table = code_table(self.intervals, x.device)
        codes, _ = look_up_by_place(x, marks_of(levels, midpoints(levels)), table)
        return QTensor(
            codes,
            torch.ones_like(levels[0]),
            bits=self.bits,
            num_levels=len(levels),
            codebook=levels,
        )

    @torch.no_grad()
    def range(self) -> Range:
        """Lowest and highest level."""
        levels = self.levels()
        return levels[0], levels[-1]

    @torch.no_grad()
    def levels(self) -> Tensor:
        """The levels in ascending order, (2^b,); 0 is one of them."""
        step = self.distances()
        down, up = step[: self.below], step[self.below :]
        return torch.cat([-down.cumsum(0).flip(0), step.new_zeros(1), up.cumsum(0)])

    def distances(self) -> Tensor:
        """The steps in use, in the order of `steps`, without a gradient."""
        return torch.maximum(self.steps.detach(), self.steps_floor)

    def grad_factors(self, x: Tensor) -> Tensor:
        """What the gradient of each step is multiplied by, for an input of this size."""
        factors = torch.ones_like(self.steps_floor)
        if self.grad_scale == "none":
            return factors
        count = x.numel() if self.site.target == "weight" else world.whole(x.numel())
        if self.grad_scale == "channel_count" and self.site.target == "activation":
            count = x.shape[self.site.channel_axis]
        count = max(count, 1)
        if not self.signed:
            return factors.fill_((count * self.intervals) ** -0.5)
        factors[: self.below] = 2 * (count * self.below) ** -0.5
        factors[self.below :] = 2 * (count * (self.intervals - self.below)) ** -0.5
        return factors


def midpoints(levels: Tensor) -> Tensor:
    """The thresholds, (n,): half-way between the levels."""
    return (levels[1:] + levels[:-1]) / 2


class _FreeSteps(torch.autograd.Function):
    """Looks the level up.

    A step gets G * (y - x) / step from the values of its interval, and from those beyond the
    last level of its side G, or -G below zero, as every step of that side moves that level.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, steps: Tensor, quantizer: NuLSQ) -> Tensor:
        levels = quantizer.levels()
        marks = marks_of(levels, midpoints(levels))
        value, places = look_up_by_place(x, marks, by_place(levels))
        y = value.to(x.dtype)
        # the layer keeps y anyway; in half precision it is too coarse for the steps' gradient
        ctx.save_for_backward(x, places, y if y.dtype == value.dtype else value)
        ctx.quantizer, ctx.levels, ctx.steps = quantizer, levels, quantizer.distances()
        ctx.absorbs = quantizer.absorbs
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, places, value = ctx.saved_tensors
        low, top = ctx.levels[0], ctx.levels[-1]
        flat, grads = stored_order(x, x).to(low.dtype), stored_order(wide(grad), x)
        values = stored_order(value, x)
        grad_x = torch.empty_like(flat)
        sums = flat.new_zeros(ROWS, 2 * len(ctx.steps) + 3)
        above, below = flat.new_zeros(()), flat.new_zeros(())
        for part in chunks(flat):
            share = (flat[part] - low).div_(top - low)  # 0 .. 1 inside
            grad_x[part] = inside(grads[part], share, 0.0, 1.0, open_low=ctx.absorbs)
            if ctx.needs_input_grad[1]:
                error = (values[part] - flat[part]).mul_(grads[part])
                add_by_place(sums, places[part].long(), error)
                above += _beyond(grads[part], share, 1.0, LARGEST).sum()
                if ctx.quantizer.signed:
                    below += _beyond(grads[part], share, -LARGEST, 0.0).sum()
        grad_steps = None
        if ctx.needs_input_grad[1]:
            down = ctx.quantizer.below
            within = over_intervals(sums)  # ascending
            grad_steps = torch.cat([within[:down].flip(0), within[down:]]) / ctx.steps
            grad_steps[:down] -= below
            grad_steps[down:] += above
            grad_steps *= ctx.quantizer.grad_factors(x)
        return from_stored_order(grad_x, x).to(x.dtype), grad_steps, None


def _beyond(grad: Tensor, share: Tensor, low: float, high: float) -> Tensor:
    """`grad` where low < share < high, else 0."""
    return torch.ops.aten.hardtanh_backward.default(grad, share, low, high)

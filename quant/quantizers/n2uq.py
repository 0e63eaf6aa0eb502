"""N2UQ: learned, uneven thresholds with evenly spaced output levels."""

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
    interval_table,
    look_up_by_place,
    marks_of,
    over_intervals,
)
from ..functional import (
    from_stored_order,
    per_channel_view,
    round_through,
    round_to_level,
    stored_order,
    straight_through,
    to_codes,
    wide,
)
from ..initializers import StepInit, fitting_step, rows_of

DeadIntervals = Literal["stay", "recover"]
GradScale = Literal["numel", "none"]
WeightGradient = Literal["plain", "over_scale"]

SHORTEST = 1e-3  # interval, where the output range is 2
SHORTEST_STEP = 1e-30  # of the output; the inverse of one that is smaller may be infinite
LOWEST_SCALE = 1e-4  # of the calibrated scales
SMALLEST = 1e-12  # stands for the mean size of weights that are all zero


@QUANTIZERS.register("n2uq")
class N2UQ(Quantizer):
    """Activations by learned thresholds to even levels; weights to 2^b even levels by mean|w|.

    Activations: scale1 * x is compared with the middles of n = 2^b-1 intervals of learned lengths
    `a`, the first of which begins at `start`; the code is their count, and its value code * 2/n *
    scale2. The gradient is that of the ramp through the ends of the intervals. What lies below
    `start` becomes 0, so signed inputs (of a PReLU) are admitted. It starts as LSQ.

    Weights: for each output channel 2^b levels, none of them zero, over +-mean|w| * n / 2^(b-1),
    which spreads the weights evenly over the codes; 1 bit is +-mean|w|. Nothing is learned. The
    origin's `clip_val` never got a gradient and is a constant.

    Options:
        init: the start of activations; see `initializers.starting_steps`.
        grad_scale: "numel" multiplies the gradient of the activation's parameters by
            1 / sqrt(numel * n), as LSQ does; "none", as in the public code, needs Adam.
        dead_intervals: an interval shorter than 0.001 counts as 0.001. "stay": it then gets no
            gradient and never recovers, as in the public code; "recover": it gets one.
        weight_gradient: "plain" passes the gradient; "over_scale" divides it by half the range of
            the channel, as in the public code, which under SGD multiplies the learning rate.

    Source: Liu et al., CVPR 2022, arXiv:2111.14826. Differs from it in: `grad_scale` and
    `weight_gradient` by default; the start is fitted to data; a weight half-way between two
    levels goes up; scale1 and scale2 have a lower bound.
    """

    start: nn.Parameter
    a: nn.Parameter
    scale1: nn.Parameter
    scale2: nn.Parameter
    scale1_floor: Tensor
    scale2_floor: Tensor
    magnitude: Tensor

    def __init__(
        self,
        site: Site,
        *,
        init: StepInit = "nmse",
        grad_scale: GradScale = "numel",
        dead_intervals: DeadIntervals = "stay",
        weight_gradient: WeightGradient = "plain",
    ) -> None:
        weight = site.target == "weight"
        super().__init__(site, per_channel=weight)
        self.init = init
        self.grad_scale = grad_scale
        self.dead_intervals = dead_intervals
        self.weight_gradient = weight_gradient
        self.intervals = 2**self.bits - 1
        self.even = 2 / self.intervals  # length of an interval where all are the same
        self.declares = frozenset({"nearest", "monotone"} if weight else {"monotone"})
        if weight:
            # the outer level of the last training step, for the hand-over to another width
            self.register_buffer("magnitude", torch.ones(site.channels))
            return
        self.start = nn.Parameter(torch.tensor(0.0))
        self.a = nn.Parameter(torch.full((self.intervals,), self.even))
        for name in ("scale1", "scale2"):
            self.register_parameter(name, nn.Parameter(torch.tensor(1.0)))
            self.register_buffer(f"{name}_floor", torch.tensor(LOWEST_SCALE))

    @classmethod
    def check(cls, site: Site) -> None:
        """Refuses more than 8 bits."""
        if site.bits > 8:
            raise ValueError(f"n2uq has up to 8 bits (255 thresholds), not {site.bits}; use lsq")

    @torch.no_grad()
    def calibrate(self, x: Tensor, *, keep: Range | None = None) -> None:
        """Activations: starts as the best uniform grid from zero. Weights: notes their range."""
        if self.site.target == "weight":
            self.magnitude.copy_(self._weight_step(x).flatten() * (self.intervals / 2))
            return
        rows = rows_of(x, channel_axis=None).relu()
        step = fitting_step(
            rows,
            keep=keep,
            init=self.init,
            low=0.0,
            high=float(self.intervals),
            bits=self.bits,
            signed=False,
            centered=False,
        )[0]
        top = rows.amax()
        if 0 < top <= step / 2:  # all would be 0, and scale2 would get no gradient
            step = (top / self.intervals).clamp_min(SHORTEST_STEP)
        self.start.zero_()
        self.a.fill_(self.even)
        self.scale1.copy_(self.even / step)
        self.scale2.copy_(step / self.even)
        self.scale1_floor.copy_(self.scale1 * LOWEST_SCALE)
        self.scale2_floor.copy_(self.scale2 * LOWEST_SCALE)

    def forward(self, x: Tensor) -> Tensor:
        """The quantized values, in the dtype and memory format of `x`, with a gradient."""
        if self.site.target == "activation":
            return _LearnedThresholds.apply(x, self.start, self.a, self.scale1, self.scale2, self)
        step = self._weight_step(x)
        half = self.intervals / 2
        if self.training:
            self.magnitude.copy_(step.flatten() * half)
        if self.weight_gradient == "over_scale":
            level = round_to_level(wide(x) / step, -half, half, midrise=True)
            return straight_through(level * step, wide(x) / (step * half)).to(x.dtype)
        return round_through(x, step, -half, half, midrise=True)

    @torch.no_grad()
    def encode(self, x: Tensor) -> QTensor:
        """The same values as codes."""
        if self.site.target == "weight":
            scale, low = self._weight_step(x), -self.intervals / 2
            level = round_to_level(wide(x) / scale, low, -low, midrise=True)
            codes = to_codes(level, low, self.bits)
        else:
            scale, low = self.step(), 0.0
            codes, _ = look_up_by_place(x, self.marks(), code_table(self.intervals, x.device))
        return QTensor(
            codes,
            scale,
            bits=self.bits,
            num_levels=self.intervals + 1,
            zero_point=0.0 - low,
            channel_axis=self.channel_axis,
        )

    @torch.no_grad()
    def range(self) -> Range:
        """Lowest and highest level; of weights at the last training step or calibration."""
        if self.site.target == "weight":
            return -self.magnitude, self.magnitude.clone()
        high = self.step() * self.intervals
        return torch.zeros_like(high), high

    def latent(self, x: Tensor) -> Tensor:
        """Of activations the ramp, which meets a half-way point at each threshold."""
        if self.site.target == "weight":
            return x
        lengths = straight_through(self.lengths(), self.a)
        ends = torch.cat([self.start[None], self.start + lengths.cumsum(0)])
        scaled = wide(x) * straight_through(self.bounded("scale1"), self.scale1)
        intervals = interval_table(self.intervals, x.device)
        within, _ = look_up_by_place(x.detach(), self.marks(), intervals)
        share = (scaled - ends[within]) / lengths[within]
        step = self.even * straight_through(self.bounded("scale2"), self.scale2)
        return step * (within + share.clamp(0, 1))

    def learned_scale(self, x: Tensor, *, gradient: float | None = None) -> Tensor | None:
        """Of activations the step of the levels, with a gradient to `scale2`."""
        if self.site.target == "weight":
            return None
        factor = self.grad_factor(x) if gradient is None else gradient
        return straight_through(self.step(), self.scale2 * (self.even * factor))

    @property
    def encoding_constants(self) -> int:
        """The thresholds of an activation."""
        return self.intervals if self.site.target == "activation" else 0

    def step(self) -> Tensor:
        """The distance of two levels of an activation, without a gradient."""
        return self.bounded("scale2") * self.even

    def lengths(self) -> Tensor:
        """The intervals in use, (n,), without a gradient."""
        return self.a.detach().clamp_min(SHORTEST)

    def ends(self) -> Tensor:
        """Where the intervals begin and end, (n + 1,), of scale1 * x, without a gradient."""
        start = self.start.detach()
        return torch.cat([start[None], start + self.lengths().cumsum(0)])

    def marks(self) -> Tensor:
        """Ends and middles of the intervals, on the scale of x; see `marks_of`."""
        ends, scale1 = self.ends(), self.bounded("scale1")
        return marks_of(ends / scale1, (ends[:-1] + self.lengths() / 2) / scale1)

    def bounded(self, name: str) -> Tensor:
        """One of the two scales as it is used, without a gradient."""
        return torch.maximum(self.get_parameter(name).detach(), self.get_buffer(f"{name}_floor"))

    def grad_factor(self, x: Tensor) -> float:
        """What the gradients of the parameters are multiplied by, for an input of this size."""
        if self.grad_scale == "none":
            return 1.0
        numel = x.numel() if self.site.target == "weight" else world.whole(x.numel())
        return float(max(numel, 1) * self.intervals) ** -0.5

    @torch.no_grad()
    def _weight_step(self, x: Tensor) -> Tensor:
        """Distance of two levels of each output channel: half the range over n / 2."""
        mean = wide(x).abs().flatten(1).mean(1).clamp_min(SMALLEST)
        return per_channel_view(mean * 2.0 ** (2 - self.bits), x)


class _LearnedThresholds(torch.autograd.Function):
    """Counts the thresholds below; the gradient is that of the ramp.

    In interval i the ramp has the slope even / a_i. Everything that the parameters get follows
    from two sums for each place: of dL/dy, and of dL/dy * x.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        start: Tensor,
        a: Tensor,
        scale1: Tensor,
        scale2: Tensor,
        quantizer: N2UQ,
    ) -> Tensor:
        codes = torch.arange(quantizer.intervals + 1, device=x.device, dtype=a.dtype)
        table = by_place(quantizer.step() * codes)
        value, places = look_up_by_place(x, quantizer.marks(), table)
        y = value.to(x.dtype)
        ctx.save_for_backward(x, places)
        ctx.lengths, ctx.ends = quantizer.lengths(), quantizer.ends()
        ctx.scales = quantizer.bounded("scale1"), quantizer.bounded("scale2")
        ctx.alive = a > SHORTEST if quantizer.dead_intervals == "stay" else None
        ctx.even, ctx.factor = quantizer.even, quantizer.grad_factor(x)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, places = ctx.saved_tensors
        scale1, scale2 = ctx.scales
        flat, grads = stored_order(x, x).to(scale1.dtype), stored_order(wide(grad), x)
        slope = ctx.even * scale2 * scale1 / ctx.lengths
        none = slope.new_zeros(1)
        table = torch.cat([none, slope.repeat_interleave(2), none, none])
        grad_x = torch.empty_like(flat)
        sums, moments = flat.new_zeros(2, ROWS, len(table))
        learns = any(ctx.needs_input_grad[1:])
        for part in chunks(flat):
            index, grads_here = places[part].long(), grads[part]
            if learns:
                add_by_place(sums, index, grads_here)
                add_by_place(moments, index, grads_here * flat[part])
            torch.mul(table.index_select(0, index), grads_here, out=grad_x[part])
        total = over_intervals(sums) * slope / scale1
        moment = over_intervals(moments) * slope
        # a value is its code in steps, and the code follows from the place
        steps = torch.arange(len(slope) + 1, device=flat.device).repeat_interleave(2)
        grad_scale2 = (sums.sum(0)[:-1] * steps).sum() * ctx.even
        # an end moves with every interval before it
        after = total.flip(0).cumsum(0).flip(0) - total
        grad_a = -(moment - ctx.ends[:-1] * total) / ctx.lengths - after
        if ctx.alive is not None:
            grad_a = grad_a * ctx.alive
        gradients = (
            -total.sum(),
            grad_a,
            moment.sum() / scale1,
            grad_scale2,
        )
        scaled = (g * ctx.factor for g in gradients)
        return from_stored_order(grad_x, x).to(x.dtype), *scaled, None

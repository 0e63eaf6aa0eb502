"""What all quantizers with one learned step per scale group share."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from . import world
from .core import QTensor, Quantizer, Range, Site
from .functional import (
    Bound,
    learned_step,
    per_channel_view,
    round_to_level,
    to_codes,
    wide,
)
from .initializers import StepInit, fitting_step, rows_of

GradScale = Literal["numel", "channel_count", "none", "numel_per_channel"]

LOWEST_STEP = 1e-4  # of the calibrated step


class LearnedStepQuantizer(Quantizer):
    """A uniform grid whose step is a parameter, trained with the LSQ gradient.

    The step is stored as it is, and is used no smaller than `scale_floor`, a ten-thousandth of
    its calibrated value, kept in the state dict. The gradient ignores the bound, so that a step
    which an update threw below it, or below zero, comes back. A learned logarithm would keep it
    positive too, but would make the learning rate relative and every published recipe different.
    """

    scale: nn.Parameter
    scale_floor: Tensor
    grid: Tensor

    def __init__(
        self,
        site: Site,
        *,
        low: float,
        high: float,
        midrise: bool,
        grad_levels: int,
        per_channel: bool,
        init: StepInit,
        grad_scale: GradScale,
    ) -> None:
        super().__init__(site, per_channel=per_channel)
        self.low, self.high, self.midrise = low, high, midrise
        self.grad_levels = grad_levels  # the Qp of 1 / sqrt(numel * Qp)
        self.init = init
        self.grad_scale = grad_scale
        shape = (site.channels,) if per_channel else ()
        self.scale = nn.Parameter(torch.ones(shape))
        self.register_buffer("scale_floor", torch.full(shape, LOWEST_STEP))
        # what differs between widths, for compiled code, to which numbers would be constants
        self.register_buffer("grid", torch.tensor([low, high, grad_levels**-0.5]), persistent=False)

    @torch.no_grad()
    def calibrate(self, x: Tensor, *, keep: Range | None = None) -> None:
        """Sets the step and its lower bound; see `Quantizer.calibrate`."""
        step = fitting_step(
            rows_of(x, channel_axis=self.channel_axis),
            keep=keep,
            init=self.init,
            low=self.low,
            high=self.high,
            bits=self.bits,
            signed=self.signed,
            centered=self.site.target == "weight",
            midrise=self.midrise,
            lsq_levels=self.grad_levels,
        ).view_as(self.scale)
        self.scale.copy_(step)
        self.scale_floor.copy_(step * LOWEST_STEP)

    def forward(self, x: Tensor) -> Tensor:
        """The quantized values, in the dtype and memory format of `x`, with a gradient."""
        low: Bound = self.low
        high: Bound = self.high
        factor: Bound
        if torch.compiler.is_dynamo_compiling():
            low, high, levels = self.grid.unbind()
            counted = self.grad_scale != "none"
            factor = levels * self._count(x) ** -0.5 if counted else torch.ones_like(levels)
        else:
            factor = self.grad_factor(x)
        return learned_step(
            x,
            self.scale,
            low,
            high,
            midrise=self.midrise,
            grad_scale=factor,
            floor=self.scale_floor,
            open_low=self.absorbs,
        )

    @property
    def clamps_at_zero(self) -> bool:
        """See `Quantizer.clamps_at_zero`."""
        return not self.signed

    @torch.no_grad()
    def encode(self, x: Tensor) -> QTensor:
        """The same values as codes."""
        step = per_channel_view(self.step(), x)
        level = round_to_level(wide(x) / step, self.low, self.high, midrise=self.midrise)
        return QTensor(
            to_codes(level, self.low, self.bits),
            step,
            bits=self.bits,
            num_levels=int(self.high - self.low) + 1,
            zero_point=0.0 - self.low,
            channel_axis=self.channel_axis,
        )

    @torch.no_grad()
    def range(self) -> Range:
        """Lowest and highest level, () or (channels,)."""
        step = self.step()
        return step * self.low, step * self.high

    def step(self) -> Tensor:
        """The step in use, in the shape of `scale`, without a gradient."""
        return torch.maximum(self.scale.detach(), self.scale_floor)

    def learned_scale(self, x: Tensor, *, gradient: float | None = None) -> Tensor:
        """The step in use, with a gradient to `scale`; see `Quantizer.learned_scale`."""
        factor = self.grad_factor(x) if gradient is None else gradient
        # exactly the step: what carries the gradient is zero
        change = self.scale - self.scale.detach()
        return per_channel_view(torch.add(self.step(), change, alpha=factor), x)

    def grad_factor(self, x: Tensor) -> float:
        """What the gradient of the step is multiplied by, for an input of this size."""
        if self.grad_scale == "none":
            return 1.0
        return float(self._count(x) * self.grad_levels) ** -0.5

    def _count(self, x: Tensor) -> int:
        """The N of 1 / sqrt(N * Qp): of an activation, over the batch of all processes."""
        numel = x.numel()
        if self.grad_scale == "numel_per_channel" and self.channel_axis is not None:
            numel //= x.shape[self.channel_axis]
        elif self.grad_scale == "channel_count" and self.site.target == "activation":
            return max(x.shape[self.site.channel_axis], 1)
        return max(numel if self.site.target == "weight" else world.whole(numel), 1)

"""Range-based linear quantization: the grid spans the observed minimum and maximum."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .. import world
from ..core import QUANTIZERS, QTensor, Quantizer, Range, Site
from ..functional import (
    Bound,
    per_channel_view,
    round_through,
    round_to_level,
    round_within,
    to_codes,
    wide,
)
from ..initializers import rows_of

Mode = Literal["restricted", "symmetric", "asymmetric"]


@QUANTIZERS.register("range_linear")
class RangeLinear(Quantizer):
    """Spans the range of the weights at every step, of activations by a moving average.

    Nothing is learned. Weights: the statistics get no gradient and rounding passes it on.
    Activations: minimum and maximum follow the training batches by a bias-corrected moving
    average and stand still in evaluation; the gradient stops outside them.

    Options:
        mode: "restricted" -(2^(b-1)-1) .. 2^(b-1)-1, max|x| on the outer level; "symmetric" has
            all 2^b codes, the outermost half a step inside max|x|; "asymmetric" spans min .. max,
            widened to hold 0, with an integer zero point. Where no value is negative, the first
            two use 0 .. 2^b-1.
        per_channel: a range for each output channel (weights).
        decay: of the moving average, per training step.

    Source: Jacob et al., CVPR 2018, arXiv:1712.05877, and Krishnamoorthi, 2018, arXiv:1806.08342.
    Differs from public code in: codes are clamped to the grid, never more than 2^b.
    """

    declares: frozenset[str] = frozenset({"nearest", "idempotent", "monotone"})

    low: Tensor
    high: Tensor
    updates: Tensor

    def __init__(
        self,
        site: Site,
        *,
        mode: Mode = "restricted",
        per_channel: bool = False,
        decay: float = 0.999,
    ) -> None:
        super().__init__(site, per_channel=per_channel)
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}; it must be at least 0 and below 1")
        self.mode: Mode = mode
        if mode == "symmetric":  # the outer level lies inside max|x|: each pass shrinks the range
            self.declares = self.declares - {"idempotent"}
        self.decay = decay
        shape = (site.channels,) if per_channel else ()
        self.register_buffer("low", torch.full(shape, -1.0 if site.signed else 0.0))
        self.register_buffer("high", torch.ones(shape))
        if site.target == "activation":
            self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    @classmethod
    def check(cls, site: Site) -> None:
        """Refuses 1 and 2 bits, where the few largest values would decide the whole scale."""
        if site.bits <= 2:
            raise ValueError(f"range_linear needs 3 bits or more, not {site.bits}; use uniq or lsq")

    @torch.no_grad()
    def calibrate(self, x: Tensor, *, keep: Range | None = None) -> None:
        """Sets the range to that of `x`; for activations `keep` instead, if its error is smaller.

        The calibrated range counts as the first step of the moving average.
        """
        self._observe(x)
        if self.site.target == "weight":
            return
        self.updates.fill_(1)
        if keep is not None:
            observed = self.low.clone(), self.high.clone()
            error = self._error(x)
            self.low.copy_(keep[0].amin())
            self.high.copy_(keep[1].amax())
            if self._error(x) >= error:
                self.low.copy_(observed[0])
                self.high.copy_(observed[1])

    def forward(self, x: Tensor) -> Tensor:
        """The quantized values, in the dtype and memory format of `x`, with a gradient."""
        if self.site.target == "weight":
            low, high = extremes(x, channel_axis=self.channel_axis)
            if self.training:
                self.low.copy_(low)
                self.high.copy_(high)
            return round_through(x, *self._grid(x, low, high))
        if self.training:
            self._follow(x)
        # clones: autograd keeps them, and the next step moves the buffers
        low, high = self.low.clone(), self.high.clone()
        scale, lowest, highest = self._grid(x, low, high)
        if self.mode != "asymmetric":
            high = torch.maximum(high.abs(), low.abs())
            low = -high if self.signed else torch.zeros_like(high)
        return round_within(x, scale, lowest, highest, low, high)

    @torch.no_grad()
    def encode(self, x: Tensor) -> QTensor:
        """The same values as codes."""
        low, high = self.low, self.high
        if self.site.target == "weight":
            low, high = extremes(x, channel_axis=self.channel_axis)
        scale, lowest, highest = self._grid(x, low, high)
        level = round_to_level(wide(x) / scale, lowest, highest)
        restricted = self.mode == "restricted" and self.signed
        return QTensor(
            to_codes(level, lowest, self.bits),
            scale.clone(),
            bits=self.bits,
            num_levels=2**self.bits - restricted,
            zero_point=0.0 - lowest,
            channel_axis=self.channel_axis,
        )

    @torch.no_grad()
    def range(self) -> Range:
        """Lowest and highest level; for weights of the last training step or calibration."""
        scale, lowest, highest = linear_grid(
            self.low, self.high, bits=self.bits, signed=self.signed, mode=self.mode
        )
        return scale * lowest, scale * highest

    def _grid(self, x: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Bound, Bound]:
        return linear_grid(
            per_channel_view(low, x),
            per_channel_view(high, x),
            bits=self.bits,
            signed=self.signed,
            mode=self.mode,
        )

    def _observe(self, x: Tensor) -> None:
        low, high = extremes(x, channel_axis=self.channel_axis)
        self.low.copy_(low)
        self.high.copy_(high)

    @torch.no_grad()
    def _follow(self, x: Tensor) -> None:
        """One step of the moving average, in the form that is bias-corrected all along."""
        low, high = world.extremes(*extremes(x, channel_axis=None))
        self.updates += 1
        # float64: 1 - decay**t loses four digits in float32
        share = ((1 - self.decay) / (1 - self.decay ** self.updates.double())).float()
        self.low.lerp_(low, share)
        self.high.lerp_(high, share)

    def _error(self, x: Tensor) -> Tensor:
        return (self.encode(x).dequantize() - x).square().mean()


@torch.no_grad()
def extremes(x: Tensor, *, channel_axis: int | None) -> Range:
    """Smallest and largest value, () or (channels,), in float32."""
    if channel_axis is None:
        low, high = x.aminmax()
        return low.float(), high.float()
    low, high = rows_of(x, channel_axis=channel_axis).aminmax(dim=1)
    return low, high


@torch.no_grad()
def linear_grid(
    low: Tensor, high: Tensor, *, bits: int, signed: bool, mode: Mode
) -> tuple[Tensor, Bound, Bound]:
    """Scale, lowest and highest level (in units of the scale) of the grid that spans low .. high.

    A range of no width gets scale 1.
    """
    top = 2**bits - 1
    if mode == "asymmetric":
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = _nonzero((high - low) / top)
        lowest = (low / scale).round()
        return scale, lowest, lowest + top
    largest = torch.maximum(low.abs(), high.abs())
    half = 2 ** (bits - 1)
    if not signed:
        return _nonzero(largest / top), 0.0, float(top)
    if mode == "restricted":
        return _nonzero(largest / (half - 1)), float(1 - half), float(half - 1)
    return _nonzero(2 * largest / top), float(-half), float(half - 1)


def _nonzero(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.ones_like(scale), scale)

"""WRPN: wide reduced-precision networks (Mishra et al., 2018, arXiv:1709.01134)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import QUANTIZERS, QTensor, Quantizer, Range, Site
from ..functional import learned_step, round_to_level, to_codes, wide
from ..initializers import StepInit, fitting_step, rows_of


@QUANTIZERS.register("wrpn")
class WRPN(Quantizer):
    """Clips to a fixed range and rounds; weights to 2^b - 1 levels around zero, else 0 .. 2^b-1.

    Nothing is learned, and the gradient stops outside the range. The range is fitted once, by
    calibration. One bit is {0, step} for activations; weights need two. The widening of the
    network is an option of the models.

    Options:
        unit_range: the paper's range, -1 .. 1 for weights and 0 .. 1 for activations, whatever
            the data. Weights of a trained network lie far inside it: with a deviation of 0.05,
            each of them becomes 0 at 2 bits, and the network is at chance.
        init: how the range is fitted; see `initializers.starting_steps`.

    Source: Mishra et al., ICLR 2018, arXiv:1709.01134, section 4. Differs from it in: the range
    is fitted unless `unit_range`. The public code in Distiller has 2^b + 1 levels, which is no
    b-bit code, and is not offered.
    """

    declares: frozenset[str] = frozenset({"nearest", "idempotent", "monotone"})

    scale: Tensor

    def __init__(self, site: Site, *, unit_range: bool = False, init: StepInit = "mse") -> None:
        super().__init__(site)
        weight = site.target == "weight"
        self.unit_range = unit_range
        self.init = init
        self.high = 2.0 ** (self.bits - 1) - 1 if weight else 2.0**self.bits - 1
        self.low = -self.high if weight else 0.0
        self.register_buffer("scale", torch.tensor(1 / self.high))
        if unit_range:
            self.declares = frozenset({"idempotent", "monotone"})  # no level need lie near

    @classmethod
    def check(cls, site: Site) -> None:
        """Refuses 1-bit weights, whose only level would be 0, and signed activations."""
        if site.target == "weight" and site.bits == 1:
            raise ValueError("wrpn has no 1-bit weights (their only level would be 0); use bwn")
        if site.target == "activation" and site.signed:
            raise ValueError("wrpn has no signed activations (clips at 0); use lsq or uniq")

    @torch.no_grad()
    def calibrate(self, x: Tensor, *, keep: Range | None = None) -> None:
        """Fits the range; see `Quantizer.calibrate`. The unit range stays as it is."""
        if self.unit_range:
            return
        step = fitting_step(
            rows_of(x, channel_axis=None),
            keep=keep,
            init=self.init,
            low=self.low,
            high=self.high,
            bits=self.bits,
            signed=self.signed,
            centered=self.site.target == "weight",
        )
        self.scale.copy_(step[0])

    def forward(self, x: Tensor) -> Tensor:
        """The quantized values, in the dtype and memory format of `x`, with a gradient."""
        return learned_step(x, self.scale, self.low, self.high, open_low=self.absorbs)

    @property
    def clamps_at_zero(self) -> bool:
        """See `Quantizer.clamps_at_zero`."""
        return self.site.target == "activation"

    @torch.no_grad()
    def encode(self, x: Tensor) -> QTensor:
        """The same values as codes."""
        level = round_to_level(wide(x) / self.scale, self.low, self.high)
        return QTensor(
            to_codes(level, self.low, self.bits),
            self.scale.clone(),
            bits=self.bits,
            num_levels=int(self.high - self.low) + 1,
            zero_point=0.0 - self.low,
        )

    @torch.no_grad()
    def range(self) -> Range:
        """Lowest and highest level."""
        return self.scale * self.low, self.scale * self.high

"""What all quantizers share whose range is a learned clip."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Literal

import torch
from torch import Tensor, nn

from .core import QTensor, Quantizer, Range, Site
from .functional import straight_through, wide
from .initializers import StepInit, kept_step, rows_of, starting_steps, usable
from .weight_norm import WeightNorm, normalize, normalized_range, restored, scaled

ClipGradScale = Literal["none", "lsq"] | float

LOWEST_CLIP = 1e-4  # of the calibrated clip


class LearnedClipQuantizer(Quantizer):
    """Levels between 0 and `clip`, a parameter, or symmetric between -clip and clip.

    The clip is stored as it is and used no smaller than `clip_floor`, a ten-thousandth of its
    calibrated value, which the gradient ignores; see `LearnedStepQuantizer`. Weights may be
    normalized first; the clip is then in units of their standard deviation.

    A subclass rounds: `rounded` with a gradient, `encoded` without. Unsigned, it clamps at zero
    and heeds `absorbs`.
    """

    clip: nn.Parameter
    clip_floor: Tensor
    spread: Tensor

    def __init__(
        self,
        site: Site,
        *,
        unit: float,
        init: StepInit,
        grad_scale: ClipGradScale = "none",
        weight_norm: WeightNorm = "none",
        detach_statistics: bool = False,
    ) -> None:
        """A clip of `unit` steps of the scale: the top level on a grid, 1 with a codebook."""
        super().__init__(site)
        if not isinstance(grad_scale, str) and not 0 < grad_scale < math.inf:
            raise ValueError(f"grad_scale is {grad_scale}; give a number above 0, 'none' or 'lsq'")
        self.unit = float(unit)
        # of the uniform grid of the same width, by which the clip starts and is counted
        self.top = 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1
        self.init = init
        self.grad_scale = grad_scale
        self.weight_norm: WeightNorm = weight_norm if site.target == "weight" else "none"
        self.detach_statistics = detach_statistics
        if self.weight_norm != "none":  # the mean of the weights is dropped
            self.declares = self.declares & {"monotone"}
        self.clip = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("clip_floor", torch.tensor(LOWEST_CLIP))
        if self.weight_norm == "restored":
            # the deviation of the last training step, for the hand-over to another width
            self.register_buffer("spread", torch.tensor(1.0))

    @abstractmethod
    def rounded(self, x: Tensor) -> Tensor:
        """`x`, normalized where it is to be, quantized with a gradient."""

    @abstractmethod
    def encoded(self, x: Tensor) -> QTensor:
        """The same values as codes; called without gradients."""

    @torch.no_grad()
    def calibrate(self, x: Tensor, *, keep: Range | None = None) -> None:
        """Sets the clip, where this quantizer errs least, and its lower bound."""
        if self.weight_norm != "none":
            x, deviation = normalize(x)
            if self.weight_norm == "restored":
                self.spread.copy_(deviation)
            # without restoring, the output has the scale of the normalized weights
            keep = None if keep is None else normalized_range(keep, deviation)
        rows = rows_of(x, channel_axis=None)
        low, high = (-float(self.top) if self.signed else 0.0), float(self.top)
        steps = starting_steps(
            rows,
            init=self.init,
            low=low,
            high=high,
            bits=self.bits,
            signed=self.signed,
            centered=self.site.target == "weight",
        )
        if keep is not None:
            steps = torch.cat([steps, kept_step(keep, rows, low=low, high=high)[None]])
        clips = [usable(step, rows, low=low, high=high)[0] * high for step in steps]
        self._set(min(clips, key=lambda clip: self._error(rows, clip)))

    def forward(self, x: Tensor) -> Tensor:
        """The quantized values, in the dtype and memory format of `x`, with a gradient."""
        if self.weight_norm == "none":
            return self.rounded(x)
        z, deviation = normalize(x, detach=self.detach_statistics)
        if self.weight_norm == "normalized":
            return self.rounded(z).to(x.dtype)
        if self.training:
            self.spread.copy_(deviation.detach())
        with torch.no_grad():
            q = scaled(self.encoded(z), deviation)
        return restored(self.rounded(z), deviation, q).to(x.dtype)

    @property
    def clamps_at_zero(self) -> bool:
        """See `Quantizer.clamps_at_zero`."""
        return not self.signed

    @torch.no_grad()
    def encode(self, x: Tensor) -> QTensor:
        """The same values as codes."""
        if self.weight_norm == "none":
            return self.encoded(x)
        z, deviation = normalize(x)
        q = self.encoded(z)
        return scaled(q, deviation) if self.weight_norm == "restored" else q

    @torch.no_grad()
    def range(self) -> Range:
        """Lowest and highest level; with "restored" for the weights of the last training step."""
        high = self.limit()
        if self.weight_norm == "restored":
            high = high * self.spread
        return (-high if self.signed else torch.zeros_like(high)), high

    def limit(self) -> Tensor:
        """The clip in use, without a gradient."""
        return torch.maximum(self.clip.detach(), self.clip_floor)

    def latent(self, x: Tensor) -> Tensor:
        """`x` without its mean where weights are normalized, or all of the normalized weights."""
        if self.weight_norm == "none":
            return x
        z, deviation = normalize(x, detach=self.detach_statistics)
        return z if self.weight_norm == "normalized" else z * deviation

    def learned_scale(self, x: Tensor, *, gradient: float | None = None) -> Tensor:
        """The scale in use, with a gradient to `clip`; see `Quantizer.learned_scale`."""
        factor = self.grad_factor(x) if gradient is None else gradient
        scale = straight_through(self.limit(), self.clip * factor) / self.unit
        if self.weight_norm == "restored":
            scale = scale * normalize(x.detach())[1]
        return scale

    def grad_factor(self, x: Tensor) -> float:
        """What the gradient of the clip is multiplied by, for an input of this size."""
        if self.grad_scale == "none":
            return 1.0
        if self.grad_scale != "lsq":
            return float(self.grad_scale)
        weight = self.site.target == "weight"
        count = x.numel() if weight else x.shape[self.site.channel_axis]
        return float(self.top / max(count, 1)) ** 0.5

    def _set(self, clip: Tensor) -> None:
        self.clip.copy_(clip)
        self.clip_floor.copy_(clip * LOWEST_CLIP)

    def _error(self, rows: Tensor, clip: Tensor) -> float:
        self._set(clip)
        return float((self.encoded(rows).dequantize() - wide(rows)).square().mean())

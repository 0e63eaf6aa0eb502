"""DoReFa-Net: tanh-normalized weights and activations clipped to 0 .. 1."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import QUANTIZERS, QTensor, Quantizer, Range, Site
from ..functional import learned_step, round_through, round_to_level, to_codes, wide

SMALLEST = 1e-12  # stands for the size of an all-zero tensor


@QUANTIZERS.register("dorefa")
class DoReFa(Quantizer):
    """Weights to 2^b levels of tanh(w), without zero; unsigned activations to 2^b levels of 0 .. 1.

    One bit: weights are mean|w| * sgn(w) with sgn(0) = +1; activations 0 or 1, threshold 0.5.
    Nothing is learned: weight statistics are read off the tensor at every step and get no
    gradient, and rounding passes the gradient on.

    Options:
        unit_range: weights in -1 .. 1, not multiplied back by max|tanh(w)|, which then gets a
            gradient. Changes the weight scale: only where a batch norm follows.

    Source: Zhou et al., 2016, arXiv:1606.06160, section 2. Differs from it in: weights keep their
    scale unless `unit_range`; a value half-way between two weight levels goes up.
    """

    declares: frozenset[str] = frozenset({"monotone"})

    scale: Tensor
    magnitude: Tensor

    def __init__(self, site: Site, *, unit_range: bool = False) -> None:
        super().__init__(site)
        self.unit_range = unit_range
        self.top = 2**self.bits - 1
        if site.target == "weight":
            # the largest weight of the last training step, for the hand-over to another width
            self.register_buffer("magnitude", torch.tensor(1.0))
        else:
            self.register_buffer("scale", torch.tensor(1.0 / self.top), persistent=False)

    @classmethod
    def check(cls, site: Site) -> None:
        """Refuses signed activations: the method clips at zero."""
        if site.target == "activation" and site.signed:
            raise ValueError("dorefa has no signed activations (clips to 0 .. 1); use lsq or uniq")

    @torch.no_grad()
    def calibrate(self, x: Tensor, *, keep: Range | None = None) -> None:
        """Notes the range of the weights; there is nothing else to set."""
        if self.site.target == "weight":
            self.magnitude.copy_(self._weight_scale(x, self.latent(x)) * (self.top / 2))

    def forward(self, x: Tensor) -> Tensor:
        """The quantized values, in the dtype and memory format of `x`, with a gradient."""
        if self.site.target == "activation":
            return learned_step(x, self.scale, 0.0, float(self.top), open_low=self.absorbs)
        latent = self.latent(x)
        scale = self._weight_scale(x, latent)
        if self.training:
            self.magnitude.copy_(scale * (self.top / 2))
        half = self.top / 2
        return round_through(latent, scale, -half, half, midrise=True).to(x.dtype)

    @property
    def clamps_at_zero(self) -> bool:
        """See `Quantizer.clamps_at_zero`."""
        return self.site.target == "activation"

    @torch.no_grad()
    def encode(self, x: Tensor) -> QTensor:
        """The same values as codes."""
        weight = self.site.target == "weight"
        low = -self.top / 2 if weight else 0.0
        latent = self.latent(x)
        scale = self._weight_scale(x, latent) if weight else self.scale.clone()
        level = round_to_level(latent / scale, low, low + self.top, midrise=weight)
        return QTensor(
            to_codes(level, low, self.bits),
            scale,
            bits=self.bits,
            num_levels=self.top + 1,
            zero_point=0.0 - low,
        )

    @torch.no_grad()
    def range(self) -> Range:
        """0 .. 1 for activations; for weights that of the last training step or calibration."""
        if self.site.target == "weight":
            return -self.magnitude, self.magnitude.clone()
        return torch.zeros_like(self.scale), torch.ones_like(self.scale)

    def latent(self, x: Tensor) -> Tensor:
        """tanh(w), over its largest size with `unit_range`; `x` itself at 1 bit and elsewhere."""
        if self.site.target == "activation" or self.bits == 1:
            return wide(x)
        normalized = torch.tanh(wide(x))
        if self.unit_range:
            normalized = normalized / normalized.abs().amax().clamp_min(SMALLEST)
        return normalized

    @torch.no_grad()
    def _weight_scale(self, x: Tensor, latent: Tensor) -> Tensor:
        """Distance between two levels."""
        if self.bits == 1:
            magnitude = wide(x).abs().mean()
        elif self.unit_range:
            magnitude = torch.ones((), device=x.device)
        else:
            magnitude = latent.abs().amax()
        return magnitude.clamp_min(SMALLEST) * (2 / self.top)

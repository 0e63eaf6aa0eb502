"""Any weight quantizer on normalized weights: limited weight normalization (LWN)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..core import QUANTIZERS, QTensor, Quantizer, Range, Site
from ..registry import unknown
from ..weight_norm import normalize, normalized_range, restored, scaled


@QUANTIZERS.register("weight_norm")
class WeightNormalized(Quantizer):
    """Runs another method on weights of mean 0 and deviation 1, then scales back.

    The mean is dropped. The gradient passes through mean and deviation. Signed widths are those
    of the method that is wrapped.

    Options:
        method: registered name of the quantizer inside.
        options: its options.
        restore: whether the deviation is multiplied back; without it a batch norm must follow.

    Source: Yamamoto, CVPR 2021, arXiv:2103.07156, section 3.3, and, without restoring, Li, Dong
    and Wang, ICLR 2020, arXiv:1909.13144. Differs from it in: nothing.
    """

    targets = frozenset({"weight"})
    declares: frozenset[str] = frozenset({"monotone"})

    spread: Tensor

    def __init__(
        self,
        site: Site,
        *,
        method: str = "lsq",
        options: dict[str, Any] | None = None,
        restore: bool = True,
    ) -> None:
        super().__init__(site)
        entry = QUANTIZERS[method]
        for name in options or {}:
            if name not in entry.options():
                raise ValueError(unknown(f"option of quantizer {method!r}", name, entry.options()))
        self.inner: Quantizer = entry.factory(site, **(options or {}))
        if type(self.inner).after_step is not Quantizer.after_step:
            raise ValueError(
                f"{method} changes the stored weights, which are not the normalized ones; "
                f"use {method} alone"
            )
        self.channel_axis = self.inner.channel_axis
        self.restore = restore
        self.declares = self.inner.declares & type(self).declares
        # the deviation of the last training step, for the hand-over to another width
        self.register_buffer("spread", torch.tensor(1.0))

    @classmethod
    def check(cls, site: Site) -> None:
        """The method inside decides, when it is built."""

    @classmethod
    def wraps(cls, options: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
        """The method inside and its options."""
        return options.get("method", "lsq"), options.get("options") or {}

    @torch.no_grad()
    def calibrate(self, x: Tensor, *, keep: Range | None = None) -> None:
        """Calibrates the method inside on the normalized weights."""
        z, deviation = normalize(x)
        if self.restore:
            self.spread.copy_(deviation)
        keep = None if keep is None else normalized_range(keep, deviation)
        self.inner.calibrate(z, keep=keep)

    def forward(self, x: Tensor) -> Tensor:
        """The quantized values, in the dtype and memory format of `x`, with a gradient."""
        z, deviation = normalize(x)
        if not self.restore:
            return self.inner(z).to(x.dtype)
        if self.training:
            self.spread.copy_(deviation.detach())
        with torch.no_grad():
            q = scaled(self.inner.encode(z), deviation)
        return restored(self.inner(z), deviation, q).to(x.dtype)

    @torch.no_grad()
    def encode(self, x: Tensor) -> QTensor:
        """The same values as codes."""
        z, deviation = normalize(x)
        q = self.inner.encode(z)
        return scaled(q, deviation) if self.restore else q

    @torch.no_grad()
    def range(self) -> Range:
        """That of the method inside, times the deviation of the last training step."""
        low, high = self.inner.range()
        return low * self.spread, high * self.spread

    def latent(self, x: Tensor) -> Tensor:
        """The latent values of the method inside, times the deviation where it is restored."""
        z, deviation = normalize(x)
        latent = self.inner.latent(z)
        return latent * deviation if self.restore else latent

    def learned_scale(self, x: Tensor, *, gradient: float | None = None) -> Tensor | None:
        """The scale of the method inside, times the deviation; see `Quantizer.learned_scale`."""
        z, deviation = normalize(x.detach())
        scale = self.inner.learned_scale(z, gradient=gradient)
        return scale * deviation if scale is not None and self.restore else scale

    def at_progress(self, fraction: float) -> None:
        """Tells the method inside."""
        self.inner.at_progress(fraction)

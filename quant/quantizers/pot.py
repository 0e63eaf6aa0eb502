"""Powers of two as levels, in the form of the APoT repository."""

from __future__ import annotations

from ..core import QUANTIZERS, Site
from ..initializers import StepInit
from ..learned_clip import ClipGradScale
from ..level_sets import Form, LevelSetQuantizer, pot_levels
from ..weight_norm import WeightNorm


@QUANTIZERS.register("pot")
class PoT(LevelSetQuantizer):
    """Rounds to zero and to powers of two, times a learned clip: multiplying is shifting.

    Signed values have b-1 bits for their size; 2-bit weights are ternary. More bits only add
    levels next to zero, so accuracy gains little beyond 3 bits of size. Options: see `APoT`.

    Source: Miyashita, Lee and Murmann, 2016, arXiv:1603.01025, as in Li, Dong and Wang, ICLR 2020,
    arXiv:1909.13144. Differs from it in: see `APoT`.
    """

    def __init__(
        self,
        site: Site,
        *,
        form: Form = "cifar",
        init: StepInit = "nmse",
        grad_scale: ClipGradScale = "none",
        weight_norm: WeightNorm = "restored",
    ) -> None:
        self.check(site)
        super().__init__(
            site,
            magnitudes=pot_levels(site.bits - site.signed),
            uniform=False,
            form=form,
            init=init,
            grad_scale=grad_scale,
            weight_norm=weight_norm,
        )

    @classmethod
    def check(cls, site: Site) -> None:
        """Refuses signed 1 bit, and widths whose new levels are below 2^-14 of the clip."""
        bits = site.bits - site.signed
        if bits < 1:
            raise ValueError("pot has no signed 1 bit (its only level would be 0); use uniq")
        if bits > 4:
            raise ValueError(
                f"pot at {site.bits} bits would only add levels below 2^-14 of its range; "
                "use apot or lsq"
            )

"""Even levels with everything else as in APoT."""

from __future__ import annotations

from ..core import QUANTIZERS, Site
from ..initializers import StepInit
from ..learned_clip import ClipGradScale
from ..level_sets import Form, LevelSetQuantizer, uniform_levels
from ..weight_norm import WeightNorm


@QUANTIZERS.register("apot_uniform")
class APoTUniform(LevelSetQuantizer):
    """Rounds to even levels up to a learned clip: APoT's gradients without its powers of two.

    Signed values lie on -(2^(b-1)-1) .. 2^(b-1)-1 steps. Options: see `APoT`.

    Source: Li, Dong and Wang, ICLR 2020, arXiv:1909.13144, its uniform baseline. Differs from it
    in: see `APoT`.
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
            magnitudes=uniform_levels(site.bits - site.signed),
            uniform=True,
            form=form,
            init=init,
            grad_scale=grad_scale,
            weight_norm=weight_norm,
        )

    @classmethod
    def check(cls, site: Site) -> None:
        """Refuses one signed bit, and 16 bits, where a table of levels is no use."""
        if site.signed and site.bits == 1:
            raise ValueError("apot_uniform has no signed 1 bit (its only level is 0); use uniq")
        if site.bits > 8:
            raise ValueError(f"apot_uniform goes up to 8 bits, not {site.bits}; use lsq")

"""APoT: additive powers of two (Li, Dong and Wang, 2020)."""

from __future__ import annotations

from ..core import QUANTIZERS, Site
from ..initializers import StepInit
from ..learned_clip import ClipGradScale
from ..level_sets import Form, LevelSetQuantizer, apot_levels
from ..weight_norm import WeightNorm


@QUANTIZERS.register("apot")
class APoT(LevelSetQuantizer):
    """Rounds to sums of two or three powers of two, times a learned clip: dense around zero.

    Signed values have b-1 bits for their size; 2-bit weights are ternary, -clip, 0 and clip.

    Options:
        form: "cifar" passes the gradient to clipped weights too, and none through the statistics
            of the weight normalization; unsigned activations pass it below zero. "imagenet" stops
            it outside the range, except for 2-bit weights, and passes it through the statistics.
        init: the start of the clip, as the step times the steps of a uniform grid; see
            `initializers.starting_steps`. "constant" is the origin's 3 and 8.
        grad_scale: factor on the gradient of the clip: a number, "none", or "lsq" for
            sqrt(Qp / N), N the weights or the channels of an activation.
        weight_norm: "restored" rounds normalized weights and multiplies their deviation back;
            "normalized" does not, as in the origin: only where a batch norm follows.

    Source: Li, Dong and Wang, ICLR 2020, arXiv:1909.13144. Differs from it in: normalized weights
    are scaled back and clips start from data, unless the options say otherwise.
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
            magnitudes=apot_levels(site.bits - site.signed),
            uniform=False,
            form=form,
            init=init,
            grad_scale=grad_scale,
            weight_norm=weight_norm,
        )

    @classmethod
    def check(cls, site: Site) -> None:
        """Refuses widths for which the origin has no level sets (it would return 0 / 0)."""
        bits = site.bits - site.signed
        if bits < 1 or bits > 6 or (bits == 1 and not site.signed):
            widths = "2 to 7 bits for signed" if site.signed else "2 to 6 bits for unsigned"
            raise ValueError(f"apot has {widths} values, not {site.bits}; use lsq, or uniq at 1")

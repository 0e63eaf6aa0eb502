"""UniQ: learned-step quantization on a symmetric mid-rise grid, valid down to one bit."""

from __future__ import annotations

from ..core import QUANTIZERS, Site
from ..initializers import StepInit
from ..learned_step import GradScale, LearnedStepQuantizer


@QUANTIZERS.register("uniq")
class UniQ(LearnedStepQuantizer):
    """Rounds to odd multiples of half a learned step: 2^b levels, symmetric, without zero.

    One signed bit is -step/2 and +step/2, with sgn(0) = +1. Unsigned activations lie on
    0 .. 2^b-1 steps, as in LSQ. Options: see `LSQ`.

    Source: Pham, Abraham and Chung, IEEE Access 2021, doi:10.1109/ACCESS.2021.3067889. Differs
    from it in: a value half-way between two levels goes up, not to the even code.
    """

    declares: frozenset[str] = frozenset({"nearest", "idempotent", "monotone"})

    def __init__(
        self,
        site: Site,
        *,
        per_channel: bool = False,
        init: StepInit = "nmse",
        grad_scale: GradScale = "numel_per_channel",
    ) -> None:
        top = 2**site.bits - 1
        super().__init__(
            site,
            low=-top / 2 if site.signed else 0.0,
            high=top / 2 if site.signed else float(top),
            midrise=site.signed,
            grad_levels=max(2 ** (site.bits - 1) - 1, 1) if site.signed else top,
            per_channel=per_channel,
            init=init,
            grad_scale=grad_scale,
        )

    @classmethod
    def check(cls, site: Site) -> None:
        """Every width is defined, signed and unsigned."""

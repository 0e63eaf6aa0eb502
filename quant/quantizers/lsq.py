"""Learned step size quantization (Esser et al., 2020, arXiv:1902.08153)."""

from __future__ import annotations

from ..core import QUANTIZERS, Site
from ..initializers import StepInit
from ..learned_step import GradScale, LearnedStepQuantizer


@QUANTIZERS.register("lsq")
class LSQ(LearnedStepQuantizer):
    """Rounds to multiples of a learned step: -2^(b-1) .. 2^(b-1)-1 signed, 0 .. 2^b-1 unsigned.

    Options:
        per_channel: a step for each output channel (weights).
        restricted: drop the lowest signed level, -2^(b-1), so that the grid is symmetric.
        init: the start of the step; see `initializers.starting_steps`.
        grad_scale: the count N in the step's gradient factor 1 / sqrt(N * Qp). "numel" is the
            whole tensor even per channel, as in public code; "numel_per_channel" the principled
            count; "channel_count" the channels of an activation; "none" no factor.

    Source: Esser et al., ICLR 2020, equations 1-5. Differs from it in: nothing.
    """

    declares: frozenset[str] = frozenset({"nearest", "idempotent", "monotone"})

    def __init__(
        self,
        site: Site,
        *,
        per_channel: bool = False,
        restricted: bool = False,
        init: StepInit = "nmse",
        grad_scale: GradScale = "numel",
    ) -> None:
        qmax = 2 ** (site.bits - 1) - 1 if site.signed else 2**site.bits - 1
        qmin = (-qmax if restricted else -qmax - 1) if site.signed else 0
        super().__init__(
            site,
            low=float(qmin),
            high=float(qmax),
            midrise=False,
            grad_levels=qmax,
            per_channel=per_channel,
            init=init,
            grad_scale=grad_scale,
        )

    @classmethod
    def check(cls, site: Site) -> None:
        """Refuses one signed bit, which would leave the levels -1 and 0."""
        if site.signed and site.bits == 1:
            raise ValueError("lsq has no signed 1 bit (its levels would be -1 and 0); use uniq")

"""LCQ: learnable companding quantization (Yamamoto, 2021)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..compander import INTERVALS, Compander, companded
from ..core import QUANTIZERS, QTensor, Site
from ..functional import learned_step, round_to_level, to_codes, wide
from ..initializers import StepInit
from ..learned_clip import ClipGradScale, LearnedClipQuantizer
from ..weight_norm import WeightNorm


@QUANTIZERS.register("lcq")
class LCQ(LearnedClipQuantizer):
    """Rounds evenly behind a learned map of the range, so that levels go where they are needed.

    The map has 16 straight pieces and starts as the identity. Signed values have 2^b - 1 levels,
    symmetric about zero; with 2 bits these are -clip, 0 and clip, and there is no map.

    Options:
        init: the start of the clip, as the step times the steps of a uniform grid; see
            `initializers.starting_steps`.
        grad_scale: factor on the gradients of clip and map: a number, "none", or "lsq" for
            sqrt(Qp / N), N the weights or, as in public code, the channels of an activation.
        weight_norm: "restored" rounds normalized weights and multiplies their deviation back, the
            paper's limited weight normalization; "normalized" leaves it out, "none" both.

    Source: Yamamoto, CVPR 2021, arXiv:2103.07156. Differs from it in: levels are not rounded a
    second time, to 8 bits, as in public code.
    """

    declares: frozenset[str] = frozenset({"idempotent", "monotone"})

    def __init__(
        self,
        site: Site,
        *,
        init: StepInit = "nmse",
        grad_scale: ClipGradScale = "none",
        weight_norm: WeightNorm = "restored",
    ) -> None:
        super().__init__(site, unit=1, init=init, grad_scale=grad_scale, weight_norm=weight_norm)
        self.ternary = self.signed and self.bits == 2
        if not self.ternary:
            self.theta = nn.Parameter(torch.zeros(INTERVALS))

    @classmethod
    def check(cls, site: Site) -> None:
        """Refuses signed 1 bit, whose only level would be 0, and more than 8 bits."""
        if site.signed and site.bits == 1:
            raise ValueError("lcq has no signed 1 bit (its only level would be 0); use uniq")
        if site.bits > 8:
            raise ValueError(f"lcq goes up to 8 bits, not {site.bits}; use lsq")

    @property
    def encoding_constants(self) -> int:
        """The thresholds of the sizes, where they are not midpoints."""
        return 0 if self.ternary else self.top

    def rounded(self, x: Tensor) -> Tensor:
        """See `LearnedClipQuantizer.rounded`."""
        factor = self.grad_factor(x)
        if self.ternary:
            return learned_step(x, self.clip, -1.0, 1.0, grad_scale=factor, floor=self.clip_floor)
        return companded(
            x,
            self.clip,
            self.theta,
            floor=self.clip_floor,
            top=self.top,
            signed=self.signed,
            grad_scale=factor,
            open_low=self.absorbs,
        )

    def encoded(self, x: Tensor) -> QTensor:
        """See `LearnedClipQuantizer.encoded`."""
        limit = self.limit()
        if self.ternary:
            level = round_to_level(wide(x) / limit, -1.0, 1.0)
            return QTensor(to_codes(level, -1.0, 2), limit, 2, 3, zero_point=1.0)
        compander = Compander.of(self.theta, self.top)
        return compander.encode(x, limit, bits=self.bits, signed=self.signed)

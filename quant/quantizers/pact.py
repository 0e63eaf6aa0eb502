"""PACT: activations between zero and a learned clip (Choi et al., 2018)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core import QUANTIZERS, QTensor, Site
from ..functional import round_to_level, to_codes, wide
from ..initializers import StepInit
from ..learned_clip import LearnedClipQuantizer

BELOW_ONE = 1.0 - 2.0**-24  # the float32 next to 1: what is above it is at least 1


@QUANTIZERS.register("pact")
class PACT(LearnedClipQuantizer):
    """Unsigned activations to 2^b even levels between 0 and a clip learned from what it cuts off.

    One bit is 0 or the clip, with the threshold at half of it. The clip's gradient counts clipped
    values alone, so only weight decay makes it smaller: by default that of the weights.

    Options:
        init: the start of the clip, as the step times the number of steps; see
            `initializers.starting_steps`. "constant" is 8, as in public code.

    Source: Choi et al., 2018, arXiv:1805.06085, equations 1-3. Differs from it in: the clip starts
    from data.
    """

    targets = frozenset({"activation"})
    decays = True
    declares: frozenset[str] = frozenset({"nearest", "idempotent", "monotone"})

    def __init__(self, site: Site, *, init: StepInit = "nmse") -> None:
        super().__init__(site, unit=2**site.bits - 1, init=init)

    @classmethod
    def check(cls, site: Site) -> None:
        """Refuses signed activations: the method clips at zero."""
        if site.signed:
            raise ValueError("pact has no signed values (it clips at zero); use lsq or uniq")

    def rounded(self, x: Tensor) -> Tensor:
        """See `LearnedClipQuantizer.rounded`."""
        return _Clip.apply(x, self.clip, self.clip_floor, self.unit)

    def encoded(self, x: Tensor) -> QTensor:
        """See `LearnedClipQuantizer.encoded`."""
        scale = self.limit() / self.unit
        level = round_to_level(wide(x) / scale, 0.0, self.unit)
        return QTensor(to_codes(level, 0.0, self.bits), scale, self.bits, int(self.unit) + 1)


class _Clip(torch.autograd.Function):
    """dL/dx = G where 0 < x < clip; dL/dclip = sum of G where x >= clip."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clip: Tensor, floor: Tensor, top: float) -> Tensor:
        limit = torch.maximum(clip, floor)
        scale = limit / top
        ctx.save_for_backward(x, limit)
        return round_to_level(wide(x) / scale, 0.0, top).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, limit = ctx.saved_tensors
        share, wide_grad = wide(x) / limit, wide(grad)
        # bounds left out on both sides: this absorbs a ReLU as it is
        grad_x = torch.ops.aten.hardtanh_backward.default(wide_grad, share, 0.0, 1.0)
        grad_clip = None
        if ctx.needs_input_grad[1]:
            grad_clip = torch.ops.aten.threshold_backward.default(wide_grad, share, BELOW_ONE).sum()
        return grad_x.to(x.dtype), grad_clip, None, None

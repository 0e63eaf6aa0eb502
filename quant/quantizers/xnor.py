"""XNOR-Net (Rastegari et al., 2016, arXiv:1603.05279)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core import QUANTIZERS, Site, Target
from ..functional import wide
from ..signs import Estimator, SignGradient, SignQuantizer, sign


@QUANTIZERS.register("xnor")
class XNOR(SignQuantizer):
    """Centred weights to mean|w| * sgn(w), with the scale's gradient; activations to the sign.

    Weights are centred over the input channels and clamped to -1 .. 1. The stored weight is too,
    after each step of the optimizer; the forward pass repeats it, which changes nothing but
    where the clamp has moved a mean. Activations are -1 and +1, so no ReLU may stand before them.

    Options:
        count_factor: multiply the weight's gradient by the weights of a filter, as the public
            code does. It makes weight decay weaker by as much; under SGD it is a learning rate.
        estimator: what stands for the gradient of the sign; "paper" is "clipped", for activations
            without the bounds. Of weights, clamped to -1 .. 1, "identity" is the same.
        delta: strength of "ewgs".

    Source: Rastegari et al., ECCV 2016, arXiv:1603.05279, as in jiecaoyu/XNOR-Net-PyTorch.
    Differs from the paper in: activations have no scale map, as in that code. Differs from the
    code in: no `count_factor` by default; one input channel (depthwise) is not centred, which
    would leave nothing; sgn(0) = +1.
    """

    own: ClassVar[dict[Target, Estimator]] = {"weight": "clipped", "activation": "clipped"}

    def __init__(
        self,
        site: Site,
        *,
        count_factor: bool = False,
        estimator: Estimator = "paper",
        delta: float = 0.2,
    ) -> None:
        weight = site.target == "weight"
        super().__init__(site, per_channel=weight, estimator=estimator, delta=delta)
        self.count_factor = count_factor
        if weight:
            self.declares = frozenset()  # of the centred weight all three hold, of the weight none

    def forward(self, x: Tensor) -> Tensor:
        """The quantized values, in the dtype and memory format of `x`, with a gradient."""
        if self.site.target == "activation":
            return super().forward(x)
        factor = float(x[0].numel()) if self.count_factor else 1.0
        if x.shape[1] > 1:
            factor *= 1 - 1 / x.shape[1]
        latent = self.latent(x).detach()
        return _ScaledSign.apply(x, latent, self.weight_scale(latent), self.gradient, factor)

    def latent(self, x: Tensor) -> Tensor:
        """Weights (O, I, *kernel) centred over I and clamped to -1 .. 1, in float32."""
        x = wide(x)
        if self.site.target == "activation":
            return x
        return (x - x.mean(1, keepdim=True) if x.shape[1] > 1 else x).clamp(-1, 1)

    @torch.no_grad()
    def after_step(self, weight: Tensor) -> None:
        """Centres and clamps the stored weight, in place."""
        weight.copy_(self.latent(weight))


class _ScaledSign(torch.autograd.Function):
    """scale * sgn(latent), differentiated through the scale = mean|latent| as well."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        latent: Tensor,
        scale: Tensor,
        gradient: SignGradient,
        factor: float,
    ) -> Tensor:
        ctx.save_for_backward(latent, scale)
        ctx.gradient, ctx.factor = gradient, factor
        return sign(latent).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        latent, scale = ctx.saved_tensors
        level = sign(latent)
        own = (wide(grad) * level).flatten(1).mean(1).view_as(scale)
        through = ctx.gradient.through(wide(grad), latent, scale)
        grad_x = level.mul_(own).addcmul_(through, scale).mul_(ctx.factor)
        return grad_x.to(grad.dtype), None, None, None, None

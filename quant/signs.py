"""The sign with a gradient: one bit, -scale or +scale.

What stands for the derivative of the sign is called an estimator. Each is a factor on the
gradient, element by element, in closed form:

| estimator | factor |
|---|---|
| identity | 1 |
| clipped | 1 where abs(x) <= 1, else 0 |
| quadratic | 2 - 2 abs(x) where abs(x) < 1, else 0 |
| ede | k t (1 - tanh(t u)^2), t = 0.1 .. 10 over the stage, k = max(1 / t, 1) |
| reste | derivative of abs(x)^(1/o) where abs(x) <= 1.5, else 0; o = 1 .. 3 over the stage |
| ewgs | 1 + delta sign(G) (u - sgn(u)) / 2 where abs(x) <= 1, else 0; u held in -1 .. 1 |

u = x / scale, which is x for activations: the papers of ede and ewgs normalize weights first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .core import QTensor, Quantizer, Range, Site, Target
from .functional import inside, per_channel_view, wide

Estimator = Literal["paper", "identity", "clipped", "quadratic", "ede", "reste", "ewgs"]

SMALLEST_SCALE = 1e-12  # stands for the mean size of weights that are all zero
RESTE_CLIP = 1.5
RESTE_NEAR = 0.1  # nearer to zero, the secant over this distance: the derivative has a pole there
RESTE_LAST_POWER = 3.0


@dataclass(frozen=True)
class SignGradient:
    """What stands for the gradient of the sign; see the table above.

    Attributes:
        estimator: which one; "paper" is for a quantizer to replace.
        closed: whether "clipped" lets the gradient pass at -1 and 1 themselves.
        delta: strength of "ewgs", 0 .. 2; above 2 a gradient could change its sign.
        progress: how far the stage is, 0 .. 1; read by "ede" and "reste".
    """

    estimator: Estimator
    closed: bool = True
    delta: float = 0.2
    progress: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.delta <= 2:
            raise ValueError(f"delta is {self.delta}; it must be within 0 .. 2")

    def through(self, grad: Tensor, x: Tensor, scale: Tensor | None) -> Tensor:
        """The gradient of `x`, of shape and type of `grad`.

        Args:
            grad: gradient of the output, float32 or float64; the factor is applied to it.
            x: the latent values, of the same type.
            scale: broadcastable to `x`; None is 1.
        """
        match self.estimator:
            case "clipped":
                return inside(grad, x, -1.0, 1.0) if self.closed else _hardtanh(grad, x, 1.0)
            case "quadratic":
                return torch.rsub(x.abs().clamp_(max=1), 2, alpha=2).mul_(grad)
            case "ede":
                return self._ede(grad, x if scale is None else x / scale)
            case "reste":
                return self._reste(grad, x)
            case "ewgs":
                return self._ewgs(grad, x, scale)
        assert self.estimator == "identity"
        return grad

    def _ede(self, grad: Tensor, u: Tensor) -> Tensor:
        t = 10 ** (2 * self.progress - 1)
        slope = torch.ops.aten.tanh_backward.default(grad, (u * t).tanh_())
        return slope.mul_(max(1 / t, 1.0) * t)

    def _reste(self, grad: Tensor, x: Tensor) -> Tensor:
        grad = inside(grad, x, -RESTE_CLIP, RESTE_CLIP)
        o = 1 + (1 - math.cos(math.pi / 2 * self.progress)) * (RESTE_LAST_POWER - 1)
        if o == 1:
            return grad
        power = 1 / o - 1
        near = inside(grad, x, -RESTE_NEAR, RESTE_NEAR)
        # exp(log) is a single precision pow at half its cost
        size = x.abs().clamp_(RESTE_NEAR, RESTE_CLIP).log_().mul_(power).exp_()
        # the secant near zero is o times the derivative at the end of that interval
        return size.mul_(grad).div_(o).add_(near, alpha=RESTE_NEAR**power * (1 - 1 / o))

    def _ewgs(self, grad: Tensor, x: Tensor, scale: Tensor | None) -> Tensor:
        u = x.clamp(-1, 1) if scale is None else (x / scale).clamp_(-1, 1)
        distance = u.sub_(sign(x))  # in half steps: the levels lie 2 apart
        scaled = torch.addcmul(grad, grad.abs(), distance, value=self.delta / 2)
        return inside(scaled, x, -1.0, 1.0)


def sign(x: Tensor) -> Tensor:
    """+1 where x >= 0, else -1. torch.sign alone would make 0 a third level."""
    return x.sign().add_(0.5).sign_()


def sign_through(
    x: Tensor, scale: Tensor | None, gradient: SignGradient, bias: Tensor | None = None
) -> Tensor:
    """scale * sgn(x + bias), with the gradient of an estimator. The scale gets none.

    Args:
        x: any shape and floating dtype.
        scale: float32, positive, broadcastable to `x`; None is 1.
        gradient: what stands for the derivative.
        bias: broadcastable to `x`, with as many dimensions; it is learned.

    Returns:
        In the dtype and memory format of `x`.
    """
    return _Sign.apply(x, scale, bias, gradient)


class SignQuantizer(Quantizer):
    """One bit by the sign: weights +-mean|w|, activations +-1. A base for the methods.

    The scale of weights is read off them at every step and gets no gradient.
    """

    declares: frozenset[str] = frozenset({"nearest", "idempotent", "monotone"})
    own: ClassVar[dict[Target, Estimator]]  # what "paper" means

    magnitude: Tensor

    def __init__(
        self, site: Site, *, per_channel: bool, estimator: Estimator, delta: float = 0.2
    ) -> None:
        super().__init__(site, per_channel=per_channel)
        weight = site.target == "weight"
        self.gradient = SignGradient(
            self.own[site.target] if estimator == "paper" else estimator,
            closed=weight,
            delta=delta,
        )
        # of weights the scale of the last training step, for the hand-over; of activations 1
        shape = (site.channels,) if per_channel else ()
        self.register_buffer("magnitude", torch.ones(shape), persistent=weight)

    @classmethod
    def check(cls, site: Site) -> None:
        """Refuses all widths but 1, and activations that are never negative."""
        name = cls.__name__.lower()
        if site.bits != 1:
            raise ValueError(f"{name} has 1 bit only, not {site.bits}; use lsq or uniq")
        if site.target == "activation" and not site.signed:
            raise ValueError(
                f"{name} makes every value of an unsigned activation +1; use lsq at 1 bit "
                "({0, s}), or a network whose activation is signed, such as rprelu"
            )

    @torch.no_grad()
    def calibrate(self, x: Tensor, *, keep: Range | None = None) -> None:
        """Notes the scale of the weights; there is nothing else to set."""
        if self.site.target == "weight":
            self.magnitude.copy_(self._scale(self.latent(x)).view_as(self.magnitude))

    def forward(self, x: Tensor) -> Tensor:
        """The quantized values, in the dtype and memory format of `x`, with a gradient."""
        if self.site.target == "activation":
            return sign_through(x, None, self.gradient)
        return sign_through(x, self.weight_scale(self.latent(x)), self.gradient)

    @torch.no_grad()
    def encode(self, x: Tensor) -> QTensor:
        """The same values as codes."""
        latent = self.latent(x)
        scale = self._scale(latent) if self.site.target == "weight" else self.magnitude
        return QTensor(
            (latent >= 0).to(torch.uint8),
            2 * scale,  # distance of the two levels
            bits=1,
            num_levels=2,
            zero_point=0.5,
            channel_axis=self.channel_axis,
        )

    @torch.no_grad()
    def range(self) -> Range:
        """The two levels; for weights of the last training step or calibration."""
        return -self.magnitude, self.magnitude.clone()

    def at_progress(self, fraction: float) -> None:
        """Moves an annealed estimator on; see `Quantizer.at_progress`."""
        self.gradient = replace(self.gradient, progress=fraction)

    def latent(self, x: Tensor) -> Tensor:
        """`x` itself, in float32."""
        return wide(x)

    @torch.no_grad()
    def weight_scale(self, latent: Tensor) -> Tensor:
        """Mean size of the latent weights, broadcastable to them; noted in training."""
        scale = self._scale(latent)
        if self.training:
            self.magnitude.copy_(scale.view_as(self.magnitude))
        return scale

    def _scale(self, latent: Tensor) -> Tensor:
        size = latent.abs()
        mean = size.mean() if self.channel_axis is None else size.flatten(1).mean(1)
        return per_channel_view(mean.clamp_min(SMALLEST_SCALE), latent)


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor | None, bias: Tensor | None, gradient: SignGradient
    ) -> Tensor:
        ctx.save_for_backward(x, scale, bias)
        ctx.gradient = gradient
        y = sign(wide(x) if bias is None else x + bias)
        return (y if scale is None else y.mul_(scale)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, scale, bias = ctx.saved_tensors
        shifted = wide(x) if bias is None else x + bias
        grad_x = ctx.gradient.through(wide(grad), shifted, scale)
        grad_bias = grad_x.sum_to_size(bias.shape) if ctx.needs_input_grad[2] else None
        return grad_x.to(x.dtype), None, grad_bias, None


def _hardtanh(grad: Tensor, x: Tensor, bound: float) -> Tensor:
    """`grad` where abs(x) < bound, else 0."""
    return torch.ops.aten.hardtanh_backward.default(grad, x, -bound, bound)

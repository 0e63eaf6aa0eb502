"""ReActNet's sign with a learned threshold (Liu et al., 2020, arXiv:2003.03488)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ..core import QUANTIZERS, Site, Target
from ..signs import Estimator, SignQuantizer, sign_through


@QUANTIZERS.register("reactnet")
class ReActNet(SignQuantizer):
    """Activations to the sign of x + a bias learned per channel (RSign); weights as in Bi-Real.

    Activations are -1 and +1, so no ReLU may stand before them. The bias starts at 0.

    Options:
        estimator: what stands for the gradient of the sign; "paper" is "clipped" for weights and
            "quadratic" for activations.
        delta: strength of "ewgs".

    Source: Liu et al., ECCV 2020, arXiv:2003.03488, section 4. Differs from it in: sgn(0) = +1.
    """

    own: ClassVar[dict[Target, Estimator]] = {"weight": "clipped", "activation": "quadratic"}

    bias: nn.Parameter | None

    def __init__(self, site: Site, *, estimator: Estimator = "paper", delta: float = 0.2) -> None:
        weight = site.target == "weight"
        super().__init__(site, per_channel=weight, estimator=estimator, delta=delta)
        self.bias = None
        if not weight:
            self.bias = nn.Parameter(torch.zeros(site.channels))
            self.declares = frozenset()  # each channel has its own threshold

    def forward(self, x: Tensor) -> Tensor:
        """The quantized values, in the dtype and memory format of `x`, with a gradient."""
        if self.bias is None:
            return super().forward(x)
        return sign_through(x, None, self.gradient, self._bias_beside(x))

    def latent(self, x: Tensor) -> Tensor:
        """x + bias for activations, `x` itself for weights; in float32."""
        return super().latent(x) if self.bias is None else x + self._bias_beside(x)

    @property
    def encoding_constants(self) -> int:
        """The biases of an activation."""
        return 0 if self.bias is None else self.bias.numel()

    def _bias_beside(self, x: Tensor) -> Tensor:
        """The bias with the dimensions of `x`, (1, C, 1, ...) or (1, ..., C)."""
        assert self.bias is not None
        shape = [1] * x.dim()
        shape[self.site.channel_axis] = -1
        return self.bias.view(shape)

"""Bi-Real Net (Liu et al., 2018, arXiv:1808.00278)."""

from __future__ import annotations

from typing import ClassVar

from ..core import QUANTIZERS, Site, Target
from ..signs import Estimator, SignQuantizer


@QUANTIZERS.register("bireal")
class BiReal(SignQuantizer):
    """Weights to mean|w| * sgn(w) of each filter, activations to the sign, quadratic gradient.

    Nothing is learned. Activations are -1 and +1, so no ReLU may stand before them.

    Options:
        estimator: what stands for the gradient of the sign; "paper" is "clipped" for weights and
            "quadratic", the derivative of a piecewise polynomial, for activations.
        delta: strength of "ewgs".

    Source: Liu et al., ECCV 2018, arXiv:1808.00278, sections 3.2 and 3.3. Differs from it in:
    sgn(0) = +1.
    """

    own: ClassVar[dict[Target, Estimator]] = {"weight": "clipped", "activation": "quadratic"}

    def __init__(self, site: Site, *, estimator: Estimator = "paper", delta: float = 0.2) -> None:
        weight = site.target == "weight"
        super().__init__(site, per_channel=weight, estimator=estimator, delta=delta)

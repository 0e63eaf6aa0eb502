"""Binary-Weight-Network (Rastegari et al., 2016, arXiv:1603.05279)."""

from __future__ import annotations

from typing import ClassVar

from ..core import QUANTIZERS, Site, Target
from ..signs import Estimator, SignQuantizer


@QUANTIZERS.register("bwn")
class BWN(SignQuantizer):
    """Weights to mean|w| * sgn(w), a scale for each filter; the gradient passes unchanged.

    Options:
        per_channel: a scale for each output channel; else one for the tensor.
        estimator: what stands for the gradient of the sign; "paper" is "identity".
        delta: strength of "ewgs".

    Source: Rastegari et al., ECCV 2016, arXiv:1603.05279, section 3.1. Differs from it in: the
    scale counts as a constant in the gradient; `xnor` has the scale's own term.
    """

    targets: ClassVar[frozenset[Target]] = frozenset({"weight"})
    own: ClassVar[dict[Target, Estimator]] = {"weight": "identity"}

    def __init__(
        self,
        site: Site,
        *,
        per_channel: bool = True,
        estimator: Estimator = "paper",
        delta: float = 0.2,
    ) -> None:
        super().__init__(site, per_channel=per_channel, estimator=estimator, delta=delta)

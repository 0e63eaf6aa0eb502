"""What every loss sees, and the registry of losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from ...quant.registry import Registry

LOSSES: Registry[Callable[..., nn.Module]] = Registry("loss")


@dataclass(frozen=True)
class Step:
    """One training step as the losses see it.

    Attributes:
        logits: the student's, (N, K), with gradient.
        targets: class numbers, (N,).
        teacher_logits: (N, K), without gradient; None where there is no teacher.
    """

    logits: Tensor
    targets: Tensor
    teacher_logits: Tensor | None

"""What every loss sees, and the registries of losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from ...quant.registry import Registry

# On logits: factory(*, options), a module that turns a Step into a scalar.
LOSSES: Registry[Callable[..., nn.Module]] = Registry("loss")

# On one layer of the student and one of a teacher: factory(student_size, teacher_size, generator,
# *, options), a module that turns the two outputs into a scalar. Sizes are those of one batch,
# (N, C, H, W) or (N, C); a module that learns something draws its start from the generator.
FEATURE_LOSSES: Registry[Callable[..., nn.Module]] = Registry("feature loss")


@dataclass(frozen=True)
class Step:
    """One training step under one teacher, as the losses see it.

    Attributes:
        logits: the student's, (N, K), with gradient.
        targets: class numbers, (N,).
        teacher_logits: (N, K), without gradient; None where there is no teacher.
        features: layer name -> the student's output there, with gradient.
        teacher_features: the same of the teacher, without gradient.
        teacher: which of the stage's teachers it is.
    """

    logits: Tensor
    targets: Tensor
    teacher_logits: Tensor | None
    features: Mapping[str, Tensor] = field(default_factory=dict)
    teacher_features: Mapping[str, Tensor] = field(default_factory=dict)
    teacher: int = 0


def log_probabilities(step: Step, name: str, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-softmax of the student's and the teacher's logits over T; (N, K), always float32.

    Raises:
        ValueError: there is no teacher; `name` is the loss that needs one.
    """
    if step.teacher_logits is None:
        raise ValueError(f"the loss {name!r} needs a teacher")
    student = (step.logits.float() / temperature).log_softmax(dim=1)
    return student, (step.teacher_logits.float() / temperature).log_softmax(dim=1)


def positive(value: float, name: str = "temperature") -> float:
    """The value of an option that must be above 0."""
    if not value > 0:
        raise ValueError(f"{name} must be above 0, not {value}")
    return value


def non_negative(value: float, name: str) -> float:
    """The value of an option that must not be below 0."""
    if not value >= 0:
        raise ValueError(f"{name} must not be below 0, not {value}")
    return value

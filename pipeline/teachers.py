"""What the teachers of a stage say about a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..models.tapped import Outputs, tapped
from .data.order import permutation


def teach(
    teachers: Sequence[nn.Module],
    x: Tensor,
    *,
    layers: Sequence[str] = (),
    left_out: frozenset[int] = frozenset(),
) -> list[Outputs | None]:
    """Each teacher's outputs, without gradient; None for one that is left out, which is not run.

    Args:
        x: the student's own batch, (N, C, H, W).
        layers: of which layers the outputs are wanted.
        left_out: numbers of teachers.
    """
    with torch.no_grad():
        return [
            None if number in left_out else tapped(teacher, x, layers)
            for number, teacher in enumerate(teachers)
        ]


def dropped_teachers(count: int, drop: int, *, seed: int, step: int) -> frozenset[int]:
    """Which of a stage's teachers one batch does without; at least one is always kept.

    A function of seed and step, so a resumed run needs no state for it.

    Source: Son et al., "Densely Guided Knowledge Distillation using Multiple Teacher Assistants",
    ICCV 2021, arXiv:2009.08825, whose code drops one. Differs from it in: nothing.
    """
    drop = min(drop, count - 1)
    if drop < 1:
        return frozenset()
    return frozenset(permutation(count, seed, "teachers", step)[:drop].tolist())

"""What the teachers of a stage say about a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..models.tapped import Outputs, tapped
from .data.order import permutation
from .teacher_cache import CachedLogits


class Teachers:
    """A stage's teachers, ready to be asked in every step; see `ready_teachers`.

    Args:
        networks: in eval mode and without gradients, their weights in `dtype`; none with a cache.
        dtype: that they compute in, whatever the student does.
        cache: their logits of the training images, in place of running them.

    Attributes:
        networks: may be replaced by others that give the same, such as compiled ones.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        *,
        dtype: torch.dtype = torch.float32,
        cache: CachedLogits | None = None,
    ) -> None:
        self.networks: list[Any] = list(networks)
        self.cache = cache
        self._dtype = dtype

    def __len__(self) -> int:
        return len(self.networks if self.cache is None else self.cache.tables)

    def __iter__(self) -> Iterator[Any]:
        """The networks that run in a step."""
        return iter(self.networks)

    def __call__(
        self,
        x: Tensor,
        step: int,
        *,
        layers: Sequence[str] = (),
        left_out: frozenset[int] = frozenset(),
    ) -> list[Outputs | None]:
        """Each teacher's outputs, float32 and without gradient; None for one that is left out.

        Args:
            x: the student's own batch, (N, C, H, W).
            step: 0-based, within the stage; tells what is cached which images these are.
            layers: of which layers the outputs are wanted.
            left_out: numbers of teachers.
        """
        if self.cache is not None:
            assert not layers  # the config refuses both together
            logits = self.cache.of_step(step, left_out)
            return [None if own is None else Outputs(own) for own in logits]
        # the teachers were made for their own precision: a student's autocast is not theirs
        with torch.autocast(x.device.type, enabled=False):
            outputs = teach(self.networks, x.to(self._dtype), layers=layers, left_out=left_out)
        return [None if own is None else _wide(own) for own in outputs]


def _wide(outputs: Outputs) -> Outputs:
    features = {name: feature.float() for name, feature in outputs.features.items()}
    return Outputs(outputs.logits.float(), features)


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

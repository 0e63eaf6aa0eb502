"""Fixed, seeded splits that keep every class's share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .order import generator_of


def stratified_split(
    labels: Tensor, held_out: float | int, *, seed: int, name: str = "validation"
) -> tuple[Tensor, Tensor]:
    """Indices that stay and indices held out, both ascending.

    Args:
        labels: (N,).
        held_out: a fraction in (0, 1), rounded up to whole samples, or a number of samples.
        name: what the held-out part is called in error messages; it enters the seed, so a test
            and a validation split of one seed are independent.

    Each class gives its share, to rounding: the whole part, then one more for those with the
    largest remainders (the lower label where they tie).

    Raises:
        ValueError: nothing or everything would be held out.
    """
    num_samples = len(labels)
    total = _num_held_out(num_samples, held_out, name)
    counts = torch.bincount(labels).tolist()
    shares = [total * count / num_samples for count in counts]
    taken = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(counts)), key=lambda c: (taken[c] - shares[c], c))
    for label in by_remainder[: total - sum(taken)]:
        taken[label] += 1

    out = torch.zeros(num_samples, dtype=torch.bool)
    for members, num_taken in zip(_shuffled_classes(labels, seed, name), taken, strict=True):
        out[members[:num_taken]] = True
    return (~out).nonzero().flatten(), out.nonzero().flatten()


def stratified_fold(
    labels: Tensor, fold: int, folds: int, *, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Indices outside and inside one of `folds` parts, both ascending.

    The parts are disjoint, cover all samples, differ by one sample at most, and so do the
    members that any two of them have of a class.
    """
    if not 2 <= folds <= len(labels):
        raise ValueError(f"folds must be from 2 to the {len(labels)} samples, not {folds}")
    if not 0 <= fold < folds:
        raise ValueError(f"fold must be from 0 to {folds - 1}, not {fold}")
    # dealt out like cards, class after class: each part gets every folds-th sample
    dealt = torch.cat(_shuffled_classes(labels, seed, "folds"))
    inside = torch.zeros(len(labels), dtype=torch.bool)
    inside[dealt[fold::folds]] = True
    return (~inside).nonzero().flatten(), inside.nonzero().flatten()


def _num_held_out(num_samples: int, held_out: float | int, name: str) -> int:
    if 0 < held_out < 1:
        # the guard keeps 0.2 * 360 = 72.00000000000001 from being rounded up
        total = math.ceil(num_samples * held_out - 1e-9)
    elif held_out >= 1 and float(held_out).is_integer():
        total = int(held_out)
    else:
        raise ValueError(
            f"{name} must be a fraction between 0 and 1 or a number of samples, not {held_out}"
        )
    if total >= num_samples:
        raise ValueError(
            f"{name}: {held_out} would hold out {total} of {num_samples} samples and leave none"
        )
    return total


def _shuffled_classes(labels: Tensor, seed: int, name: str) -> list[Tensor]:
    """For each class its members, in an order that the seed decides."""
    generator = generator_of(seed, name)
    classes = []
    for label in range(int(labels.max()) + 1):
        members = (labels == label).nonzero().flatten()
        classes.append(members[torch.randperm(len(members), generator=generator)])
    return classes

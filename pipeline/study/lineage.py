"""Which rungs of a ladder a rung stands on: by its first weights, by its teachers, and theirs."""

from __future__ import annotations

from ..config import RunConfig
from ..parents import parents_of


def lineage(config: RunConfig, position: int) -> list[int]:
    """Positions of a rung and of every rung that it would not be the same without, in order."""
    found: set[int] = set()
    open_ones = [position]
    while open_ones:
        at = open_ones.pop()
        if at not in found:
            found.add(at)
            open_ones += parents_of(config, at).roles().values()
    return sorted(found)


def start(config: RunConfig, position: int) -> tuple[int | None, int]:
    """Where the weights of a quantized rung come from.

    Returns:
        The full-precision rung that its weights go back to, if they go back to one; and the
        quantized rung that began with those, or with fresh ones or a file's.
    """
    first = position
    while (before := parents_of(config, first).init) is not None:
        if config.ladder[before].full_precision:
            return before, first
        first = before
    return None, first

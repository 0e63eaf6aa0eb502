"""Where a ladder stands as a whole."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from .auto_ladder import is_over
from .run import Run
from .store import Store

LadderState = Literal["running", "failed", "interrupted", "done"]


def ladder_state(store: Store, run: Run, rungs: Iterable[str] | None = None) -> LadderState:
    """The worst of its rungs; done when none follows them.

    A process that only looks inside a rung, for its page, is one that works on the ladder.

    Args:
        rungs: where each of them stands, if that has been read; what is told of the ladder is then
            of the same moment as what is told of them.
    """
    states = set(rungs) if rungs is not None else {state for state, _ in store.rung_states(run)}
    if "running" in states:
        return "running"
    if "failed" in states:
        return "failed"
    if any(store.holder(key) for key in run.looks):
        return "running"
    return "done" if states == {"done"} and is_over(run, store.read) else "interrupted"

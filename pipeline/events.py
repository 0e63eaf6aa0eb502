"""What a running ladder tells whoever listens: a terminal, a log, Prefect."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

EventKind = Literal[
    "reused", "waiting", "started", "step", "epoch", "message", "finished", "packed", "failed"
]


@dataclass(frozen=True)
class Event:
    """One thing that happened to one stage.

    Attributes:
        kind: what happened; `step` comes several times a second, the others rarely.
        stage: the stage's name in the ladder, e.g. "w8a8".
        position: its rung, counted from 0.
        stages: how many the ladder has; 0 while that depends on results.
        epoch: finished epochs; starts above 0 where a stage is resumed.
        epochs: epochs in all.
        fraction: of the stage's training done, 0 to 1.
        loss: of the last batch (`step`) or the mean of the epoch (`epoch`).
        accuracy: validation top-1, a fraction.
        seconds_left: estimate until the stage's training ends.
        text: `waiting`: for whom; `message`: a notice; `failed`: the cause.
        metrics: `finished`: the stage's row of the results table; `packed`: the file's part of it.
    """

    kind: EventKind
    stage: str
    position: int
    stages: int
    epoch: int = 0
    epochs: int = 0
    fraction: float = 0.0
    loss: float | None = None
    accuracy: float | None = None
    seconds_left: float | None = None
    text: str = ""
    metrics: Mapping[str, Any] = field(default_factory=dict)


Listener = Callable[[Event], None]

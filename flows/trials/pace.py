"""How much of a study's training is left, and how long it will take."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from ...pipeline.events import Event
from .dispatch import Task


class Pace:
    """Counts epochs of the stages that are to be trained, each once, however many share it.

    An epoch counts the same in every stage, so the time left is a guess that gets better.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        there: Callable[[str], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begins to count.

        Args:
            there: whether the stage of a key is done.
        """
        self._clock, self._start = clock, clock()
        self._keys = {task.number: task.keys for task in tasks}  # of trials that are not over
        self._epochs = {
            stage.key: task.trial.config.ladder[stage.position].train.epochs
            for task in tasks
            for stage in task.plan.stages
            if not there(stage.key)
        }
        self._begun: dict[str, float] = {}  # share of a stage that was done when it began here
        self._done: dict[str, float] = {}  # and that is done now

    def heard(self, task: Task, event: Event) -> None:
        """Takes in what happened to a stage."""
        key = task.keys[event.position]
        if event.kind in ("started", "step", "epoch", "finished"):
            self._begun.setdefault(key, event.fraction if event.kind == "started" else 0.0)
            self._done[key] = event.fraction

    def ended(self, task: Task) -> None:
        """A trial is over: what only it needed will not be trained any more."""
        del self._keys[task.number]

    @property
    def seconds_left(self) -> float | None:
        """Until the study ends; None while nothing can be said."""
        needed = {key for keys in self._keys.values() for key in keys} & set(self._epochs)
        left = sum(self._epochs[key] * (1 - self._done.get(key, 0.0)) for key in needed)
        made = sum(
            self._epochs.get(key, 0) * (done - self._begun[key]) for key, done in self._done.items()
        )
        seconds = self._clock() - self._start
        return seconds * left / made if made > 0 and seconds >= 5 else None

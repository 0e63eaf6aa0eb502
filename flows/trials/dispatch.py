"""Which trial of a study runs next, until all are over."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from ...pipeline.errors import Interrupted
from ...pipeline.events import Event
from ...pipeline.spec import Plan
from ...pipeline.store import Store
from .run_trial import Outcome, Request

if TYPE_CHECKING:
    from ...pipeline.study import Trial

log = logging.getLogger(__name__)
POLL_SECONDS = 0.3


@dataclass(frozen=True)
class Task:
    """A trial to be run, and what a worker is told of it.

    Attributes:
        number: of the trial in the study, counted from 0.
    """

    number: int
    trial: Trial
    request: Request

    @property
    def plan(self) -> Plan:
        """Its stages."""
        return self.trial.plan

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Keys of its stages in ladder order."""
        return tuple(stage.key for stage in self.plan.stages)


class Crew(Protocol):
    """Workers that run trials, at most `size` at a time."""

    size: int

    def start(self, task: Task) -> None:
        """Gives a trial to a worker that has none."""
        ...

    def wait(self, seconds: float) -> Iterable[tuple[Task, Event | Outcome]]:
        """What the workers have told since, waiting some seconds for it at most."""
        ...

    def stop(self) -> None:
        """Asks every worker to save what it has and to end its trial, and returns at once."""
        ...


class Watcher(Protocol):
    """Shows how a study goes."""

    def started(self, task: Task) -> None:
        """A worker has a trial now."""
        ...

    def heard(self, task: Task, event: Event) -> None:
        """Something happened to a stage of it."""
        ...

    def ended(self, task: Task, outcome: Outcome) -> None:
        """It is over."""
        ...


def dispatch(
    tasks: Sequence[Task],
    crew: Crew,
    store: Store,
    watcher: Watcher,
    stop: Callable[[], int | None],
) -> dict[int, Outcome]:
    """Runs the trials; gives back their outcomes by number.

    Raises:
        Interrupted: `stop` gave a signal's number; every trial that ran has saved its state.
    """
    waiting, running = list(tasks), list[Task]()
    outcomes: dict[int, Outcome] = {}
    number: int | None = None
    while waiting or running:
        if number is None and (number := stop()) is not None:
            crew.stop()
        if number is not None:
            waiting.clear()
        while len(running) < crew.size and (task := next_task(waiting, running, store)):
            waiting.remove(task)
            if outcome := settled(task, store):  # by a trial that shares its stages
                outcomes[task.number] = outcome
                watcher.ended(task, outcome)
                continue
            running.append(task)
            watcher.started(task)
            crew.start(task)
        for task, told in crew.wait(POLL_SECONDS) if running else ():
            if isinstance(told, Event):
                watcher.heard(task, told)
                continue
            running.remove(task)
            outcomes[task.number] = told
            log.debug("%s: %s in %s", task.trial.name, told.state, told.worker)
            watcher.ended(task, told)
    if number is not None:
        raise Interrupted(number)
    return outcomes


def next_task(waiting: Sequence[Task], running: Sequence[Task], store: Store) -> Task | None:
    """The first trial that would not wait for another one's stage; None if all would.

    A trial waits where the next stage that it needs is still to be trained by one that runs, or
    is being trained by another process. When nothing runs the first one does, whatever it needs.
    """
    taken = {key for task in running for key in task.keys if not _is_there(store, key)}
    for task in waiting:
        needed = next((key for key in task.keys if not _is_there(store, key)), None)
        if needed is None or not (needed in taken or store.holder(needed)):
            return task
    return waiting[0] if waiting and not running else None


def settled(task: Task, store: Store) -> Outcome | None:
    """How a trial ended, if there is nothing left to do for it."""
    for stage in task.plan.stages:
        if cause := store.diverged(stage.key):
            return Outcome("diverged", f"{stage.name}: {cause}")
    return Outcome("done") if all(_is_there(store, key) for key in task.keys) else None


def _is_there(store: Store, key: str) -> bool:
    return (store.stages / key).is_dir()

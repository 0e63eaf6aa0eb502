"""How a running study looks: a row for each worker on a terminal, lines of a log elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn
from rich.table import Column

from ...pipeline.events import Event
from ..progress import (
    DRAWS_PER_SECOND,
    IN_TRAINING,
    describe,
    duration,
    is_watched,
    print_line,
)
from .dispatch import Task, Watcher
from .pace import Pace
from .run_trial import Outcome

LOG_SECONDS = 30.0  # between two lines about stages in training
TOLD = ("started", "finished", "waiting", "failed", "message")  # each has a line of its own


@contextmanager
def study_watcher(
    console: Console, tasks: Sequence[Task], of: int, there: Callable[[str], bool]
) -> Iterator[Watcher]:
    """Shows on the console how the trials go while the context lasts.

    Args:
        tasks: those that are not over yet.
        of: how many the study has.
        there: whether the stage of a key is done.
    """
    pace = Pace(tasks, there)
    if not is_watched(console):
        yield Lines(lambda line: print_line(console, line), pace, len(tasks), of)
        return
    with Progress(
        *columns(),
        console=console,
        transient=True,
        expand=True,
        refresh_per_second=DRAWS_PER_SECOND,
    ) as progress:
        yield Rows(progress, pace, len(tasks), of)


def columns() -> tuple[ProgressColumn, ...]:
    """Of what a row consists: what it is about, how much is done, time left."""
    return (
        TextColumn(
            "{task.description}",
            markup=False,
            table_column=Column(no_wrap=True, overflow="ellipsis", ratio=3),
        ),
        BarColumn(bar_width=None, table_column=Column(ratio=1)),
        TextColumn("{task.fields[left]}", markup=False, table_column=Column(no_wrap=True)),
    )


def title(task: Task, of: int) -> str:
    """Which trial of how many, counted from 1: `trial 3/18 kd-previous seed 1`."""
    return f"trial {task.number + 1}/{of} {task.trial.name}"


def ending(task: Task, outcome: Outcome, of: int) -> str:
    """How a trial ended, as a line."""
    why = f": {outcome.cause.partition(chr(10))[0]}" if outcome.cause else ""
    return f"{title(task, of)} {outcome.state}{why}"


class Lines:
    """A watcher that writes lines with the time of day; of training, one in `LOG_SECONDS`."""

    def __init__(self, write: Callable[[str], None], pace: Pace, left: int, of: int) -> None:
        self._write, self._pace, self._left, self._of = write, pace, left, of
        self._last = time.monotonic()

    def started(self, task: Task) -> None:
        """See `Watcher`."""

    def heard(self, task: Task, event: Event) -> None:
        """See `Watcher`."""
        self._pace.heard(task, event)
        due = time.monotonic() - self._last >= LOG_SECONDS
        if event.kind in TOLD or (due and event.kind in IN_TRAINING):
            self._tell(f"{title(task, self._of)}: {describe(event)}")

    def ended(self, task: Task, outcome: Outcome) -> None:
        """See `Watcher`."""
        self._pace.ended(task)
        self._left -= 1
        seconds = self._pace.seconds_left
        left = f", {self._left} left" + (f", {duration(seconds)}" if seconds else "")
        goes_on = self._left and outcome.state != "interrupted"
        self._tell(ending(task, outcome, self._of) + (left if goes_on else ""))

    def _tell(self, line: str) -> None:
        self._last = time.monotonic()
        self._write(f"{time.strftime('%H:%M:%S')} {line}")


class Rows:
    """A watcher that draws a row for the study, and below it one for each trial that runs."""

    def __init__(self, progress: Progress, pace: Pace, left: int, of: int) -> None:
        self._progress, self._pace, self._left, self._of = progress, pace, left, of
        self._rows: dict[int, TaskID] = {}
        self._study = progress.add_task("", total=of, completed=of - left, left="")
        self._draw_study()

    def started(self, task: Task) -> None:
        """See `Watcher`."""
        row = self._progress.add_task(title(task, self._of), total=1, left="")
        self._rows[task.number] = row

    def heard(self, task: Task, event: Event) -> None:
        """See `Watcher`."""
        self._pace.heard(task, event)
        if event.kind == "message":
            print_line(self._progress.console, f"{title(task, self._of)}: {describe(event)}")
            return
        stages = [f"{title(task, self._of)} · {event.position + 1}/{event.stages} {event.stage}"]
        if event.kind == "waiting":
            stages.append(event.text)
        elif event.epochs:
            stages.append(f"epoch {event.epoch}/{event.epochs}")
        done = (event.position + event.fraction) / event.stages
        text = " · ".join(stages)
        self._progress.update(self._rows[task.number], completed=done, description=text)
        self._draw_study()

    def ended(self, task: Task, outcome: Outcome) -> None:
        """See `Watcher`."""
        self._pace.ended(task)
        self._left -= 1
        if (row := self._rows.pop(task.number, None)) is not None:
            self._progress.remove_task(row)
        print_line(self._progress.console, ending(task, outcome, self._of))
        self._draw_study()

    def _draw_study(self) -> None:
        seconds = self._pace.seconds_left
        self._progress.update(
            self._study,
            description=f"{self._of - self._left} of {self._of} trials",
            completed=self._of - self._left,
            left=f"{duration(seconds)} left" if seconds is not None else "",
        )

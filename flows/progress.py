"""How a running ladder looks: bars on a terminal, lines of a log elsewhere."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn
from rich.table import Column

from ..pipeline.derived import said_of_packed
from ..pipeline.events import Event, Listener

LOG_SECONDS = 10.0  # between two lines about a stage in training
DRAWS_PER_SECOND = 4.0  # a drawing costs the training about a millisecond
IN_TRAINING = ("step", "epoch")


@contextmanager
def terminal_listener(console: Console) -> Iterator[Listener]:
    """A listener that shows progress on the console while the context lasts.

    A bar for each stage in training, and above the bars a line for each that is over. Where
    nobody watches (no terminal, a dumb one, CI) lines only, of training one in `LOG_SECONDS`.
    """
    if not is_watched(console):
        yield log_listener(lambda line: print_line(console, line))
        return
    # transient: what is printed next, perhaps an error, begins on a line of its own
    with Progress(
        *_columns(console.width),
        console=console,
        transient=True,
        refresh_per_second=DRAWS_PER_SECOND,
    ) as progress:
        yield filled(_Bars(progress))


def log_listener(write: Callable[[str], None], *, seconds: float = LOG_SECONDS) -> Listener:
    """A listener that writes lines with the time of day; of training, one in `seconds`."""
    describe = _Describe()

    def tell(event: Event) -> None:
        write(f"{time.strftime('%H:%M:%S')} {describe(event)}")

    return filled(throttled(tell, seconds=seconds))


def broadcast(*listeners: Listener) -> Listener:
    """One listener that passes every event to each of several, in order."""

    def tell(event: Event) -> None:
        for listener in listeners:
            listener(event)

    return tell


def throttled(
    listener: Listener, *, seconds: float, clock: Callable[[], float] = time.monotonic
) -> Listener:
    """Passes on at most one `step` or `epoch` in `seconds`, every other event at once.

    The time counts from the last event passed on: the first word of a stage's training comes
    `seconds` after its start.
    """
    heard = -math.inf

    def tell(event: Event) -> None:
        nonlocal heard
        now = clock()
        if event.kind in IN_TRAINING and now - heard < seconds:
            return
        heard = now
        listener(event)

    return tell


def filled(listener: Listener) -> Listener:
    """Adds what a stage told last where an event in training leaves it out (a step's accuracy)."""
    last: dict[int, Event] = {}

    def tell(event: Event) -> None:
        if event.kind in IN_TRAINING:
            before = last.get(event.position, event)
            event = replace(
                event,
                loss=before.loss if event.loss is None else event.loss,
                accuracy=before.accuracy if event.accuracy is None else event.accuracy,
            )
            last[event.position] = event
        listener(event)

    return tell


def heading(event: Event) -> str:
    """Which stage of how many, counted from 1: `2/5 w8a8`; `rung 2 w8a8` of nobody knows yet."""
    if event.stages == 0:
        return f"rung {event.position + 1} {event.stage}"
    return f"{event.position + 1}/{event.stages} {event.stage}"


def describe(event: Event) -> str:
    """The event as one line of text."""
    name = heading(event)
    match event.kind:
        case "reused":
            return ", ".join([f"{name} was there already", *_results(event)])
        case "finished":
            return ", ".join([f"{name} finished", *_results(event)])
        case "started" if event.epoch:
            return f"{name} goes on after epoch {event.epoch}/{event.epochs}"
        case "started":
            return f"{name} started"
        case "waiting":
            return f"{name} waits for {event.text}"
        case "failed":
            return f"{name} failed: {event.text}"
        case "message":
            return f"{name}: {event.text}"
        case "packed":
            return f"{name} packed, {said_of_packed(event.metrics)}"
    return f"{name} {', '.join(_facts(event).values())}"


def duration(seconds: float) -> str:
    """Seconds as people read them: `0:07`, `1:02:03`."""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class _Describe:
    """Describes events; of a stage that finishes it also says how long that took."""

    def __init__(self) -> None:
        self._started: dict[int, float] = {}

    def __call__(self, event: Event) -> str:
        if event.kind == "started":
            self._started[event.position] = time.monotonic()
        elif event.kind == "finished" and event.position in self._started:
            seconds = time.monotonic() - self._started.pop(event.position)
            return f"{describe(event)}, took {duration(seconds)}"
        return describe(event)


class _Bars:
    """Draws on a progress display, whose own thread sees to the rate of drawing."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._describe = _Describe()
        self._bars: dict[int, TaskID] = {}

    def __call__(self, event: Event) -> None:
        line = self._describe(event)
        if event.kind == "started" or event.kind in IN_TRAINING:
            self._draw(event)
            return
        if event.kind in ("finished", "failed") and event.position in self._bars:
            self._progress.remove_task(self._bars.pop(event.position))
        print_line(self._progress.console, line)

    def _draw(self, event: Event) -> None:
        if event.position not in self._bars:
            empty: dict[str, Any] = dict.fromkeys(("epoch", "loss", "accuracy", "left"), "")
            self._bars[event.position] = self._progress.add_task(heading(event), total=1, **empty)
        self._progress.update(self._bars[event.position], completed=event.fraction, **_facts(event))


def _columns(width: int) -> list[ProgressColumn]:
    """What has room: name, share done and time left come before epoch, accuracy, bar and loss."""

    def text(template: str) -> TextColumn:
        column = Column(no_wrap=True, overflow="ellipsis")
        return TextColumn(template, markup=False, table_column=column)

    columns: list[ProgressColumn] = [
        text("{task.description}"),
        BarColumn(bar_width=None) if width >= 72 else text("{task.percentage:>3.0f} %"),
    ]
    if width >= 46:
        columns.append(text("{task.fields[epoch]}"))
    if width >= 80:
        columns.append(text("{task.fields[loss]}"))
    if width >= 66:
        columns.append(text("{task.fields[accuracy]}"))
    return [*columns, text("{task.fields[left]}")]


def _facts(event: Event) -> dict[str, Any]:
    """What the event knows of epoch, loss, accuracy and time left."""
    facts: dict[str, Any] = {}
    if event.epochs:
        facts["epoch"] = f"epoch {event.epoch}/{event.epochs}"
    if event.loss is not None:
        # one that diverges has thirty digits before the point
        facts["loss"] = f"loss {event.loss:{'.4f' if abs(event.loss) < 1e6 else '.3g'}}"
    if event.accuracy is not None:
        facts["accuracy"] = f"accuracy {100 * event.accuracy:.2f} %"
    if event.seconds_left is not None:
        facts["left"] = f"{duration(event.seconds_left)} left"
    return facts


def _results(event: Event) -> list[str]:
    """What a stage came to, as far as its row has it."""
    names = {"val_top1": "validation", "test_top1": "test"}
    return [
        f"{text} {100 * event.metrics[name]:.2f} %"
        for name, text in names.items()
        if isinstance(event.metrics.get(name), float)
    ]


def is_watched(console: Console) -> bool:
    """Whether somebody looks at the console, so that drawing on it makes sense."""
    # FORCE_COLOR makes rich take a pipe for a terminal, so the file is asked as well
    isatty = getattr(console.file, "isatty", bool)
    return console.is_interactive and isatty() and not os.environ.get("CI")


def print_line(console: Console, line: str) -> None:
    """Prints text as it is, on one line."""
    # soft_wrap: in a log a line stays a line; markup: a path may hold [brackets]
    console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)

"""`bitladder watch`: a ladder that runs elsewhere, followed by reading its store."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from rich.console import Console

from ..pipeline.auto_ladder import is_over
from ..pipeline.events import Event, Listener
from ..pipeline.history import epochs_of
from ..pipeline.onlooker import Seen, look_at, read_again
from ..pipeline.resume_command import resume_command
from ..pipeline.run import Run
from ..pipeline.store import Store
from .progress import terminal_listener

LOOK_SECONDS = 0.5  # between two looks; one reads a few small files
QUIET_SECONDS = 10.0  # without any process: between two stages Prefect takes its time
START_SECONDS = 60.0  # from a ladder's registration to its first stage


def watch_run(name: str | None, store: Store) -> None:
    """Follows a ladder until it is done, and prints its table; with code 1 if it fails."""
    from ..pipeline.report import accuracy_report
    from .commands import print_frame

    run = store.run(name)
    failed = False
    try:
        with terminal_listener(Console()) as listener:
            watch = Watch(store, run, listener)
            while not watch.look(time.monotonic()):
                time.sleep(LOOK_SECONDS)
        run, failed = watch.run, watch.failed
    except KeyboardInterrupt:  # the watching ends, the ladder does not
        sys.exit(130)
    print_frame(accuracy_report(store, run), store)
    if failed:
        sys.exit(1)


@dataclass
class Watch:
    """Turns what changes in the store into the events that the ladder tells where it runs.

    Attributes:
        failed: whether a stage has failed, which ends the watching.
    """

    store: Store
    run: Run
    listener: Listener
    failed: bool = False
    _over: set[str] = field(default_factory=set)  # keys whose end was told
    _epochs: dict[str, int] = field(default_factory=dict)  # by key: told so far, while held
    _told: str = ""  # about nobody working on it
    _busy: float | None = None  # when somebody last worked on it
    _looks: int = 0

    def look(self, now: float) -> bool:
        """One look at everything, at a time in seconds; whether the watching is over."""
        self.run, touched = read_again(self.store, self.run)
        seen: list[tuple[int, Seen]] = []
        for position, keys in enumerate(zip(self.run.trained, self.run.packed, strict=True)):
            for each, packs in zip(keys, (False, True), strict=True):
                sight = look_at(self.store, each)
                seen.append((position, sight))
                self._tell(position, each, packs, sight)
                if sight.sight == "failed" and sight.since >= touched:
                    self._say(position, kind="failed", text=sight.text)
                    self.failed = True
                    return True
        self._looks += 1
        if all(sight.sight == "done" for _, sight in seen) and is_over(self.run, self.store.read):
            return True
        self._idle(seen, touched, now)
        return False

    def _tell(self, position: int, key: str, packs: bool, seen: Seen) -> None:
        if seen.sight == "done" and key not in self._over:
            self._over.add(key)
            record = self.store.read(key)
            kind = "packed" if packs else "finished" if self._looks else "reused"
            if record is not None and not (packs and not self._looks):
                self._say(position, kind=kind, fraction=1.0, metrics=dict(record.metrics))
        elif seen.sight == "held" and not packs:
            self._training(position, key)
        elif key in self._epochs and seen.sight != "done":
            del self._epochs[key]  # when somebody takes it up it begins anew

    def _training(self, position: int, key: str) -> None:
        options = self.run.stages[position]["spec"]["options"]
        epochs = int(options["stage"]["train"]["epochs"])
        lines = epochs_of(self.store, key)
        done = len(lines)
        share = {"epoch": done, "epochs": epochs, "fraction": done / epochs if epochs else 0.0}
        if key not in self._epochs:
            self._say(position, kind="started", **share)
        if done > self._epochs.get(key, 0):
            last = lines[-1]
            left = (epochs - done) * sum(line["seconds"] for line in lines) / done
            facts = {"loss": last["train_loss"], "accuracy": last["val_top1"]}
            self._say(position, kind="epoch", **share, **facts, seconds_left=left)
        self._epochs[key] = done

    def _idle(self, seen: list[tuple[int, Seen]], touched: str, now: float) -> None:
        """Says once that nobody works on it, as soon as that is sure."""
        looking = (look_at(self.store, key) for key in self.run.looks)
        held = any(sight.sight == "held" for sight in (*(s for _, s in seen), *looking))
        gone = [(position, sight) for position, sight in seen if sight.sight == "abandoned"]
        if held or self._busy is None:
            self._busy, self._told = now, "" if held else self._told
        if held or self._told:
            return
        go_on = f"go on with: {resume_command(self.store, self.run.run)}"
        if gone:
            position, sight = gone[0]
            self._told = f"{sight.text} is gone; {go_on}"
        elif now - self._busy > QUIET_SECONDS and _age(touched) > START_SECONDS:
            last = len(self.run.stages) - 1  # an automatic ladder stands between two rungs
            position = next((p for p, sight in reversed(seen) if sight.sight != "done"), last)
            self._told = f"nobody works on it; {go_on}"
        else:
            return
        self._say(position, kind="message", text=self._told)

    def _say(self, position: int, **fields: Any) -> None:
        stages = 0 if self.run.config.get("auto") else len(self.run.stages)
        name = str(self.run.stages[position]["name"])
        self.listener(Event(stage=name, position=position, stages=stages, **fields))


def _age(moment: str) -> float:
    """Seconds since a time in ISO 8601."""
    try:
        return (datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds()
    except ValueError:
        return float("inf")

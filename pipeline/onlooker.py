"""A running ladder seen from outside: from the files of its store alone, without a lock."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .files import TornFileError, read_json
from .record import CHECKPOINT, MANIFEST
from .run import Run
from .run_file import read_run_file
from .store import Store

Sight = Literal["done", "held", "abandoned", "failed", "stopped", "nothing"]


@dataclass(frozen=True)
class Seen:
    """What the files of a stage, or of the one that packs it, tell.

    Attributes:
        sight: held by a process that lives; abandoned by one that does not; stopped with a
            checkpoint; or nothing is there yet.
        text: which process, or the cause of the failure.
        since: when it failed, UTC, ISO 8601.
    """

    sight: Sight
    text: str = ""
    since: str = ""


def look_at(store: Store, key: str) -> Seen:
    """Where a stage stands.

    A process on another machine counts as one that lives: its note is all that can be seen.
    """
    part = store.stages / f"{key}.part"
    if (store.stages / key / MANIFEST).is_file():
        return Seen("done")
    if note := _json(part / "holder.json"):
        who = f"process {note.get('pid')} on {note.get('host')}"
        return Seen("held" if _lives(note) else "abandoned", who)
    if note := _json(part / "error.json"):
        return Seen("failed", str(note.get("error")), str(note.get("time", "")))
    return Seen("stopped" if (part / CHECKPOINT).is_file() else "nothing")


def read_again(store: Store, run: Run) -> tuple[Run, str]:
    """A run as its file has it now, for an automatic ladder grows; and when it was last begun."""
    try:
        raw = read_run_file(store.reports / run.run / "run.json")
    except (OSError, TornFileError):
        return run, ""
    return Run.from_dict(raw), str(raw.get("touched", ""))


def _json(path: Path) -> dict[str, Any]:
    """Empty for a file that is not there, or is being removed."""
    try:
        return read_json(path)
    except (OSError, TornFileError):
        return {}


def _lives(note: Mapping[str, Any]) -> bool:
    if note.get("host") != platform.node():
        return True
    try:
        os.kill(int(note["pid"]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True

"""One process at a time for a stage, and a note beside it that says which."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import Interrupted
from .files import TornFileError, now, read_json, write_json

POLL_SECONDS = 0.3


@dataclass(frozen=True)
class StageLock:
    """A lock that dies with its holder (flock), however that ends.

    Attributes:
        path: the locked file; its content means nothing.
        note: where the holder says who it is.
    """

    path: Path
    note: Path

    def hold(self, *, waiting: Callable[[str], None], stop: Callable[[], int | None]) -> FileLock:
        """Takes the lock, however long another process has it.

        Args:
            waiting: called once, with the holder in words, where another process has it.
            stop: looked at while waiting.

        Raises:
            Interrupted: `stop` gave a signal's number.
        """
        held = self.try_to_hold()
        if held is None:
            waiting(self.holder() or "another process")
        while held is None:
            if (number := stop()) is not None:
                raise Interrupted(number)
            held = self.try_to_hold(POLL_SECONDS)
        return held

    def try_to_hold(self, seconds: float = 0.0) -> FileLock | None:
        """Takes the lock if that is possible within some seconds."""
        lock = FileLock(self.path)
        try:
            lock.acquire(timeout=seconds)
        except Timeout:
            return None
        return lock

    def sign(self) -> None:
        """Notes this process as the holder."""
        with suppress(OSError):  # no space for a note is not what a stage should fail of
            write_json(self.note, {"pid": os.getpid(), "host": platform.node(), "since": now()})

    def release(self, held: FileLock) -> None:
        """Lets the lock go."""
        self.note.unlink(missing_ok=True)
        held.release()

    def holder(self) -> str | None:
        """The process that has the lock, in words; None if nobody has it."""
        if not self.path.exists():
            return None
        unnamed: str | None = "another process"
        try:
            held = self.try_to_hold()
        except OSError:  # a read-only store: only the note can tell
            held, unnamed = None, None
        if held is not None:
            held.release()
            return None
        try:
            facts = read_json(self.note)
            return f"process {facts['pid']} on {facts['host']}"
        except (OSError, TornFileError, KeyError):
            return unnamed

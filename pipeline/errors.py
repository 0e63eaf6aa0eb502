"""The errors that reach the command line, each with the exit code it ends in.

Arguments stay in `args`, so every one of them survives pickling between processes.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import ClassVar


class BitladderError(Exception):
    """Something that a person can act on: shown as its message, without a traceback."""

    exit_code: int = 1


class ConfigError(BitladderError, ValueError):
    """Bad input. Holds every error at once; `str` gives one a line."""

    exit_code: int = 2

    def __init__(self, errors: list[str]) -> None:
        super().__init__(errors)
        self.errors = list(errors)

    def __str__(self) -> str:
        return "\n".join(self.errors)


class StageError(BitladderError):
    """A stage failed: which one, why, and what to do next."""

    def __init__(self, stage: str, cause: str, hint: str = "") -> None:
        super().__init__(stage, cause, hint)
        self.stage = stage
        self.cause = cause
        self.hint = hint

    def __str__(self) -> str:
        message = f"stage {self.stage!r} failed: {self.cause}"
        return f"{message}\n{self.hint}" if self.hint else message


class Diverged(StageError):
    """A stage whose loss is not finite any more: its settings are to blame, not the machine."""


class Interrupted(BitladderError):
    """SIGINT or SIGTERM arrived and the state was saved; exits 130 or 143."""

    SIGNALS: ClassVar[dict[int, str]] = {2: "SIGINT", 15: "SIGTERM"}

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number  # what a shell reports for a process so ended

    def __str__(self) -> str:
        name = self.SIGNALS.get(self.signal_number, f"signal {self.signal_number}")
        return f"interrupted by {name}"


class StoreError(BitladderError):
    """The store cannot be used: read-only, full, from a newer version, or damaged."""

    exit_code: int = 2

    def __init__(self, message: str, *, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def store_problem(root: Path, error: OSError) -> str:
    """What a failed write means for a user, and the way out."""
    if error.errno == errno.ENOSPC:
        return (
            f"no space left for the store {root}; free some "
            "(bitladder clean removes what no ladder needs)"
        )
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"the store {root} cannot be written ({error.strerror}); give another with --store"
    return f"the store {root} cannot be used: {error.strerror or error}"

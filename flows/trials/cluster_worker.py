"""What a worker of a cluster does: one trial, until it is over or the study is."""

from __future__ import annotations

import contextlib
import platform
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...pipeline.events import Event
from .run_trial import Outcome, Request, run_trial

LOOK_SECONDS = 1.0  # between two looks whether the study still runs
_ONE = threading.Lock()  # threads of one process share PyTorch's global generator


def run_in_cluster(request: Mapping[str, Any], lease: str, folder: str) -> dict[str, Any]:
    """Runs a trial; gives back its outcome as JSON values.

    Args:
        lease: a file that the process that runs the study has locked as long as it wants this.
        folder: the working folder that paths in the config are relative to.
    """
    try:
        with _ONE, contextlib.chdir(folder):
            outcome = run_trial(Request(**request), _ignore, stop_without(Path(lease)))
    except OSError as error:
        where = f"{platform.node()} does not see {error.filename}"
        outcome = Outcome("failed", f"{where}: {error.strerror}")
    return asdict(outcome)


def dask_setup(_worker: object) -> None:
    """Dask calls this as a worker of ours begins: Ctrl-C is for the study, which then stops it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def stop_without(lease: Path) -> Callable[[], int | None]:
    """A question for a training step: SIGTERM's number once nobody has the lease any more."""
    from filelock import FileLock, Timeout

    looked, stopped = time.monotonic(), False

    def stop() -> int | None:
        nonlocal looked, stopped
        if not stopped and time.monotonic() - looked >= LOOK_SECONDS:
            looked = time.monotonic()
            stopped = not lease.exists() or _is_free(lease)
        return signal.SIGTERM.value if stopped else None

    def _is_free(path: Path) -> bool:
        try:
            with FileLock(path, timeout=0):
                return True
        except Timeout:
            return False

    return stop


def _ignore(_event: Event) -> None:
    """Who runs the study reads the store."""

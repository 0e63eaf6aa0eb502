"""Ends what a killed study leaves of its cluster: some of Ray's processes would live on for long.

Run as a module this file is a process that does nothing while the one that started it lives; only
the standard library.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

MARK = "BITLADDER_CLUSTER"  # in the environment of every process of the cluster
SECONDS = 3.0  # so that what was just being started is found as well


@contextlib.contextmanager
def reaped() -> Iterator[None]:
    """Processes begun in this context are killed, with all that they begin, if this one is."""
    token = secrets.token_hex(8)
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", __name__, token],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is not for it
    )
    assert process.stdin is not None
    os.environ[MARK] = token
    os.environ["SPT_NOENV"] = "1"  # keeps Ray's processes from writing their title over it
    try:
        yield
    finally:
        del os.environ[MARK], os.environ["SPT_NOENV"]
        with contextlib.suppress(OSError):
            process.stdin.write(b"all is well")
            process.stdin.close()
        process.wait()


def reap(token: str) -> int:
    """Kills every process with this mark; gives back how many there were."""
    mark, found = f"{MARK}={token}".encode(), 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                os.kill(int(folder.name), signal.SIGKILL)
                found += 1
    return found


def main(token: str) -> None:
    """Waits for the end of whoever holds the other end of standard input."""
    if sys.stdin.buffer.read():
        return
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        reap(token)
        time.sleep(0.2)


if __name__ == "__main__":
    main(sys.argv[1])

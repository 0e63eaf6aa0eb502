"""A `bitladder` command as a child process whose phases and processes are watched from outside."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

BITLADDER = str(Path(sys.executable).with_name("bitladder"))
START_UP, FINISHED = "start-up", "finished"
_PHASE = re.compile(r"^[\d-]+ [\d:,]+ phase (.+)$")  # a debug line of `bitladder -v`
_MARK = "BENCHMARK_STORE"  # in the environment of the command, and so of all that it starts

Process = tuple[int, str]  # process id and start time: an id alone may be given again


class WatchedRun:
    """`bitladder ARGUMENTS --store STORE -v` in a session of its own, its pipes read by threads.

    Attributes:
        phases: (seconds since the start, phase), in order; the first is `START_UP`, and
            `FINISHED` begins with the first line of the table.
        lines: what was said on both pipes.
    """

    def __init__(self, arguments: Sequence[str], store: Path) -> None:
        self.store = store
        self.lines: list[str] = []
        self.phases: list[tuple[float, str]] = [(0.0, START_UP)]
        self._changed = threading.Condition()
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            [BITLADDER, *arguments, "--store", str(store), "-v"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, _MARK: str(store)},
            text=True,
        )
        pipes = (self.process.stdout, self.process.stderr)
        self._readers = [threading.Thread(target=self._read, args=(p,), daemon=True) for p in pipes]
        for reader in self._readers:
            reader.start()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.began

    @property
    def phase(self) -> str:
        """The phase that began last."""
        return self.phases[-1][1]

    @property
    def pipes_ended(self) -> bool:
        """Whether nobody holds the writing end of either pipe."""
        return not any(reader.is_alive() for reader in self._readers)

    def finish(self) -> int:
        """Waits for the end; gives back the exit code."""
        code = self.process.wait()
        for reader in self._readers:
            reader.join()
        return code

    def wait_until(self, seconds: float) -> bool:
        """Waits until so long after the start; False if the command ended before."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(max(seconds - self.seconds, 0))
        return self.process.returncode is None

    def wait_for_phase(self, beginning: str) -> bool:
        """Waits until such a phase begins; False if the command ended before."""
        seen = len(self.phases)
        with self._changed:
            while not any(phase.startswith(beginning) for _, phase in self.phases[seen:]):
                if self.process.poll() is not None:
                    return False
                self._changed.wait(0.1)
        return True

    def wait_for_file(self, path: Path) -> bool:
        """Waits until a file is there and not empty; False if the command ended before."""
        while self.process.poll() is None:
            with contextlib.suppress(OSError):
                if path.stat().st_size:
                    return True
            time.sleep(0.0005)
        return False

    def kill(self) -> set[Process]:
        """Kills the command alone, with SIGKILL; gives back all that it had started till then."""
        tree = set(_descendants(self.process.pid))
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()
        return tree

    def left(self, tree: set[Process]) -> set[Process]:
        """Processes that live on: of the tree, of the session, or started under this store."""
        store = str(self.store).encode()
        return {
            (pid, start)
            for pid, _, session, start in _processes()
            if (pid, start) in tree
            or session == self.process.pid
            or any(store in _content(pid, file) for file in ("environ", "cmdline"))
        }

    def _read(self, pipe: IO[str]) -> None:
        for line in pipe:
            with self._changed:
                self.lines.append(line.rstrip("\n"))
                if match := _PHASE.match(line):
                    self.phases.append((self.seconds, match[1]))
                elif pipe is self.process.stdout and self.phase != FINISHED:
                    self.phases.append((self.seconds, FINISHED))
                self._changed.notify_all()


def _processes() -> Iterator[tuple[int, int, int, str]]:
    """Process id, its parent's, session, and start time of all that live; zombies do not."""
    for entry in os.listdir("/proc"):
        if not entry.isdecimal():
            continue
        # pid (name) state ppid pgrp session ... ; the name may hold spaces and brackets
        _, _, rest = _content(int(entry), "stat").decode(errors="replace").rpartition(") ")
        fields = rest.split()
        if fields and fields[0] not in "ZX":
            yield int(entry), int(fields[1]), int(fields[3]), fields[19]


def _descendants(root: int) -> Iterator[Process]:
    children: dict[int, list[Process]] = {}
    for pid, parent, _, start in _processes():
        children.setdefault(parent, []).append((pid, start))
    waiting = [root]
    while waiting:
        for child in children.get(waiting.pop(), []):
            yield child
            waiting.append(child[0])


def _content(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:  # it has ended, or is somebody else's
        return b""

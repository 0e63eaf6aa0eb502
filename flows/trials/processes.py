"""Workers that are processes of this machine. Run as a module this file is one of them.

A worker ends with the process that started it, however that ends; so the first thing that it
does, before anything heavy is imported, is to tie its life to its parent's.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING

from ...pipeline.events import Event
from ...pipeline.interruption import Interruption
from ...pipeline.parent_death import die_with
from .run_trial import Outcome, run_trial

if TYPE_CHECKING:
    from .dispatch import Task

END_SECONDS = 3.0  # for a worker without a trial; it needs some milliseconds


@dataclass(eq=False)
class Worker:
    """A process that runs one trial after the other."""

    process: subprocess.Popen[bytes]
    connection: Connection
    task: Task | None = None


class Processes:
    """A crew of processes on this machine; leaving the context ends them all.

    Enter it from the main thread: the kernel ends the workers with the thread that started them.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._workers: list[Worker] = []

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        idle = [worker for worker in self._workers if worker.task is None]
        for worker in self._workers:
            worker.connection.close()  # a worker without a trial ends of it
        for worker in idle:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(END_SECONDS)
        for worker in list(self._workers):
            self._kill(worker)

    def start(self, task: Task) -> None:
        """See `Crew`."""
        idle = next((worker for worker in self._workers if worker.task is None), None)
        worker = idle or self._new_worker()
        worker.task = task
        try:
            worker.connection.send(task.request)
        except OSError:  # it died without a trial: a new one takes this
            self._kill(worker)
            self.start(task)

    def wait(self, seconds: float) -> Iterator[tuple[Task, Event | Outcome]]:
        """See `Crew`."""
        ready = wait([worker.connection for worker in self._workers if worker.task], seconds)
        for worker in [worker for worker in self._workers if worker.connection in ready]:
            task = worker.task
            assert task is not None
            try:
                told = worker.connection.recv()
            except (EOFError, OSError):
                told = self._death(worker)
            if isinstance(told, Outcome):
                worker.task = None
            yield task, told

    def stop(self) -> None:
        """See `Crew`."""
        for worker in self._workers:
            worker.process.send_signal(signal.SIGTERM)

    def _new_worker(self) -> Worker:
        ours, theirs = Pipe()
        with theirs:
            process = subprocess.Popen(
                # -P: a `models/` in the working folder is not to be imported for ours
                [sys.executable, "-P", "-m", __name__, str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,  # standard output is for the tables
                start_new_session=True,  # Ctrl-C is for the study, which then stops its workers
            )
        worker = Worker(process, ours)
        self._workers.append(worker)
        ours.send((sys.path, logging.getLogger("bitladder").level))
        return worker

    def _death(self, worker: Worker) -> Outcome:
        code = self._kill(worker)
        if code == -signal.SIGTERM:  # it was asked to stop before it could note that
            return Outcome("interrupted")
        how = f"with code {code}"
        if code < 0:
            how = f"by {signal.Signals(-code).name}"
            how += ": was there not enough memory?" if code == -signal.SIGKILL else ""
        return Outcome("failed", f"its process ended {how}")

    def _kill(self, worker: Worker) -> int:
        self._workers.remove(worker)
        worker.connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.process.wait(0.2)  # so that one that has ended gives its own code
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.process.pid, signal.SIGKILL)  # its loaders too
        return worker.process.wait()


# From here on, what runs in a worker.


def main(descriptor: int, parent: int) -> None:
    """Runs the trials that come through the connection until it closes."""
    die_with(parent)
    os.set_inheritable(descriptor, False)
    with Interruption() as stop, Connection(descriptor) as connection:
        sys.path[:], level = connection.recv()
        logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
        logging.getLogger("bitladder").setLevel(level)
        while stop() is None:
            try:
                request = connection.recv()
            except EOFError:
                return
            stopped = stop() is not None
            told = Outcome("interrupted") if stopped else run_trial(request, connection.send, stop)
            connection.send(told)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
    logging.shutdown()
    os._exit(0)  # taking torch apart may take seconds

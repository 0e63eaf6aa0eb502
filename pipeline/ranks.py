"""The processes of one stage on several devices, seen from the one that started them.

PyTorch's elastic launcher starts and watches them, in a thread; each reports over a socket here.
The first that fails fails the stage, in its own words, and the others are killed: they would wait
for it in the next exchange of gradients.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any

from .config import RunConfig
from .errors import BitladderError, Diverged, Interrupted, StageError
from .rank_work import Done, Failed, Job, Told
from .stages import StageContext, StageOutput

log = logging.getLogger(__name__)
PROGRAM = "bitladder.pipeline.rank"
LOOK_SECONDS = 0.1  # between two looks at signals
END_SECONDS = 35.0  # the launcher needs less than one
HEAR_SECONDS = 2.0  # after a first failure: a dead process may be noticed by another before us


def on_several_devices(context: StageContext, config: RunConfig) -> StageOutput:
    """Runs a stage in as many processes as it has devices.

    Raises:
        StageError, Interrupted: see `Ranks.run`.
    """
    around, store = context.around, context.store
    job = Job(
        spec=context.spec,
        stage=context.stage,
        data=(config.data.name, json.dumps(config.data.options, sort_keys=True)),
        store=(store.root, store.url),
        parents=context.parents,
        device=context.device.type,
        keep_freed_memory=config.runtime.keep_freed_memory,
        name=around.name,
        checkpoint_seconds=around.checkpoint_seconds,
        started=around.started,
        resumes=context.resume is not None,
        weights=context.weights,
        charts=around.charts,
    )
    log.debug("phase start of %d processes", context.stage.train.devices)
    with Ranks(context.stage.train.devices) as ranks:
        return ranks.run(job, around.notify, around.stop)


class Ranks:
    """So many processes for one stage; leaving the context ends them all.

    Enter it from a thread that outlives the context.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self._folder = tempfile.TemporaryDirectory(prefix="bitladder-")
        self._door = socket.socket(socket.AF_UNIX)
        self._connections: dict[int, Connection[Any, Any]] = {}
        self._pids: dict[int, int] = {}
        self._through: set[int] = set()
        self._end: BaseException | None = None
        # the kernel ends processes with the thread that started them: this one waits for them
        self._launcher = threading.Thread(target=self._launch, name="launcher", daemon=True)

    def __enter__(self) -> Ranks:
        self._door.bind(self._address)
        self._door.listen(self.number)
        self._launcher.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._door.close()  # one that is only starting finds nobody here, and ends
        if kind is not None:
            self._kill()
        self._launcher.join(END_SECONDS)
        for connection in self._connections.values():
            connection.close()
        self._folder.cleanup()

    def run(
        self, job: Job, notify: Callable[..., None], stop: Callable[[], int | None]
    ) -> StageOutput:
        """What the first process gives, once all are through.

        Args:
            notify, stop: see `Surroundings`; called in this thread.

        Raises:
            StageError: a process failed or died; the message says which.
            Interrupted: `stop` gave a signal's number, and the state is saved.
        """
        asked: int | None = None
        output: StageOutput | None = None
        failures: list[tuple[float, int, BitladderError | None]] = []
        heard = math.inf  # when failures are settled
        while len(self._through) < self.number and time.monotonic() < heard:
            if asked is None and (asked := stop()) is not None and 0 in self._connections:
                self._tell_first(asked)
            for rank, told in self._news(job, asked):
                if isinstance(told, Told):
                    notify(**told.fields)
                    continue
                self._through.add(rank)
                if isinstance(told, Done):
                    output = told.output if rank == 0 else output
                elif told is None:
                    failures.append((0.0, rank, None))  # it died before others could notice
                elif rank == 0 or not isinstance(told.error, Interrupted):  # the first one saves
                    failures.append((told.at, rank, told.error))
            if failures:
                heard = min(heard, time.monotonic() + HEAR_SECONDS)
            elif not self._launcher.is_alive() and len(self._connections) < self.number:
                raise self._no_start(job.name)
        if failures:
            _, rank, error = min(failures, key=lambda failure: failure[:2])
            raise self._death(rank, job.name) if error is None else self._said(rank, error)
        assert output is not None
        return output

    def _news(
        self, job: Job, asked: int | None
    ) -> Iterator[tuple[int, Told | Done | Failed | None]]:
        """What the processes tell within a moment; None of one that is gone."""
        open_ = {c: r for r, c in self._connections.items() if r not in self._through}
        for ready in wait([self._door, *open_], LOOK_SECONDS):
            if ready is self._door:
                self._admit(job, asked)
                continue
            assert isinstance(ready, Connection)
            try:
                yield open_[ready], ready.recv()
            except (EOFError, OSError):
                yield open_[ready], None

    def _admit(self, job: Job, asked: int | None) -> None:
        visitor, _ = self._door.accept()
        connection: Connection[Any, Any] = Connection(visitor.detach())
        with contextlib.suppress(EOFError, OSError):  # it died: the launcher notices
            rank, pid = connection.recv()
            self._connections[rank], self._pids[rank] = connection, pid
            connection.send((sys.path, logging.getLogger("bitladder").level))
            connection.send(job)
            if rank == 0 and asked is not None:
                self._tell_first(asked)

    def _tell_first(self, number: int) -> None:
        with contextlib.suppress(OSError):
            self._connections[0].send(number)

    def _said(self, rank: int, error: BitladderError) -> BitladderError:
        """The error of a process, with its number where that may matter."""
        if isinstance(error, Diverged) or not isinstance(error, StageError):
            return error  # it is the same in all of them
        return StageError(error.stage, f"{self._named(rank)}: {error.cause}", error.hint)

    def _death(self, rank: int, stage: str) -> StageError:
        self._kill()
        self._launcher.join(END_SECONDS)
        failure = getattr(self._end, "failures", {}).get(rank)
        ended = "" if failure is None else _how(failure.exitcode)
        return StageError(stage, f"{self._named(rank)}: its process ended{ended}")

    def _no_start(self, stage: str) -> StageError:
        failures = getattr(self._end, "failures", {})
        if not failures:
            cause = f"{type(self._end).__name__}: {str(self._end).partition(chr(10))[0]}"
            return StageError(stage, f"its processes could not be started: {cause}")
        rank = min(failures)
        ended = _how(failures[rank].exitcode)
        return StageError(stage, f"{self._named(rank)}: its process ended{ended} at its start")

    def _named(self, rank: int) -> str:
        return f"rank {rank} of {self.number}"

    def _kill(self) -> None:
        for pid in self._pids.values():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)  # its loaders too

    @property
    def _address(self) -> str:
        return str(Path(self._folder.name) / "door")

    def _launch(self) -> None:
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        _quieten_launcher()
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=self.number,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=self._folder.name),
        )
        try:
            # -P: a `models/` in the working folder is not to be imported for ours
            launch = elastic_launch(config, sys.executable)
            launch("-P", "-m", PROGRAM, self._address, os.getpid())
        except BaseException as error:
            self._end = error


def _how(code: int) -> str:
    if code >= 0:
        return f" with code {code}"
    memory = ": was there not enough memory?" if code == -signal.SIGKILL else ""
    return f" by {signal.Signals(-code).name}{memory}"


def _quieten_launcher() -> None:
    """Its failures are told in our words; all that it logs comes with --verbose."""
    if logging.getLogger("bitladder").getEffectiveLevel() > logging.DEBUG:
        launcher = logging.getLogger("torch.distributed.elastic")
        launcher.propagate = False
        launcher.addHandler(logging.NullHandler())

"""Workers on Dask or Ray, through Prefect's task runners: a task for each trial.

Whether a stage is done is the store's answer, so all workers must see the store under the same
path. They train in threads of processes that are not ours, where no signal of ours arrives. What
makes them stop is a lock in the study's folder: once the process that runs the study lets it go,
in whatever way, every trial saves what it has and ends.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from ...pipeline.errors import BitladderError
from ...pipeline.events import Event
from ...pipeline.history import last_epoch
from ...pipeline.store import Store
from ..prefect_manners import SigtermHandler, drained, quiet
from ..prefect_server import configured_url, quieten_prefect, temporary_api
from . import cluster_worker
from .dispatch import Crew, Task
from .reaper import reaped
from .run_trial import Outcome

T = TypeVar("T")
LOOK_SECONDS = 1.0  # between two looks at the store for what the trials have come to


def address_mistakes(address: str | None) -> list[str]:
    """What a cluster at an address needs and does not have."""
    if address is None or _is_here(address) or configured_url() is not None:
        return []
    return [
        f"--address {address}: its workers report to a Prefect server, so they must reach one; "
        "start it (prefect server start --host 0.0.0.0) and set PREFECT_API_URL"
    ]


def run_on_cluster(
    kind: str,
    study: str,
    folder: Path,
    size: int,
    address: str | None,
    store: Store,
    dispatch: Callable[[Crew], T],
) -> T:
    """Gives `dispatch` a crew on a cluster, within one flow run named as the study.

    Args:
        kind: "dask" or "ray".
        folder: of the study; all workers see it under this path.
        size: how many trials run at a time; a cluster of our own has as many workers.
        address: of a cluster that runs; None: one of our own on this machine, as long as it lasts.

    Raises:
        BitladderError, KeyboardInterrupt: as `dispatch` raises it; or the cluster failed.
    """
    quieten_prefect()
    with temporary_api(folder) as api:
        url = api.wait()
        from prefect import flow
        from prefect import tags as tagged
        from prefect.settings import PREFECT_API_URL, temporary_settings

        ended: list[T] = []
        causes: list[BaseException] = []
        sigterm = SigtermHandler()

        def work() -> None:
            try:
                with sigterm.installed(), _lease(folder) as lease:
                    ended.append(dispatch(ClusterCrew(size, store, lease)))
            except BaseException as error:
                causes.append(error)
                raise

        run_flow = flow(
            name="study",
            flow_run_name=study.replace("{", "{{").replace("}", "}}"),  # a format string
            task_runner=_task_runner(kind, size, address),
            persist_result=False,
            retries=0,
        )(_run_study)
        settings = temporary_settings({PREFECT_API_URL: url})
        _at_work.append(work)
        try:
            ours = nullcontext() if address else reaped()
            with ours, settings, tagged(study, "bitladder"), quiet(), drained():
                run_flow()
        except BaseException as error:
            cause = causes[0] if causes else error
            if not isinstance(cause, Exception) or isinstance(cause, BitladderError):
                raise cause from None
            if not ended:
                raise BitladderError(
                    f"{kind} or Prefect failed ({type(cause).__name__}: {cause}); "
                    "--runner processes runs the same study without them"
                ) from cause
        finally:
            _at_work.pop()
        return ended[0]


_at_work: list[Callable[[], None]] = []  # a flow goes to the workers, so this is not a part of it


def _run_study() -> None:
    _at_work[-1]()


class ClusterCrew:
    """A crew of Prefect tasks; lives inside a flow whose task runner has the cluster."""

    def __init__(self, size: int, store: Store, lease: FileLock) -> None:
        from prefect import task
        from prefect.cache_policies import NO_CACHE

        self.size = size
        self._store, self._lease = store, lease
        decorate = task(name="trial", cache_policy=NO_CACHE, persist_result=False, retries=0)
        self._submit = decorate(cluster_worker.run_in_cluster)
        self._running: dict[Any, Task] = {}  # Prefect's futures
        self._there: dict[int, int] = {}  # how many stages were done when the trial began
        self._seen: dict[int, tuple[int, int]] = {}  # stages done, epochs of the next one
        self._looked = 0.0

    def start(self, task: Task) -> None:
        """See `Crew`."""
        self._there[task.number] = self._done(task)
        store = str(self._store.root.resolve())
        request = asdict(replace(task.request, store=store))
        name = task.trial.name.replace("{", "{{").replace("}", "}}")  # a format string
        lease = str(Path(self._lease.lock_file).resolve())
        future = self._submit.with_options(task_run_name=name).submit(request, lease, os.getcwd())
        self._running[future] = task

    def wait(self, seconds: float) -> Iterator[tuple[Task, Event | Outcome]]:
        """See `Crew`."""
        until = time.monotonic() + seconds
        for future, task in list(self._running.items()):
            try:
                told = Outcome(**future.result(timeout=0.05))
            except TimeoutError:
                continue
            except Exception as error:  # the worker died, or Prefect failed
                told = Outcome("failed", f"{type(error).__name__}: {error}")
            del self._running[future]
            yield from self._look(task)
            yield task, told
        if time.monotonic() - self._looked > LOOK_SECONDS:
            self._looked = time.monotonic()
            for task in self._running.values():
                yield from self._look(task)
        time.sleep(max(0.0, until - time.monotonic()))

    def stop(self) -> None:
        """See `Crew`."""
        self._lease.release()

    def _look(self, task: Task) -> Iterator[tuple[Task, Event]]:
        """What has happened to a trial's stages since, as the store shows it."""
        done, epochs = self._seen.get(task.number, (-1, 0))
        stages = task.plan.stages
        now = self._done(task)
        for stage in stages[max(done, 0) : now]:
            record = self._store.read(stage.key)
            kind = "reused" if stage.position < self._there[task.number] else "finished"
            metrics: Mapping[str, Any] = record.metrics if record else {}
            yield task, self._event(task, stage.position, kind, fraction=1.0, metrics=metrics)
        if now < len(stages):
            of = task.trial.config.ladder[now].train.epochs
            epoch = last_epoch(self._store, stages[now].key)
            made = int(epoch.get("epoch", 0))
            about: dict[str, Any] = {
                "epoch": made,
                "epochs": of,
                "fraction": made / of if of else 0.0,
            }
            if now != done:
                yield task, self._event(task, now, "started", **about)
            elif made != epochs:
                about |= {"loss": epoch.get("train_loss"), "accuracy": epoch.get("val_top1")}
                yield task, self._event(task, now, "epoch", **about)
            epochs = made
        self._seen[task.number] = (now, epochs)

    def _done(self, task: Task) -> int:
        stages = task.plan.stages
        return next((s.position for s in stages if not self._store.read(s.key)), len(stages))

    def _event(self, task: Task, position: int, kind: Any, **fields: Any) -> Event:
        name = task.plan.stages[position].name
        return Event(kind, stage=name, position=position, stages=len(task.plan.stages), **fields)


@contextmanager
def _lease(folder: Path) -> Iterator[FileLock]:
    """A lock that is held as long as the trials are to go on."""
    for left in folder.glob(".*.running"):
        with suppress(Timeout), FileLock(left, timeout=0):
            left.unlink(missing_ok=True)  # by a study that was killed
    path = folder / f".{secrets.token_hex(4)}.running"
    with FileLock(path) as lease:
        try:
            yield lease
        finally:
            lease.release()
            path.unlink(missing_ok=True)


def _task_runner(kind: str, size: int, address: str | None) -> Any:
    if kind == "dask":
        os.environ.setdefault("DASK_LOGGING__DISTRIBUTED", "error")
        from prefect_dask.task_runners import DaskTaskRunner

        if address:
            return DaskTaskRunner(address=address)
        own = {
            "n_workers": size,
            "threads_per_worker": 1,  # trials in one process would wait for one another
            "processes": True,
            "memory_limit": 0,  # none: a worker that trains is not one that leaks
            "preload": [cluster_worker.__name__],
            "dashboard_address": "127.0.0.1:0",
            "scheduler_kwargs": {"dashboard": False},
        }
        return DaskTaskRunner(cluster_kwargs=own)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # a trial says itself on which device it trains; Ray would hide all from a task without any
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    from prefect_ray.task_runners import RayTaskRunner

    quiet_ray: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address:
        return RayTaskRunner(address=address, init_kwargs=quiet_ray)
    # else Ray writes one into the user's home
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    own = {"num_cpus": size, "include_dashboard": False, "object_store_memory": 100 * 2**20}
    return RayTaskRunner(init_kwargs={**quiet_ray, **own})


def _is_here(address: str) -> bool:
    host = address.rpartition("://")[2].rpartition(":")[0]
    return host in ("", "localhost", "127.0.0.1", "[::1]")

"""A ladder as a Prefect flow: a task a stage, and artifacts that show how it goes.

Prefect watches; it decides nothing. Whether a stage is done is the store's answer, so no result
is cached or persisted here, and a server that goes away takes nothing with it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

from ..pipeline.errors import Interrupted
from ..pipeline.events import Event, Listener
from .prefect_manners import SigtermHandler, drained, quiet
from .prefect_server import quieten_prefect
from .progress import broadcast, describe, filled, heading, throttled

log = logging.getLogger(__name__)
ARTIFACT_SECONDS = 5.0  # between two updates of a progress artifact; one costs 7 ms

Stage = dict[str, Any]  # JSON values; "name" is required
Record = dict[str, Any]
RunOne = Callable[[Stage, Listener], Record]


def run_flow(
    run_id: str,
    store: str,
    stages: Sequence[Stage],
    run_one: RunOne,
    *,
    api_url: str,
    later: Iterable[Stage] = (),
    listener: Listener = lambda event: None,
    tags: Sequence[str] = (),
) -> list[Record]:
    """Runs the stages in order as one flow run named `run_id`; gives back their records.

    A Prefect that fails on the way costs a warning, and the ladder goes on without it. Call
    from the main thread: stages run in it, under the signal handlers that are installed now.

    Args:
        store: where the store is, shown among the flow run's parameters.
        run_one: runs one stage, telling the listener it is given; called in this process.
        api_url: the Prefect API to report to, see `prefect_server.temporary_api`.
        later: further stages, each asked for when those before it are done.
        listener: hears all events of all stages.
        tags: of the flow run, besides the run's id and "bitladder".

    Raises:
        Whatever `run_one` raises, the same object, after Prefect has recorded it.
        Interrupted: SIGTERM came while Prefect itself was at work.
    """
    quieten_prefect()
    from prefect import flow, task
    from prefect import tags as tagged
    from prefect.cache_policies import NO_CACHE
    from prefect.context import TagsContext
    from prefect.exceptions import TerminationSignal
    from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    settings = temporary_settings(
        {PREFECT_API_URL: api_url},
        # Prefect's five would hold training up for a minute at each call to a dead server
        set_defaults={PREFECT_CLIENT_MAX_RETRIES: 2},
    )
    records: list[Record] = []
    causes: list[BaseException] = []
    coming = _Coming(chain(stages, later), causes)
    artifacts = _Artifacts(run_id)
    hear = broadcast(listener, artifacts)
    sigterm = SigtermHandler()

    @task(name="stage", cache_policy=NO_CACHE, persist_result=False, retries=0)
    def stage(stage: Stage, store: str) -> Record:
        try:
            record = run_one(stage, hear)
        except BaseException as error:
            causes.append(error)
            raise
        records.append(record)
        artifacts.stage_done(len(records) - 1, stage["name"], record)
        return record

    @flow(name="ladder", flow_run_name=lambda: run_id, persist_result=False, retries=0)
    def ladder(run_id: str, store: str, stages: list[Stage]) -> None:
        # tags on tasks are concurrency limits: the server would be asked for a slot at each
        with sigterm.installed(), TagsContext(current_tags=set()):
            while (spec := coming.stage(len(records))) is not None:
                name = f"{len(records)}-{spec['name']}".replace("{", "{{").replace("}", "}}")
                stage.with_options(task_run_name=name)(spec, store)  # a format string

    try:
        with settings, tagged(run_id, "bitladder", *tags), quiet(), drained():
            ladder(run_id, store, list(stages))
    except TerminationSignal as error:
        if coming.stage(len(records)) is not None:
            raise Interrupted(error.signal) from None
    except BaseException as error:
        if causes and error is not causes[0]:
            raise causes[0] from None
        if causes or not isinstance(error, Exception):
            raise
        log.warning("Prefect failed (%s); the ladder goes on without it", error)
    while (spec := coming.stage(len(records))) is not None:
        records.append(run_one(spec, listener))
    return records


class _Coming:
    """The stages that come, of which each is asked for once, when those before it are done."""

    def __init__(self, stages: Iterable[Stage], causes: list[BaseException]) -> None:
        self._stages = iter(stages)
        self._causes = causes
        self._last: tuple[int, Stage | None] = (-1, None)

    def stage(self, position: int) -> Stage | None:
        """The stage at the position, which is that of the last call or the next; None: no more.

        What goes wrong in finding it is noted among the causes: it is not Prefect's failure.
        """
        if position > self._last[0]:
            try:
                self._last = (position, next(self._stages, None))
            except BaseException as error:
                self._causes.append(error)
                raise
        return self._last[1]


class _Artifacts:
    """Shows a run's stages as Prefect artifacts: a listener.

    Never raises: at the first failure it warns, and stays silent from then on.
    """

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._rows: list[dict[str, Any]] = []
        self._row: Mapping[str, Any] = {}
        self._progress: Any = None
        self._works = True
        self._tell = filled(throttled(self._show, seconds=ARTIFACT_SECONDS))

    def __call__(self, event: Event) -> None:
        self._tell(event)  # training waits meanwhile: 7 ms every `ARTIFACT_SECONDS`

    def stage_done(self, position: int, name: str, record: Record) -> None:
        """Writes the table of all rows so far and the stage's own page."""
        from prefect.artifacts import create_markdown_artifact, create_table_artifact

        row = _scalars(self._row or record)
        self._rows.append({"stage": name, **row})
        self._row = {}
        table, page = [dict(row) for row in self._rows], _markdown(f"{self._run_id}: {name}", row)
        stage = f"{position}-{name}"
        self._try(create_table_artifact, table, key=self._key(stage, "table"))
        self._try(create_markdown_artifact, page, key=self._key(stage, "report"))

    def _show(self, event: Event) -> None:
        from prefect import get_run_logger
        from prefect.artifacts import create_progress_artifact, update_progress_artifact

        self._try(lambda: get_run_logger().info(describe(event)))
        if event.kind in ("finished", "reused"):
            self._row = event.metrics
        percent = 100.0 if event.kind == "finished" else 100 * event.fraction
        if event.kind == "started":
            key = self._key(f"{event.position}-{event.stage}", "progress")
            self._progress = self._try(
                create_progress_artifact, percent, key=key, description=heading(event)
            )
        elif event.kind in ("step", "epoch", "finished") and self._progress is not None:
            self._try(
                update_progress_artifact, self._progress, percent, description=describe(event)
            )

    def _key(self, *words: str) -> str:
        return re.sub(r"[^a-z0-9]+", "-", "-".join([self._run_id, *words]).lower()).strip("-")

    def _try(self, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if not self._works:
            return None
        try:
            return call(*args, **options)
        except Exception as error:
            self._works = False  # for good: each further call would wait for a dead server
            log.warning("Prefect takes no artifacts (%s); the ladder goes on", error)
            return None


def _scalars(row: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if isinstance(v, str | int | float | bool | None)}


def _markdown(title: str, row: Mapping[str, Any]) -> str:
    lines = [f"| {name} | {_cell(name, value)} |" for name, value in row.items()]
    return "\n".join([f"## {title}", "", "| | |", "|---|---|", *lines, ""])


def _cell(name: str, value: Any) -> str:
    if isinstance(value, float):
        return f"{100 * value:.2f} %" if "top1" in name or "top5" in name else f"{value:.6g}"
    return str(value).replace("|", "\\|").replace("\n", " ")

"""A ladder as a Prefect flow: a task a stage.

Prefect watches; it decides nothing. Whether a stage is done is the store's answer, so no result
is cached or persisted here, and a server that goes away takes nothing with it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

from ..pipeline.errors import Interrupted
from ..pipeline.events import Event, Listener
from ..pipeline.store import Store
from .prefect_artifacts import Artifacts
from .prefect_manners import SigtermHandler, drained, quiet
from .prefect_server import quieten_prefect
from .progress import broadcast, heading

log = logging.getLogger(__name__)

Stage = dict[str, Any]  # JSON values; "name" is required
Record = dict[str, Any]
RunOne = Callable[[Stage, Listener], Record]


def run_flow(
    run_id: str,
    store: Store,
    stages: Sequence[Stage],
    run_one: RunOne,
    *,
    api_url: str,
    total: int = 0,
    later: Iterable[Stage] = (),
    listener: Listener = lambda event: None,
    tags: Sequence[str] = (),
) -> list[Record]:
    """Runs the stages in order as one flow run named `run_id`; gives back their records.

    A Prefect that fails on the way costs a warning, and the ladder goes on without it. Call
    from the main thread: stages run in it, under the signal handlers that are installed now.

    Args:
        store: what is shown of the run is read from there.
        run_one: runs one stage, telling the listener it is given; called in this process.
        api_url: the Prefect API to report to, see `prefect_server.temporary_api`.
        total: how many stages the ladder has; 0 while that depends on results.
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
    artifacts = Artifacts(run_id, store)
    hear = broadcast(listener, artifacts)
    sigterm = SigtermHandler()

    @task(name="rung", cache_policy=NO_CACHE, persist_result=False, retries=0)
    def stage(stage: Stage, store: str) -> Record:
        position = len(records)
        try:
            record = run_one(stage, hear)
        except BaseException as error:
            causes.append(error)
            artifacts.stage_failed(position, stage["name"], error)
            raise
        records.append(record)
        artifacts.stage_done(position, stage["name"])
        return record

    @flow(name="ladder", flow_run_name=lambda: run_id, persist_result=False, retries=0)
    def ladder(run_id: str, store: str, stages: list[Stage]) -> None:
        # tags on tasks are concurrency limits: the server would be asked for a slot at each
        with sigterm.installed(), TagsContext(current_tags=set()):
            artifacts.begin()
            while (spec := coming.stage(len(records))) is not None:
                name = heading(Event("started", spec["name"], len(records), total))
                template = f"{name} of {run_id}".replace("{", "{{").replace("}", "}}")
                stage.with_options(task_run_name=template)(spec, store)

    try:
        with settings, tagged(run_id, "bitladder", *tags), quiet(), drained():
            ladder(run_id, str(store.root.resolve()), list(stages))
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

"""Starts a ladder, with Prefect or without, and leaves its reports beside it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

from ..pipeline.config import RunConfig
from ..pipeline.errors import BitladderError, ConfigError, Interrupted, StoreError
from ..pipeline.events import Listener
from ..pipeline.interruption import Interruption
from ..pipeline.report import REPORTS, accuracy_report, write_report
from ..pipeline.resume_command import resume_command
from ..pipeline.run import Run
from ..pipeline.runner import Ladder, open_ladder, run_ladder, run_stage, stages_in_turn
from ..pipeline.spec import Plan, PlannedStage
from ..pipeline.store import Store
from .prefect_ladder import run_flow
from .prefect_server import temporary_api

log = logging.getLogger(__name__)
RUNNERS = ("prefect", "plain")


def launch(config: RunConfig, store: Store, *, runner: str, listener: Listener) -> Run:
    """Runs what is not done of a ladder; gives back the run.

    A finished ladder starts nothing: neither training nor Prefect.

    Raises:
        ConfigError, StageError, Interrupted, StoreError: see `pipeline.runner.run_ladder`; where
            the ladder can go on, a note on the error says with which command.
    """
    if runner not in RUNNERS:
        raise ConfigError([f"unknown runner {runner!r}; known: {', '.join(RUNNERS)}"])
    ladder = open_ladder(config, store, listener)
    run = store.run(ladder.plan.run)
    try:
        if runner == "plain" or ladder.finished:
            run_ladder(ladder)
        else:
            _run_in_prefect(ladder)
    except BitladderError as error:
        if isinstance(error, Interrupted):
            error.add_note(f"stopped, and saved; go on with: {resume_command(store, run.run)}")
        elif error.exit_code == 1:
            command = resume_command(store, run.run)
            error.add_note(f"what is done is kept; go on after mending the cause with: {command}")
        raise
    finally:
        run = _write_reports(store, run)
    return run


def _run_in_prefect(ladder: Ladder) -> None:
    plan, store = ladder.plan, ladder.store
    log.debug("phase start of Prefect")
    known = {stage.key: (ladder, stage) for stage in plan.stages}
    with Interruption() as stop, temporary_api(store.reports / plan.run) as api:

        def later() -> Iterator[dict[str, Any]]:
            for grown, stage in islice(stages_in_turn(ladder), len(plan.stages), None):
                known[stage.key] = grown, stage
                yield _spec(stage)

        def run_one(spec: dict[str, Any], listener: Listener) -> dict[str, Any]:
            grown, stage = known[spec["key"]]
            record = run_stage(replace(grown, listener=listener), stage, stop)
            return dict(record.metrics)

        run_flow(
            plan.run,
            store,
            [_spec(stage) for stage in plan.stages],
            run_one,
            api_url=api.wait(),
            total=len(plan.stages) if plan.complete else 0,
            later=later(),
            listener=ladder.listener,
            tags=[plan.name, plan.config.data.name, *sorted(_models(plan))],
        )


def _models(plan: Plan) -> set[str]:
    return {str(stage.spec.options["model"]["name"]) for stage in plan.stages}


def _spec(stage: PlannedStage) -> dict[str, Any]:
    """What Prefect shows of a stage."""
    parents = {"teacher": stage.teacher, "parent": stage.parent}
    return {"name": stage.name, "key": stage.key, **parents}


def _write_reports(store: Store, run: Run) -> Run:
    """Gives back the run as it is now: an automatic ladder has grown."""
    log.debug("phase reports")
    try:
        run = store.run(run.run)
        frame = accuracy_report(store, run)
        for name, form in REPORTS.items():
            write_report(frame, form, store.reports / run.run / name)
    except (OSError, StoreError) as error:  # the ladder's own error, if any, is the one to show
        log.warning("the reports could not be written: %s", error)
    return run

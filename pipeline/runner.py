"""Runs a ladder: one stage after the other, each found, waited for, resumed, or trained."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from .auto_plan import every_rung, plan_so_far, said_of_rungs
from .config import DataConfig, RunConfig, RuntimeConfig, StageConfig
from .data import DATASETS, DataBundle
from .data.listing import forget_listings
from .derived import look_spec, pack_spec, teacher_keys
from .errors import (
    BitladderError,
    ConfigError,
    Diverged,
    Interrupted,
    StageError,
    StoreError,
    store_problem,
)
from .events import Event, EventKind, Listener
from .files import TornFileError, now, sha256_of
from .fit import Surroundings
from .interruption import Interruption
from .machine import choose_device, describe, device_mistakes, keep_freed_memory, own_threads
from .network_check import check_networks
from .ranks import on_several_devices
from .record import CHECKPOINT, METRICS, StageRecord
from .spec import Plan, PlannedStage, StageSpec
from .stages import STAGES, StageContext
from .store import Store
from .tensorboard import chart_result, charts_of, require_tensorboard
from .tensors import read_checkpoint

log = logging.getLogger(__name__)


def _ignore(_event: Event) -> None:
    """Nobody listens."""


@dataclass(frozen=True)
class Ladder:
    """A plan about to run in a store, with what its stages share in this process.

    Attributes:
        plan: of an automatic ladder, as far as it is known; see `stages_in_turn`.
        finished: whether every stage was there, and whole, when the ladder was opened.
        retry_diverged: whether a stage that diverged before is tried again.
        packs: whether each network is packed into the file to ship, and looked into.
    """

    plan: Plan
    store: Store
    listener: Listener
    finished: bool
    retry_diverged: bool = True
    packs: bool = True

    def event(self, stage: PlannedStage, **fields: Any) -> None:
        """Tells the listener something about a stage."""
        stages = len(self.plan.stages) if self.plan.complete else 0
        self.listener(Event(stage=stage.name, position=stage.position, stages=stages, **fields))


def run_ladder(ladder: Ladder, stop: Callable[[], int | None] | None = None) -> list[StageRecord]:
    """Runs every stage that is not done; gives back all records in ladder order.

    Args:
        stop: the number of the signal that asks for an end, or None; by default that of a SIGINT
            or SIGTERM that comes meanwhile.

    Raises:
        StageError: a stage failed; what is done stays done.
        Interrupted: a stop was asked for; the state is saved.
    """
    if stop is None:
        with Interruption() as stop:
            return run_ladder(ladder, stop)
    return [run_stage(known, stage, stop) for known, stage in stages_in_turn(ladder)]


def stages_in_turn(ladder: Ladder) -> Iterator[tuple[Ladder, PlannedStage]]:
    """The stages in order, each with the ladder as it is known then.

    Where the next stage depends on results, the last one given has to be done when the next is
    asked for, which is then planned, told to the listener and registered with the run.

    Raises:
        StageError: the last stage given has left no record.
    """
    given = 0
    while True:
        for stage in ladder.plan.stages[given:]:
            yield ladder, stage
        given = len(ladder.plan.stages)
        if ladder.plan.complete:
            return
        last = ladder.plan.stages[-1]
        plan = plan_so_far(ladder.plan.config, ladder.store.find)
        if len(plan.stages) <= given and not plan.complete:
            raise StageError(last.name, f"its result {last.key} is damaged or gone")
        ladder = replace(ladder, plan=plan)
        if note := plan.notes[last.position]:
            ladder.event(last, kind="message", text=note)
        _register(ladder.store, plan)


def open_ladder(
    config: RunConfig,
    store: Store | Path | str,
    listener: Listener = _ignore,
    *,
    of_study: bool = False,
) -> Ladder:
    """Plans a ladder, checks it against its data, and registers the run.

    Args:
        of_study: it is a study's trial, one of many: it is no run of its own, a stage that
            diverged stays so, and data are loaded once for all trials in this process.

    Raises:
        ConfigError: network, weights and data do not fit together; nothing is written.
        StoreError: the store cannot be written.
    """
    store = store if isinstance(store, Store) else Store(store)
    if not of_study:
        require_tensorboard(config.runtime)
        forget_listings()  # in a long session the files may have changed since the last ladder
        load_data.cache_clear()
    plan = plan_so_far(config, store.find)
    keys = [stage.key for stage in plan.stages]
    if not of_study:
        keys += [pack_spec(key).key for key in keys]
    finished = plan.complete and all(store.find(key) for key in keys)
    if not finished:
        check_ladder(config)
    if not of_study:
        _register(store, plan)
    return Ladder(plan, store, listener, finished, retry_diverged=not of_study, packs=not of_study)


def check_ladder(config: RunConfig) -> None:
    """Tries before anything is trained whether device, data and networks fit together.

    Raises:
        ConfigError: they do not, said in the words of whoever wrote the config.
    """
    every = every_rung(config)
    errors = device_mistakes(config.runtime.device, [stage.train.devices for stage in every.ladder])
    try:
        check_networks(every, data_of(config.data))
    except ConfigError as error:
        errors += error.errors
    if errors and config.auto is not None:
        errors = said_of_rungs(errors, [stage.name for stage in every.ladder])
    if errors:
        raise ConfigError(errors)


def _register(store: Store, plan: Plan) -> None:
    try:
        store.register(plan)
    except OSError as error:
        raise StoreError(store_problem(store.root, error)) from None


def run_stage(ladder: Ladder, stage: PlannedStage, stop: Callable[[], int | None]) -> StageRecord:
    """Runs one stage, or hands back the record that it left before; packs and looks into it.

    Raises:
        StageError: it failed; the cause is noted in the store.
        Interrupted: a stop was asked for; the state is saved.
    """
    record, known = found_or_made(ladder, stage, stage.spec, stop)
    kind: EventKind = "reused" if known else "finished"
    ladder.event(stage, kind=kind, fraction=1.0, metrics=dict(record.metrics))
    chart_result(ladder.store, ladder.plan, stage, record)
    if ladder.packs:
        packed, known = found_or_made(ladder, stage, pack_spec(stage.key), stop)
        if not known:
            ladder.event(stage, kind="packed", metrics=dict(packed.metrics))
        _look(ladder, stage, stop)
    return record


def _look(ladder: Ladder, stage: PlannedStage, stop: Callable[[], int | None]) -> None:
    """Looks inside the network, for the pages of reports; without that the ladder goes on."""
    spec = look_spec(stage.key, teacher_keys(stage.spec.parents))
    try:
        found_or_made(replace(ladder, listener=_ignore), stage, spec, stop)
    except Interrupted:
        raise
    except Exception as error:
        failure = as_stage_error(stage.name, ladder.store, error)
        cause = failure.cause if isinstance(failure, StageError) else str(failure)
        ladder.event(stage, kind="message", text=f"not looked into: {cause}")


def found_or_made(
    ladder: Ladder, stage: PlannedStage, spec: StageSpec, stop: Callable[[], int | None]
) -> tuple[StageRecord, bool]:
    """The record of a stage, or of one derived from it, and whether it was there before."""
    store, key = ladder.store, spec.key
    waiting = partial(_waiting, ladder, stage)
    with store.lock(key, waiting=waiting, stop=stop):
        if record := store.claim(key):
            return record, True
        if (cause := store.diverged(key)) and not ladder.retry_diverged:
            raise Diverged(stage.name, cause)
        try:
            return _work(ladder, stage, spec, stop), False
        except (Interrupted, KeyboardInterrupt):
            raise
        except Exception as error:
            failure = as_stage_error(stage.name, store, error)
            cause = failure.cause if isinstance(failure, StageError) else str(failure)
            store.fail(key, cause, diverged=isinstance(failure, Diverged))
            ladder.event(stage, kind="failed", text=cause)
            raise failure from error


def _work(
    ladder: Ladder, stage: PlannedStage, spec: StageSpec, stop: Callable[[], int | None]
) -> StageRecord:
    config, store, trains = ladder.plan.config, ladder.store, spec is stage.spec
    settings: StageConfig = config.ladder[stage.position]
    model = config.model_of(settings)
    if (number := stop()) is not None:
        raise Interrupted(number)
    workdir = store.workdir(spec.key)
    resume = _checkpoint(workdir, ladder, stage)
    started = json.loads(resume["started"]) if resume else {}
    device, threads = _set_up(config.runtime, started, ladder, stage)
    log.debug("phase data")
    data = data_of(config.data)
    parents = {role: _parent(store, key, stage) for role, key in spec.parents.items()}
    epochs = settings.train.epochs
    done = len(json.loads(resume["history"])) if resume else 0
    if trains:
        share = done / epochs if epochs else 0
        ladder.event(stage, kind="started", epoch=done, epochs=epochs, fraction=share)
    context = StageContext(
        spec=spec,
        stage=settings,
        store=store,
        data=data,
        parents=parents,
        device=device,
        around=Surroundings(
            name=stage.name,
            workdir=workdir,
            notify=partial(ladder.event, stage),
            stop=stop,
            checkpoint_seconds=config.runtime.checkpoint_seconds,
            started={"device": str(device), "threads": threads},
            charts=charts_of(store, ladder.plan, stage),
        ),
        resume=resume,
        weights=Path(model.weights) if model.weights and spec.options.get("weights") else None,
    )
    if trains and settings.train.devices > 1 and epochs:
        output = on_several_devices(context, config)
    else:
        cuda = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(spec.global_seed)
            output = STAGES[spec.kind].factory(context)
    devices = settings.train.devices
    several = {"devices": devices} if trains and devices > 1 else {}
    files = {
        name: {"sha256": sha256_of(workdir / name), "bytes": (workdir / name).stat().st_size}
        for name in (*output.files, METRICS)
        if (workdir / name).is_file()
    }
    record = StageRecord(
        key=spec.key,
        spec=spec,
        parents={
            role: {"key": parent.key, "sha256": parent.sha256} for role, parent in parents.items()
        },
        files=files,
        network=output.network,
        metrics=output.metrics,
        environment=describe(device) | {"threads": threads, **several},
        created=now(),
    )
    return store.commit(record)


def _set_up(
    runtime: RuntimeConfig, started: dict[str, Any], ladder: Ladder, stage: PlannedStage
) -> tuple[torch.device, int]:
    """Device and threads: as at the stage's start where that is known, else as configured.

    The threads are those of each process; where there are several, this is none of them.
    """
    if runtime.keep_freed_memory:
        keep_freed_memory()
    threads = started.get("threads") or runtime.threads
    devices = ladder.plan.config.ladder[stage.position].train.devices
    if devices > 1:
        threads = threads or own_threads(devices)
    elif threads:
        torch.set_num_threads(threads)
    return _device(runtime, started, ladder, stage), threads or torch.get_num_threads()


def _device(
    runtime: RuntimeConfig, started: dict[str, Any], ladder: Ladder, stage: PlannedStage
) -> torch.device:
    wanted = started.get("device") or runtime.device
    try:
        return choose_device(wanted)
    except ConfigError:
        if not started:
            raise
        device = choose_device(runtime.device)
        ladder.event(
            stage,
            kind="message",
            text=f"began on {wanted}, which is not here; it goes on on {device}, and its numbers "
            "will differ from an uninterrupted run's",
        )
        return device


def _checkpoint(workdir: Path, ladder: Ladder, stage: PlannedStage) -> dict[str, Any] | None:
    path = workdir / CHECKPOINT
    if not path.is_file():
        return None
    try:
        return read_checkpoint(path)
    except (TornFileError, RuntimeError) as error:
        path.unlink()
        ladder.event(stage, kind="message", text=f"begins again: {error}")
        return None


def _parent(store: Store, key: str, stage: PlannedStage) -> StageRecord:
    record = store.find(key)
    if record is None:
        raise StageError(
            stage.name,
            f"its parent stage {key} is damaged or gone",
            "run the ladder again: the parent will be redone first",
        )
    return record


def as_stage_error(stage: str, store: Store, error: Exception) -> BitladderError:
    """What went wrong in the stage of that name, for whoever has to mend it."""
    if isinstance(error, BitladderError):
        return error
    log.debug("stage %s failed", stage, exc_info=error)
    if isinstance(error, OSError) and error.filename is None and error.errno:
        return StageError(stage, store_problem(store.root, error))
    if isinstance(error, OSError):
        return StageError(stage, f"{error.strerror or error}: {error.filename}")
    if isinstance(error, torch.OutOfMemoryError):
        return StageError(
            stage, "the device is out of memory", "give data.batch_size a smaller value"
        )
    return StageError(stage, f"{type(error).__name__}: {error}")


def data_of(section: DataConfig) -> DataBundle:
    """The data set that the section `data` of a config names; as `load_data`."""
    return load_data(section.name, json.dumps(section.options, sort_keys=True))


@lru_cache(maxsize=2)
def load_data(name: str, options: str) -> DataBundle:
    """A data set, loaded once per process; `options` is JSON, so that it can be remembered.

    Raises:
        ConfigError: it is not there or cannot be read; the message says how to get it.
    """
    try:
        return DATASETS[name].factory(**json.loads(options))
    except (ValueError, OSError) as error:
        raise ConfigError([f"data: {error}"]) from None


def _waiting(ladder: Ladder, stage: PlannedStage, holder: str) -> None:
    ladder.event(stage, kind="waiting", text=f"{holder} has this stage; waiting for its result")

"""Runs a ladder: one stage after the other, each found, waited for, resumed, or trained."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from ..models import load_weights
from ..quant.probing import probe
from .config import RunConfig, RuntimeConfig, StageConfig
from .data import DATASETS, DataBundle
from .data.listing import forget_listings
from .errors import (
    BitladderError,
    ConfigError,
    Interrupted,
    StageError,
    StoreError,
    store_problem,
)
from .events import Event, Listener
from .files import TornFileError, now, sha256_of
from .fit import Surroundings
from .interruption import Interruption
from .machine import choose_device, describe, keep_freed_memory
from .network import build_network, describe_network
from .plan import make_plan
from .policy_check import check_policies
from .record import CHECKPOINT, METRICS, StageRecord
from .spec import Plan, PlannedStage
from .stages import STAGES, StageContext
from .store import Store
from .tensors import read_checkpoint

log = logging.getLogger(__name__)


def _ignore(_event: Event) -> None:
    """Nobody listens."""


@dataclass(frozen=True)
class Ladder:
    """A plan about to run in a store, with what its stages share in this process.

    Attributes:
        finished: whether every stage was there, and whole, when the ladder was opened.
    """

    plan: Plan
    store: Store
    listener: Listener
    finished: bool

    def event(self, stage: PlannedStage, **fields: Any) -> None:
        """Tells the listener something about a stage."""
        stages = len(self.plan.stages)
        self.listener(Event(stage=stage.name, position=stage.position, stages=stages, **fields))


def run_ladder(ladder: Ladder) -> list[StageRecord]:
    """Runs every stage that is not done; gives back all records in ladder order.

    Raises:
        StageError: a stage failed; what is done stays done.
        Interrupted: SIGINT or SIGTERM; the state is saved.
    """
    with Interruption() as stop:
        return [run_stage(ladder, stage, stop) for stage in ladder.plan.stages]


def open_ladder(
    config: RunConfig, store: Store | Path | str, listener: Listener = _ignore
) -> Ladder:
    """Plans a ladder, checks it against its data, and registers the run.

    Raises:
        ConfigError: network, weights and data do not fit together; nothing is written.
        StoreError: the store cannot be written.
    """
    store = store if isinstance(store, Store) else Store(store)
    forget_listings()  # in a long session the files may have changed since the last ladder
    load_data.cache_clear()
    plan = make_plan(config)
    finished = all(store.find(stage.key) for stage in plan.stages)
    if not finished:
        choose_device(config.runtime.device)
        check_network(config)
    try:
        store.register(plan)
    except OSError as error:
        raise StoreError(store_problem(store.root, error)) from None
    return Ladder(plan, store, listener, finished)


def check_network(config: RunConfig) -> None:
    """Builds the network, loads its weights, and classifies two images.

    Raises:
        ConfigError: something does not fit, said in the words of whoever wrote the config.
    """
    data = load_data(config.data.name, json.dumps(config.data.options, sort_keys=True))
    try:
        network = describe_network(
            {"name": config.model.name, "options": config.model.options}, data
        )
        model = build_network(network, seed=config.seed)
    except (ValueError, TypeError) as error:
        raise ConfigError([f"model: {error}"]) from None
    if config.model.weights is not None:
        try:
            load_weights(model, Path(config.model.weights), key_map=config.model.key_map)
        except (ValueError, OSError) as error:
            raise ConfigError([f"model.weights: {error}"]) from None
    images, _ = next(iter(data.validation.evaluation_batches(2, device=torch.device("cpu"))))
    try:
        with torch.no_grad():
            logits = model.eval()(images)
    except (RuntimeError, ValueError, TypeError) as error:
        shape = "x".join(str(n) for n in images.shape[1:])
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            [f"model: {config.model.name} cannot take images of {shape}: {reason}"]
        ) from None
    found = tuple(getattr(logits, "shape", ()))
    if found != (len(images), data.num_classes):
        given = f"gives {found or type(logits).__name__}"
        raise ConfigError(
            [
                f"model: {config.model.name} {given} for {len(images)} images, but "
                f"{config.data.name} has {data.num_classes} classes: it must give "
                f"({len(images)}, {data.num_classes})"
            ]
        )
    check_policies(config, probe(model, [images]))


def run_stage(ladder: Ladder, stage: PlannedStage, stop: Callable[[], int | None]) -> StageRecord:
    """Runs one stage, or hands back the record that it left before.

    Raises:
        StageError: it failed; the cause is noted in the store.
        Interrupted: a stop was asked for; the state is saved.
    """
    store, key = ladder.store, stage.key
    waiting = partial(_waiting, ladder, stage)
    with store.lock(key, waiting=waiting, stop=stop):
        if record := store.claim(key):
            ladder.event(stage, kind="reused", fraction=1.0, metrics=dict(record.metrics))
            return record
        try:
            record = _work(ladder, stage, stop)
        except (Interrupted, KeyboardInterrupt):
            raise
        except Exception as error:
            failure = _as_stage_error(stage, store, error)
            cause = failure.cause if isinstance(failure, StageError) else str(failure)
            store.fail(key, cause)
            ladder.event(stage, kind="failed", text=cause)
            raise failure from error
    ladder.event(stage, kind="finished", fraction=1.0, metrics=dict(record.metrics))
    return record


def _work(ladder: Ladder, stage: PlannedStage, stop: Callable[[], int | None]) -> StageRecord:
    config, store, spec = ladder.plan.config, ladder.store, stage.spec
    settings: StageConfig = config.ladder[stage.position]
    if (number := stop()) is not None:
        raise Interrupted(number)
    workdir = store.workdir(spec.key)
    resume = _checkpoint(workdir, ladder, stage)
    started = json.loads(resume["started"]) if resume else {}
    device = _set_up(config.runtime, started, ladder, stage)
    log.debug("phase data")
    data = load_data(config.data.name, json.dumps(config.data.options, sort_keys=True))
    parents = {role: _parent(store, key, stage) for role, key in spec.parents.items()}
    epochs = settings.train.epochs
    done = len(json.loads(resume["history"])) if resume else 0
    ladder.event(
        stage, kind="started", epoch=done, epochs=epochs, fraction=done / epochs if epochs else 0
    )
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
            started={"device": str(device), "threads": torch.get_num_threads()},
        ),
        resume=resume,
        weights=Path(config.model.weights or "") if spec.options["weights"] else None,
    )
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(int(spec.key[:15], 16))  # foreign networks draw their dropout from it
        output = STAGES[spec.kind].factory(context)
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
        environment=describe(device),
        created=now(),
    )
    return store.commit(record)


def _set_up(
    runtime: RuntimeConfig, started: dict[str, Any], ladder: Ladder, stage: PlannedStage
) -> torch.device:
    """Device and threads: as at the stage's start where that is known, else as configured."""
    if runtime.keep_freed_memory:
        keep_freed_memory()
    threads = started.get("threads") or runtime.threads
    if threads:
        torch.set_num_threads(threads)
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


def _as_stage_error(stage: PlannedStage, store: Store, error: Exception) -> BitladderError:
    if isinstance(error, BitladderError):
        return error
    log.debug("stage %s failed", stage.name, exc_info=error)
    if isinstance(error, OSError) and error.filename is None and error.errno:
        return StageError(stage.name, store_problem(store.root, error))
    if isinstance(error, OSError):
        return StageError(stage.name, f"{error.strerror or error}: {error.filename}")
    if isinstance(error, torch.OutOfMemoryError):
        return StageError(
            stage.name, "the device is out of memory", "give data.batch_size a smaller value"
        )
    return StageError(stage.name, f"{type(error).__name__}: {error}")


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

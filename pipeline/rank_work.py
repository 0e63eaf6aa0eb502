"""A stage's work in one of the processes that share it, and what it tells the one above."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .config import StageConfig
from .distributed import joined
from .errors import BitladderError
from .fit import Surroundings
from .machine import keep_freed_memory
from .record import CHECKPOINT, StageRecord
from .spec import StageSpec
from .stages import STAGES, StageContext, StageOutput
from .store import Store
from .tensorboard import Charts
from .tensors import read_checkpoint


@dataclass(frozen=True)
class Job:
    """A stage as a process of its own can begin it; see `StageContext` and `Surroundings`.

    Attributes:
        data: name and options, as JSON, of the data set.
        store: folder and SQLAlchemy URL.
        device: "cpu", or "cuda" for the device of the process' own number.
        resumes: whether there is a checkpoint.
    """

    spec: StageSpec
    stage: StageConfig
    data: tuple[str, str]
    store: tuple[Path, str | None]
    parents: Mapping[str, StageRecord]
    device: str
    keep_freed_memory: bool
    name: str
    checkpoint_seconds: float
    started: Mapping[str, Any]
    resumes: bool
    weights: Path | None
    charts: Charts | None = None


@dataclass(frozen=True)
class Told:
    """Something of an `Event` that the first process has noticed."""

    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Done:
    """The process is through; what the first one gives is the stage's result."""

    output: StageOutput


@dataclass(frozen=True)
class Failed:
    """The process cannot go on; `at` is when it noticed, on the machine's monotonic clock."""

    error: BitladderError
    at: float


def work(job: Job, notify: Callable[..., None], stop: Callable[[], int | None]) -> Done | Failed:
    """Trains this process' part of a stage; never raises.

    Args:
        notify, stop: see `Surroundings`; those of the first process count.
    """
    from .runner import as_stage_error

    store = Store(job.store[0], url=job.store[1])
    try:
        return Done(_work(job, store, notify, stop))
    except Exception as error:
        return Failed(as_stage_error(job.name, store, error), time.monotonic())


def _work(
    job: Job, store: Store, notify: Callable[..., None], stop: Callable[[], int | None]
) -> StageOutput:
    from .runner import load_data

    if job.keep_freed_memory:
        keep_freed_memory()
    torch.set_num_threads(job.started["threads"])
    cuda = job.device == "cuda"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    workdir = store.stages / f"{job.spec.key}.part"
    context = StageContext(
        spec=job.spec,
        stage=job.stage,
        store=store,
        data=load_data(*job.data),
        parents=job.parents,
        device=device,
        around=Surroundings(
            name=job.name,
            workdir=workdir,
            notify=notify,
            stop=stop,
            checkpoint_seconds=job.checkpoint_seconds,
            started=dict(job.started),
            charts=job.charts,
        ),
        resume=read_checkpoint(workdir / CHECKPOINT) if job.resumes else None,
        weights=job.weights,
    )
    with joined(device):
        torch.manual_seed(job.spec.global_seed)
        return STAGES[job.spec.kind].factory(context)

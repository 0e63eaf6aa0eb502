"""The training loop of a stage, and the checkpoint that lets it go on as if it had not stopped."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..quant import world
from ..quant.metrics import scales
from .config import StageConfig
from .data import DataBundle
from .diagnose import first_non_finite
from .distributed import draw_differently, own_share, random_states, restore_random_states
from .errors import Diverged, Interrupted
from .evaluate import evaluate
from .files import write_atomic
from .learner import Learner
from .optimizer import OptimizerPair, build_optimizer, rates
from .record import CHECKPOINT, METRICS
from .teachers import Teachers
from .tensorboard import Charts
from .tensors import write_checkpoint
from .training_step import TrainingStep

log = logging.getLogger(__name__)
EVALUATION_BATCH = 512
CHECK_EVERY = 50  # steps between looks at the loss where a look makes the device wait


@dataclass(frozen=True)
class Surroundings:
    """What a stage is given by whoever runs it; nothing here changes its result.

    Attributes:
        name: the stage's name in its ladder.
        workdir: where checkpoint and metrics go.
        notify: called with keyword fields of an `Event`.
        stop: the number of the signal that asked for an end, or None.
        checkpoint_seconds: longest time between two checkpoints.
        started: facts decided at the stage's start, kept in every checkpoint.
        charts: where each epoch is charted, if anywhere.
    """

    name: str
    workdir: Path
    notify: Callable[..., None]
    stop: Callable[[], int | None]
    checkpoint_seconds: float
    started: dict[str, Any] = field(default_factory=dict)
    charts: Charts | None = None


@dataclass
class Position:
    """How far a stage is: the next batch of the next epoch, and sums over this epoch so far."""

    epoch: int = 0
    batch: int = 0
    sums: Tensor | None = None  # float64: images, then each term's sum over them
    terms: list[str] = field(default_factory=list)
    seconds: float = 0.0  # spent in this epoch
    history: list[dict[str, Any]] = field(default_factory=list)


def fit(
    learner: Learner,
    teachers: Teachers,
    data: DataBundle,
    stage: StageConfig,
    around: Surroundings,
    *,
    batch_size: int,
    seed: int,
    device: torch.device,
    resume: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Trains the learner in place; gives back one dict of metrics per epoch.

    Where several processes train together, each calls it with the same arguments. The first one
    validates and writes; the others wait, and give back the same.

    Args:
        teachers: they see the student's own batches.
        resume: what the checkpoint of an interrupted run holds; the learner already has its
            weights. The result is bit for bit that of a run never interrupted (on one CPU
            configuration), because all else is a function of seed, epoch and step.

    Raises:
        Interrupted: a stop was asked for; the checkpoint is written.
        Diverged: the loss is not finite; the last good checkpoint stays.
    """
    optimizer = build_optimizer(learner, learner.student, stage.train)
    at, share = Position(), own_share()
    if resume is not None:
        at = _restore(optimizer, resume, device)
    else:
        draw_differently()
    per_epoch = data.train.num_batches(batch_size, shares=share.of)
    steps = stage.train.epochs * per_epoch
    clock = _Clock(done=at.epoch * per_epoch + at.batch, steps=steps)
    saved = time.monotonic()
    step = TrainingStep(
        learner, teachers, optimizer, stage, steps=steps, per_epoch=per_epoch, seed=seed
    )
    x: Tensor | None = None  # a checkpoint may lie after an epoch's last batch
    _write_history(around.workdir, at.history)
    log.debug("phase training")
    while at.epoch < stage.train.epochs:
        learner.train()
        epoch_start = time.monotonic() - at.seconds
        batches = data.train.batches(
            batch_size,
            seed=seed,
            epoch=at.epoch,
            start=at.batch,
            augment=stage.train.augment,
            device=device,
            share=share,
        )
        for x, targets in batches:
            number = at.epoch * per_epoch + at.batch
            images = data.train.images_in(at.batch, batch_size, shares=share.of)
            world.set_part(len(targets), images)
            terms = step.losses(x, targets, number)
            told = _of_whole_batch(terms)
            if device.type == "cpu" or number % CHECK_EVERY == 0:
                _require_finite(told["total"], learner, x, around, at, per_epoch)
            step.update(terms["total"], number)
            _add(at, told, images)
            at.batch += 1
            if clock.tick():
                around.notify(
                    kind="step",
                    epoch=at.epoch,
                    epochs=stage.train.epochs,
                    fraction=clock.fraction,
                    loss=float(told["total"].detach()),
                    seconds_left=clock.seconds_left,
                )
            stopped, due = _agreed(
                around.stop(), time.monotonic() - saved > around.checkpoint_seconds
            )
            if stopped is not None or due:
                at.seconds = time.monotonic() - epoch_start
                _require_finite(_total(at), learner, x, around, at, per_epoch)
                _save(learner, optimizer, at, around, device)
                saved = time.monotonic()
            if stopped is not None:
                raise Interrupted(stopped)
        at.seconds = time.monotonic() - epoch_start
        _require_finite(_total(at), learner, x, around, at, per_epoch)
        _end_epoch(learner, data, at, optimizer, device)
        _require_finite(torch.tensor(at.history[-1]["val_loss"]), learner, x, around, at, per_epoch)
        _write_history(around.workdir, at.history)
        _save(learner, optimizer, at, around, device)
        if around.charts is not None and world.rank() == 0:
            around.charts.epoch(learner.student, data, at.history)
        saved = time.monotonic()
        last = at.history[-1]
        around.notify(
            kind="epoch",
            epoch=at.epoch,
            epochs=stage.train.epochs,
            fraction=clock.fraction,
            loss=last["train_loss"],
            accuracy=last["val_top1"],
            seconds_left=clock.seconds_left,
        )
    if steps:
        learner.end()
    return at.history


def _end_epoch(
    learner: Learner,
    data: DataBundle,
    at: Position,
    optimizer: Optimizer | OptimizerPair,
    device: torch.device,
) -> None:
    assert at.sums is not None
    images, *sums = at.sums.tolist()
    means = {name: value / images for name, value in zip(at.terms, sums, strict=True)}
    log.debug("phase evaluation of epoch %d", at.epoch)
    val_loss, val_top1 = 0.0, 0.0
    if world.rank() == 0:
        batches = data.validation.evaluation_batches(EVALUATION_BATCH, device=device)
        accuracy = evaluate(learner.student, batches)
        val_loss, val_top1 = accuracy.loss, accuracy.top1
    val_loss, val_top1 = world.of_first(val_loss, val_top1)
    at.history.append(
        {
            "epoch": at.epoch + 1,
            "train_loss": means.pop("total"),
            **{f"train_{name}": value for name, value in means.items()},
            **oscillation_shares(learner),
            **({"scales": found} if (found := scales(learner.student)) else {}),
            "val_loss": val_loss,
            "val_top1": val_top1,
            **rates(optimizer),
            "seconds": round(at.seconds, 3),
            "images_per_second": round(images / max(at.seconds, 1e-9), 1),
        }
    )
    at.epoch, at.batch, at.sums, at.terms, at.seconds = at.epoch + 1, 0, None, [], 0.0


def oscillation_shares(learner: Learner) -> dict[str, float]:
    """Which shares of the weights oscillate and are frozen, where that is followed."""
    if learner.tracker is None:
        return {}
    shares = learner.tracker.shares()
    return {"weights_oscillating": shares.oscillating, "weights_frozen": shares.frozen}


def _of_whole_batch(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """The terms of a step, means over the images of all processes where there are several."""
    if world.size() == 1:
        return terms
    own = torch.stack([term.detach().double() for term in terms.values()])
    return dict(zip(terms, world.summed(own / world.ratio()), strict=True))


def _agreed(stopped: int | None, due: bool) -> tuple[int | None, bool]:
    """What the first process knows of a signal and of the time, so that all act alike."""
    if world.size() == 1:
        return stopped, due
    number, due_there = world.of_first(stopped or 0, due)
    return int(number) or None, bool(due_there)


def _add(at: Position, terms: dict[str, Tensor], images: int) -> None:
    """Adds a batch to the epoch's sums without making the device wait."""
    if at.sums is None or at.terms != list(terms):  # bin regularization may begin in mid-epoch
        old = dict(zip(at.terms, at.sums[1:], strict=True)) if at.sums is not None else {}
        zero = torch.zeros((), dtype=torch.float64, device=terms["total"].device)
        count = at.sums[0] if at.sums is not None else zero
        at.terms = list(terms)
        at.sums = torch.stack([count, *(old.get(name, zero) for name in at.terms)])
    values = torch.stack([term.detach().double() for term in terms.values()])
    at.sums[0] += images
    at.sums[1:] += values * images


def _total(at: Position) -> Tensor:
    assert at.sums is not None
    return at.sums[1 + at.terms.index("total")]


def _require_finite(
    loss: Tensor,
    learner: Learner,
    x: Tensor | None,
    around: Surroundings,
    at: Position,
    per_epoch: int,
) -> None:
    if math.isfinite(float(loss.detach())):
        return
    culprit = first_non_finite(learner.student, x)
    kept = (around.workdir / CHECKPOINT).is_file()
    raise Diverged(
        around.name,
        f"the loss is {float(loss.detach())} at step {at.epoch * per_epoch + at.batch} "
        f"(epoch {at.epoch + 1}); {culprit}",
        "rungs above are kept"
        + (f", and the last good checkpoint is {around.workdir / CHECKPOINT}" if kept else "")
        + "; give this rung a lower train.optimizer.lr or a train.clip_grad_norm and run again",
    )


def _save(
    learner: Learner,
    optimizer: Optimizer | OptimizerPair,
    at: Position,
    around: Surroundings,
    device: torch.device,
) -> None:
    drawn = random_states(device)
    if world.rank() > 0:
        return
    log.debug("phase checkpoint")
    state = {
        "learner": learner.state_dict(),
        "optimizer": optimizer.state_dict(),
        **drawn,
        "position": {"epoch": at.epoch, "batch": at.batch, "seconds": at.seconds},
        "sums": at.sums,
        "terms": at.terms,
        "history": json.dumps(at.history),
        "started": json.dumps(around.started),
    }
    write_checkpoint(around.workdir / CHECKPOINT, state)
    log.debug("phase training")


def _restore(
    optimizer: Optimizer | OptimizerPair, state: dict[str, Any], device: torch.device
) -> Position:
    optimizer.load_state_dict(state["optimizer"])
    restore_random_states(state, device)
    return Position(
        **state["position"],
        sums=state["sums"].to(device) if state["sums"] is not None else None,
        terms=state["terms"],
        history=json.loads(state["history"]),
    )


def _write_history(workdir: Path, history: list[dict[str, Any]]) -> None:
    """One JSON object a line, an epoch each; written whole, so a resume drops a torn tail."""
    if world.rank() > 0:
        return
    lines = "".join(json.dumps(epoch, allow_nan=False) + "\n" for epoch in history)
    write_atomic(workdir / METRICS, lines.encode())


class _Clock:
    """Counts steps, says a few times a second that it is time to report, guesses what is left."""

    def __init__(self, *, done: int, steps: int) -> None:
        self._first = self._done = done
        self._steps = steps
        self._start = self._last = time.monotonic()

    def tick(self) -> bool:
        self._done += 1
        now = time.monotonic()
        if now - self._last < 0.25:
            return False
        self._last = now
        return True

    @property
    def fraction(self) -> float:
        return self._done / self._steps

    @property
    def seconds_left(self) -> float | None:
        made = self._done - self._first
        if made < 5:
            return None
        return (time.monotonic() - self._start) / made * (self._steps - self._done)

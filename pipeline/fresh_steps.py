"""The training step of a rung of any config, without the rungs above: all weights are fresh."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..quant.absorb import absorb_relus
from ..quant.calibrate import bake, calibrate, reestimate_batch_norm
from ..quant.probing import probe
from ..quant.swap import apply_plan
from .cheap_teachers import ready_teachers
from .compiling import compile_networks, wants, why_not
from .config import BinRegularizationConfig, OscillationConfig, RunConfig, StageConfig
from .data import DataBundle
from .data.split import Batch
from .errors import ConfigError
from .features import build_features
from .full_batches import FullBatches
from .learner import Learner, Objective
from .network import build_network, describe_network
from .optimizer import build_optimizer
from .parents import parents_of
from .policy import policy_of
from .stages.train import calibration_of
from .teachers import Teachers
from .training_step import TrainingStep

CALIBRATION_BATCHES = 2


@dataclass(frozen=True)
class CompiledNetworks:
    """The compiled networks of a step, which runs the plain ones unless these are in use."""

    step: TrainingStep
    student: FullBatches
    teachers: list[Any]

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """While open, the step runs them."""
        learner, teachers = self.step.learner, self.step.teachers
        plain = teachers.networks
        learner.fast, teachers.networks = self.student, self.teachers
        try:
            yield
        finally:
            learner.fast, teachers.networks = None, plain


@dataclass(frozen=True)
class FreshSteps:
    """What a stage does with a batch, and what it is to be compared with.

    Attributes:
        own: the stage's training step, not compiled.
        plain: that of its network alone, in FP32, without teachers.
        compiled: its networks compiled, where the stage compiles them.
        notes: why they are not, where it would.
    """

    own: TrainingStep
    plain: TrainingStep
    compiled: CompiledNetworks | None
    notes: tuple[str, ...]


def fresh_steps(
    config: RunConfig, position: int, data: DataBundle, device: torch.device
) -> FreshSteps:
    """Builds a stage's training step as the stage does, but for the weights that are handed over.

    Quantized and calibrated on the config's data, all networks cost what trained ones cost.

    Raises:
        ConfigError: the stage's teachers cannot be had as it wants them.
    """
    stage, size = config.ladder[position], config.data.batch_size
    drawn = calibration_of(stage, data, batch_size=size, seed=config.seed, device=device)
    calibration = list(drawn(CALIBRATION_BATCHES))
    parents = parents_of(config, position)
    above = parents.teachers[-1:] if parents.chooses else parents.teachers
    networks = [bake(_network(config, each, data, calibration)) for each in above]
    alone = _network(config, position, data, calibration, quantized=False)
    features = None
    if stage.distill.features is not None and stage.distill.follows_features and networks:
        features = build_features(
            stage.distill.features,
            student=alone,
            teachers=networks,
            images=calibration[0][0][:2],
            seed=config.seed,
        )
    try:
        teachers, _ = ready_teachers(
            networks,
            stage.distill,
            data,
            augment=stage.train.augment,
            batch_size=size,
            seed=config.seed,
            device=device,
        )
    except ValueError as error:
        raise ConfigError([f"{stage.name}: distill: {error}"]) from None
    nothing = BinRegularizationConfig(), OscillationConfig()
    extras = nothing if stage.full_precision else (stage.bin_regularization, stage.oscillation)
    objective = Objective(stage.train, stage.distill if networks else None, *extras, features)
    facts = probe(alone, calibration)
    student = _network(config, position, data, calibration)
    absorb_relus(student)
    learner = Learner(student, objective, precision=stage.train.precision)
    plain = Learner(alone, Objective(stage.train, None, *nothing))
    per_epoch = data.train.num_batches(size)

    def step(learner: Learner, teachers: Teachers) -> TrainingStep:
        learner.to(device).train()
        return TrainingStep(
            learner,
            teachers,
            build_optimizer(learner, learner.student, stage.train),
            stage,
            steps=stage.train.epochs * per_epoch,
            per_epoch=per_epoch,
            seed=config.seed,
        )

    own = step(learner, teachers)
    compiled: CompiledNetworks | None = None
    notes: tuple[str, ...] = ()
    if wants(stage.train, facts, batch_size=size, steps=own.steps, device=device):
        images, _ = next(endless_batches(config, stage, data, device))
        compiled, notes = _compile(own, images)
    return FreshSteps(own, step(plain, Teachers([])), compiled, notes)


def endless_batches(
    config: RunConfig, stage: StageConfig, data: DataBundle, device: torch.device
) -> Iterator[Batch]:
    """Training batches without end, as a stage sees them; all of one size."""
    epoch, size = 0, min(config.data.batch_size, len(data.train))
    while True:
        for batch in data.train.batches(
            config.data.batch_size,
            seed=config.seed,
            epoch=epoch,
            augment=stage.train.augment,
            device=device,
        ):
            if len(batch[1]) == size:
                yield batch
        epoch += 1


def _compile(step: TrainingStep, images: Tensor) -> tuple[CompiledNetworks | None, tuple[str, ...]]:
    """The step's networks compiled, or why not; the step itself goes on with the plain ones."""
    learner, teachers = step.learner, step.teachers
    if reason := why_not(learner.student):
        return None, (f"not compiled: {reason}",)
    plain = teachers.networks
    try:
        compile_networks(learner, teachers, images)
    except RuntimeError as error:
        return None, (f"not compiled, {error}",)
    assert learner.fast is not None
    compiled = CompiledNetworks(step, learner.fast, teachers.networks)
    learner.fast, teachers.networks = None, plain
    return compiled, ()


def _network(
    config: RunConfig,
    position: int,
    data: DataBundle,
    calibration: Sequence[Batch],
    *,
    quantized: bool = True,
) -> nn.Module:
    """A rung's network with fresh weights, and with its quantizers if it has any."""
    stage = config.ladder[position]
    model = config.model_of(stage)
    device = calibration[0][0].device
    network = describe_network({"name": model.name, "options": model.options}, data)
    built = build_network(network, seed=config.seed).to(device)
    if quantized and not stage.full_precision:
        built = apply_plan(built, policy_of(stage).resolve(probe(built, calibration))).to(device)
        calibrate(built, calibration)
    reestimate_batch_norm(built, calibration)  # as a teacher it runs on these
    return built

"""All that has a gradient: the student and the losses on it; and what follows each step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ..models.tapped import Outputs, tapped
from ..quant.functional import wide
from ..quant.oscillation import OscillationTracker, followed_layers, weight_dampening
from ..quant.regularizers import (
    activation_bin_regularization,
    collect_inputs,
    weight_bin_regularization,
)
from ..quant.stepping import Stepping
from .averaging import WeightAverage, note_ranges
from .config import (
    AveragingConfig,
    BinRegularizationConfig,
    OscillationConfig,
    Precision,
    TrainConfig,
)
from .config_distill import DistillConfig
from .features import FeatureTerm
from .full_batches import FullBatches
from .losses import LOSSES, Step
from .schedule import annealed, weight_at


class Objective(nn.Module):
    """The weighted losses of a stage: labels, teachers, bins, oscillation.

    Each loss of the teachers is the mean over them, so that a weight means the same for any number
    (DGKD's own code adds them up: a weight there is that weight times their number here).
    """

    def __init__(
        self,
        train: TrainConfig,
        distill: DistillConfig | None,
        bins: BinRegularizationConfig,
        oscillation: OscillationConfig,
        features: FeatureTerm | None = None,
    ) -> None:
        super().__init__()
        self.hard = LOSSES["cross_entropy"].factory(label_smoothing=train.label_smoothing)
        self.soft = LOSSES[distill.loss].factory(**distill.options) if distill else None
        self.features = features
        self._soft_weight = distill.weight if distill else 0.0
        self._feature_weight = distill.features.weight if distill and distill.features else 0.0
        self.bins = bins
        self.oscillation = oscillation
        self.averaging = train.averaging

    def soft_weight(self, progress: float) -> float:
        """The weight of the teachers' logits at this fraction of the stage; labels get the rest."""
        return weight_at(self._soft_weight, progress)

    def feature_weight(self, progress: float) -> float:
        """The weight of the teachers' inner layers at this fraction of the stage."""
        return weight_at(self._feature_weight, progress) if self.features is not None else 0.0

    def follows(self, progress: float) -> bool:
        """Whether teachers are needed."""
        return self.soft_weight(progress) > 0 or self.feature_weight(progress) > 0

    def taps(self, progress: float) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The layers of the student, and those of its teachers, whose outputs are needed."""
        if self.features is None or self.feature_weight(progress) == 0:
            return (), ()
        return self.features.layers, self.features.teacher_layers

    def regularizes(self, progress: float) -> bool:
        """Whether bin regularization is on at this fraction of the stage."""
        return progress >= self.bins.warmup

    def collects(self, progress: float) -> bool:
        """Whether the inputs of the activation quantizers are needed."""
        return self.bins.activation > 0 and self.regularizes(progress)

    def dampening(self, progress: float) -> float:
        """The weight of oscillation dampening at this fraction of the stage."""
        own = self.oscillation.dampening
        return annealed(own.start, own.final, progress, warmup=own.warmup)

    def freezing(self, progress: float) -> float | None:
        """How often a weight may oscillate before it is frozen; None while none is to be."""
        own = self.oscillation.freezing
        if not self.oscillation.freezes or progress < own.warmup:
            return None
        return annealed(own.start, own.final, progress, warmup=own.warmup)

    def forward(
        self,
        steps: Sequence[Step],
        student: nn.Module,
        inputs: dict[str, Tensor],
        progress: float,
    ) -> dict[str, Tensor]:
        """Every term and their weighted sum under "total"; scalars, float32.

        Args:
            steps: the same step under each teacher, or one without a teacher.
        """
        terms: dict[str, Tensor] = {}
        total = steps[0].logits.new_zeros((), dtype=steps[0].logits.dtype).float()
        soft_weight = self.soft_weight(progress)
        if soft_weight < 1:
            terms["cross_entropy"] = self.hard(steps[0])
            total = total + (1 - soft_weight) * terms["cross_entropy"]
        if self.soft is not None and soft_weight > 0:
            terms["distillation"] = _mean(self.soft, steps)
            total = total + soft_weight * terms["distillation"]
        if self.features is not None and (weight := self.feature_weight(progress)) > 0:
            terms["features"] = _mean(self.features, steps)
            total = total + weight * terms["features"]
        if self.bins.weight > 0 and self.regularizes(progress):
            terms["bins_weight"] = weight_bin_regularization(
                student,
                attach_scale=self.bins.attach_weight_scale,
                grad_scale=self.bins.scale_gradient,
            )
            total = total + self.bins.weight * terms["bins_weight"]
        if self.collects(progress):
            terms["bins_activation"] = activation_bin_regularization(
                student,
                inputs,
                attach_scale=self.bins.attach_activation_scale,
                grad_scale=self.bins.scale_gradient,
            )
            total = total + self.bins.activation * terms["bins_activation"]
        if (weight := self.dampening(progress)) > 0:
            aggregation = self.oscillation.dampening.aggregation
            terms["dampening"] = weight_dampening(student, aggregation=aggregation)
            total = total + weight * terms["dampening"]
        return {**terms, "total": total}


def _mean(loss: Callable[[Step], Tensor], steps: Sequence[Step]) -> Tensor:
    values = [loss(step) for step in steps]
    return values[0] if len(values) == 1 else torch.stack(values).mean()


class Learner(nn.Module):
    """Student and objective in one module, so that one wrapper synchronises all gradients.

    Attributes:
        tracker: follows oscillating weights, where that is asked for and weights are narrow
            enough. Its state is part of this module's and not of the student's.
        averaging: the running average of the student's weights, where that is asked for; likewise.
        fast: runs the student's forward pass, compiled, where nothing has to look inside it.

    Args:
        precision: what the student's layers compute in; ranges, scales, statistics and losses are
            in float32 at least.
    """

    def __init__(
        self, student: nn.Module, objective: Objective, *, precision: Precision = "fp32"
    ) -> None:
        super().__init__()
        self.student = student
        self.precision = precision
        self.fast: FullBatches | None = None
        self.objective = objective
        self.tracker = _tracker(student, objective.oscillation)
        self.averaging = _averaging(student, objective.averaging)
        self._stepping = Stepping(student)

    def forward(
        self,
        x: Tensor,
        targets: Tensor,
        teacher_outputs: Sequence[Outputs | None],
        progress: float,
    ) -> dict[str, Tensor]:
        """The terms of one step.

        Args:
            x: images, (N, C, H, W).
            targets: class numbers, (N,).
            teacher_outputs: one for each teacher, None for one that this batch does without.
            progress: fraction of the stage done, 0 .. 1.
        """
        with ExitStack() as stack:
            inputs: dict[str, Tensor] = {}
            run: Callable[[Tensor], Tensor] = self.fast or self.student
            if self.objective.collects(progress):
                inputs = stack.enter_context(collect_inputs(self.student))
                run = self.student  # compiled code does not see hooks that come later
            if self.tracker is not None and self.objective.freezing(progress) is not None:
                stack.enter_context(self.tracker.holding())
                run = self.student
            layers, _ = self.objective.taps(progress)
            with self.autocast(x.device):
                outputs = tapped(self.student, x, layers) if layers else Outputs(run(x))
            logits = wide(outputs.logits)
            features = {name: wide(feature) for name, feature in outputs.features.items()}
            steps = [
                Step(logits, targets, own.logits, features, own.features, number)
                for number, own in enumerate(teacher_outputs)
                if own is not None
            ]
            steps = steps or [Step(logits, targets, None)]
            terms: dict[str, Tensor] = self.objective(steps, self.student, inputs, progress)
        return terms

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context in which the student runs."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16")

    @contextmanager
    def on_trial(self, device: torch.device) -> Iterator[None]:
        """Inside, passes of the student leave no trace: gradients, statistics, random draws."""
        buffers = {name: buffer.clone() for name, buffer in self.student.named_buffers()}
        try:
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                yield
        finally:
            with torch.no_grad():
                for name, buffer in self.student.named_buffers():
                    buffer.copy_(buffers[name])
            self.zero_grad(set_to_none=True)

    def before_step(self, progress: float) -> None:
        """To be called before the forward pass; `progress` as there."""
        self._stepping.before(progress)

    def after_step(self, progress: float) -> None:
        """To be called after the optimizer's step, with the same `progress`."""
        self._stepping.after()
        if self.tracker is not None:
            self.tracker.update(self.objective.freezing(progress))

    def end(self) -> None:
        """To be called after the last step: the student gets its averaged weights."""
        if self.averaging is None:
            return
        self.averaging.put()
        self._stepping.after()
        if self.tracker is not None:
            self.tracker.hold()
        note_ranges(self.student)


def _averaging(student: nn.Module, config: AveragingConfig) -> WeightAverage | None:
    if config.name == "none":
        return None
    return WeightAverage(student, method=config.name, decay=config.decay, start=config.start)


def _tracker(student: nn.Module, config: OscillationConfig) -> OscillationTracker | None:
    if not config.tracks or not followed_layers(student, max_bits=config.max_bits):
        return None
    return OscillationTracker(
        student,
        max_bits=config.max_bits,
        momentum=config.momentum,
        freeze_to=config.freezing.freeze_to,
    )

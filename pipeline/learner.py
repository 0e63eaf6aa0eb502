"""All that has a gradient: the student and the losses on it; and what follows each step."""

from __future__ import annotations

from contextlib import ExitStack

from torch import Tensor, nn

from ..quant.oscillation import OscillationTracker, followed_layers, weight_dampening
from ..quant.regularizers import (
    activation_bin_regularization,
    collect_inputs,
    weight_bin_regularization,
)
from ..quant.stepping import Stepping
from .config import BinRegularizationConfig, DistillConfig, OscillationConfig, TrainConfig
from .losses import LOSSES, Step
from .schedule import annealed


class Objective(nn.Module):
    """The weighted losses of a stage: labels, teacher, bins, oscillation."""

    def __init__(
        self,
        train: TrainConfig,
        distill: DistillConfig | None,
        bins: BinRegularizationConfig,
        oscillation: OscillationConfig,
    ) -> None:
        super().__init__()
        self.hard = LOSSES["cross_entropy"].factory(label_smoothing=train.label_smoothing)
        self.soft = LOSSES[distill.loss].factory(**distill.options) if distill else None
        self.soft_weight = distill.weight if distill else 0.0
        self.bins = bins
        self.oscillation = oscillation

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
        self, step: Step, student: nn.Module, inputs: dict[str, Tensor], progress: float
    ) -> dict[str, Tensor]:
        """Every term and their weighted sum under "total"; scalars, float32."""
        terms: dict[str, Tensor] = {}
        total = step.logits.new_zeros((), dtype=step.logits.dtype).float()
        if self.soft_weight < 1:
            terms["cross_entropy"] = self.hard(step)
            total = total + (1 - self.soft_weight) * terms["cross_entropy"]
        if self.soft is not None and self.soft_weight > 0:
            terms["distillation"] = self.soft(step)
            total = total + self.soft_weight * terms["distillation"]
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


class Learner(nn.Module):
    """Student and objective in one module, so that one wrapper synchronises all gradients.

    Attributes:
        tracker: follows oscillating weights, where that is asked for and weights are narrow
            enough. Its state is part of this module's and not of the student's.
    """

    def __init__(self, student: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.student = student
        self.objective = objective
        self.tracker = _tracker(student, objective.oscillation)
        self._stepping = Stepping(student)

    def forward(
        self, x: Tensor, targets: Tensor, teacher_logits: Tensor | None, progress: float
    ) -> dict[str, Tensor]:
        """The terms of one step.

        Args:
            x: images, (N, C, H, W).
            targets: class numbers, (N,).
            teacher_logits: (N, K), or None.
            progress: fraction of the stage done, 0 .. 1.
        """
        with ExitStack() as stack:
            inputs: dict[str, Tensor] = {}
            if self.objective.collects(progress):
                inputs = stack.enter_context(collect_inputs(self.student))
            if self.tracker is not None and self.objective.freezing(progress) is not None:
                stack.enter_context(self.tracker.holding())
            logits = self.student(x)
            step = Step(logits, targets, teacher_logits)
            terms: dict[str, Tensor] = self.objective(step, self.student, inputs, progress)
        return terms

    def before_step(self, progress: float) -> None:
        """To be called before the forward pass; `progress` as there."""
        self._stepping.before(progress)

    def after_step(self, progress: float) -> None:
        """To be called after the optimizer's step, with the same `progress`."""
        self._stepping.after()
        if self.tracker is not None:
            self.tracker.update(self.objective.freezing(progress))


def _tracker(student: nn.Module, config: OscillationConfig) -> OscillationTracker | None:
    if not config.tracks or not followed_layers(student, max_bits=config.max_bits):
        return None
    return OscillationTracker(
        student,
        max_bits=config.max_bits,
        momentum=config.momentum,
        freeze_to=config.freezing.freeze_to,
    )

"""All that has a gradient: the student and the losses on it."""

from __future__ import annotations

from contextlib import ExitStack

from torch import Tensor, nn

from ..quant.regularizers import (
    activation_bin_regularization,
    collect_inputs,
    weight_bin_regularization,
)
from .config import BinRegularizationConfig, DistillConfig, TrainConfig
from .losses import LOSSES, Step


class Objective(nn.Module):
    """The weighted losses of a stage: labels, teacher, bins."""

    def __init__(
        self,
        train: TrainConfig,
        distill: DistillConfig | None,
        bins: BinRegularizationConfig,
    ) -> None:
        super().__init__()
        self.hard = LOSSES["cross_entropy"].factory(label_smoothing=train.label_smoothing)
        self.soft = LOSSES[distill.loss].factory(**distill.options) if distill else None
        self.soft_weight = distill.weight if distill else 0.0
        self.bins = bins

    def regularizes(self, progress: float) -> bool:
        """Whether bin regularization is on at this fraction of the stage."""
        return progress >= self.bins.warmup

    def collects(self, progress: float) -> bool:
        """Whether the inputs of the activation quantizers are needed."""
        return self.bins.activation > 0 and self.regularizes(progress)

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
        return {**terms, "total": total}


class Learner(nn.Module):
    """Student and objective in one module, so that one wrapper synchronises all gradients."""

    def __init__(self, student: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.student = student
        self.objective = objective

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
            logits = self.student(x)
            step = Step(logits, targets, teacher_logits)
            terms: dict[str, Tensor] = self.objective(step, self.student, inputs, progress)
        return terms

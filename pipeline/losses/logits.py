"""Losses between logits: the labels' cross-entropy and the teacher's soft targets."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .base import LOSSES, Step


@LOSSES.register("cross_entropy")
class CrossEntropy(nn.Module):
    """Cross-entropy with the labels, mean over the batch."""

    def __init__(self, *, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(self, step: Step) -> Tensor:
        """Scalar, in nats; float32 whatever the logits are."""
        logits = step.logits.float()
        return F.cross_entropy(logits, step.targets, label_smoothing=self.label_smoothing)


@LOSSES.register("kl")
class KLDivergence(nn.Module):
    """KL divergence from the teacher's softened output to the student's, times T squared.

    L = T^2 * sum_ic p log(p / q) / N with p = softmax(teacher / T), q = softmax(student / T): the
    batch-mean form. The framework's default divides by N * K instead, so weights quoted for that
    form (TAKD's code) are K / T^2 times larger than the same weight here.

    Source: Hinton, Vinyals, Dean 2015, arXiv:1503.02531, section 2.
    """

    def __init__(self, *, temperature: float = 1.0) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, not {temperature}")
        self.temperature = temperature

    def forward(self, step: Step) -> Tensor:
        """Scalar, in nats times T squared."""
        if step.teacher_logits is None:
            raise ValueError("the loss 'kl' needs a teacher")
        student = F.log_softmax(step.logits.float() / self.temperature, dim=1)
        teacher = F.log_softmax(step.teacher_logits.float() / self.temperature, dim=1)
        divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
        return divergence * self.temperature**2

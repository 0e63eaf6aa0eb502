"""Losses between logits: the labels' cross-entropy and the teacher's soft targets."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .base import LOSSES, Step, log_probabilities, positive


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
    batch-mean form. For the form that divides by N * K instead, see `takd`.

    Source: Hinton, Vinyals, Dean 2015, arXiv:1503.02531, section 2.
    """

    def __init__(self, *, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = positive(temperature)

    def forward(self, step: Step) -> Tensor:
        """Scalar, in nats times T squared."""
        return _divergence(step, "kl", self.temperature) * self.temperature**2


@LOSSES.register("takd")
class MeanKLDivergence(nn.Module):
    """The `kl` loss divided by the number of classes: teacher-assistant distillation as coded.

    L = T^2 * sum_ic p log(p / q) / (N * K), for runs whose weights are quoted from that code. A
    weight w here is the weight w / K of `kl`: 1/10 of it on CIFAR-10, 1/100 on CIFAR-100.

    Source: Mirzadeh et al., AAAI 2020, arXiv:1902.03393, as in its code, which leaves the
    reduction of the framework's KL divergence at "mean". Differs from it in: nothing.
    """

    def __init__(self, *, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = positive(temperature)

    def forward(self, step: Step) -> Tensor:
        """Scalar, in nats times T squared, per class."""
        divergence = _divergence(step, "takd", self.temperature)
        return divergence * (self.temperature**2 / step.logits.shape[1])


@LOSSES.register("distribution")
class DistributionLoss(nn.Module):
    """Cross-entropy of the student's output with the teacher's, without labels.

    L = -T^2 * sum_ic p log(q) / N, with p and q as in `kl`: the same gradient, but the teacher's
    entropy is not taken off, so the least value is not 0. The papers use T = 1 and nothing else.

    Source: Liu et al., ReActNet, ECCV 2020, arXiv:2003.03488 (distributional loss), and N2UQ,
    CVPR 2022, arXiv:2111.14826. Differs from it in: the option of a temperature.
    """

    def __init__(self, *, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = positive(temperature)

    def forward(self, step: Step) -> Tensor:
        """Scalar, in nats times T squared."""
        student, teacher = log_probabilities(step, "distribution", self.temperature)
        return -(teacher.exp() * student).sum(dim=1).mean() * self.temperature**2


def _divergence(step: Step, name: str, temperature: float) -> Tensor:
    """KL divergence from the softened teacher to the student, mean over the batch, in nats."""
    student, teacher = log_probabilities(step, name, temperature)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)

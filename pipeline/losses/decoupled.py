"""Decoupled distillation: the target class and the others, each with a weight of its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import LOSSES, Step, log_probabilities, non_negative, positive


@LOSSES.register("decoupled_kl")
class DecoupledKL(nn.Module):
    """The `kl` loss in two parts: target class against the rest, and the rest among themselves.

    L = T^2 * (alpha * TCKD + beta * NCKD), means over the batch. TCKD is the KL divergence between
    the two-way distributions (p_t, 1 - p_t) of teacher and student, t being the label's class; NCKD
    the one between their distributions over the other K - 1 classes. `kl` is TCKD + (1 - p_t) NCKD
    image by image: it trusts the second part less the surer the teacher is, and this does not.

    Source: Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022, arXiv:2203.08679,
    equation 7. Differs from it in: T is 1 here unless set, not 4; the source adds its loss to the
    whole cross-entropy and raises its weight over the first 20 epochs, for which a weight here can
    be scheduled.
    """

    def __init__(self, *, alpha: float = 1.0, beta: float = 8.0, temperature: float = 1.0) -> None:
        super().__init__()
        self.alpha = non_negative(alpha, "alpha")
        self.beta = non_negative(beta, "beta")
        self.temperature = positive(temperature)

    def forward(self, step: Step) -> Tensor:
        """Scalar, in nats times T squared; float32."""
        both = log_probabilities(step, "decoupled_kl", self.temperature)
        target = step.targets[:, None]  # (N, 1)
        others = torch.arange(step.logits.shape[1] - 1, device=target.device)  # (K - 1,)
        others = others + (others >= target)  # (N, K - 1): every class but the target
        pairs, rests = [], []
        for log_p in both:
            rest = log_p.gather(1, others)
            log_rest = rest.logsumexp(1, keepdim=True)
            pairs.append(torch.cat([log_p.gather(1, target), log_rest], dim=1))  # (N, 2)
            rests.append(rest - log_rest)
        between, among = _divergence(*pairs), _divergence(*rests)
        return (self.alpha * between + self.beta * among) * self.temperature**2


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)

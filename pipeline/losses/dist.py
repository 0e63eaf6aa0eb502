"""DIST: the student follows how the teacher's outputs correlate, not their values."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...quant import world
from .base import LOSSES, Step, log_probabilities, non_negative, positive


@LOSSES.register("dist")
class RelationLoss(nn.Module):
    """Distance of correlation from the teacher: between classes, and between images of a batch.

    L = T^2 * (beta * inter + gamma * intra). With p = softmax(teacher / T) and
    q = softmax(student / T), inter is 1 - Pearson's correlation of the rows of p and q, mean over
    the N images; intra is the same of their columns, mean over the K classes. It depends on the
    whole batch, that of all processes where several share it.

    Source: Huang et al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022,
    arXiv:2205.10536, section 3; T^2 as in its code. Differs from it in: a row or column
    without spread counts as uncorrelated and has no gradient, where the code's is up to 1e8 (which
    a network of few bits meets, when it gives every image the same answer).
    """

    def __init__(self, *, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__()
        self.beta = non_negative(beta, "beta")
        self.gamma = non_negative(gamma, "gamma")
        self.temperature = positive(temperature)

    def forward(self, step: Step) -> Tensor:
        """Scalar, float32; 0 .. 2 * T^2 * (beta + gamma)."""
        student, teacher = log_probabilities(step, "dist", self.temperature)
        q, p = student.exp(), teacher.exp()
        inter = 1 - correlation(q, p, dim=1).mean()
        alone = world.size() == 1
        intra = 1 - (correlation(q, p, dim=0) if alone else correlation_of_shares(q, p)).mean()
        return (self.beta * inter + self.gamma * intra) * self.temperature**2


def correlation(a: Tensor, b: Tensor, *, dim: int) -> Tensor:
    """Pearson's correlation along a dimension; 0, without gradient, where one has no spread.

    None is a spread within the rounding of float32, 1e-6 of the values' size, and one below 1e-18,
    whose square float32 does not have: a class that no image has, of probability e^-41.
    """
    ways = []  # of length 1 each: the product of two lengths may be too small for float32
    flat = torch.zeros((), dtype=torch.bool, device=a.device)
    for x in (a, b):
        own = x - x.mean(dim, keepdim=True)
        length = torch.linalg.vector_norm(own, dim=dim, keepdim=True)
        size = torch.linalg.vector_norm(x.detach(), dim=dim, keepdim=True)
        still = length <= (1e-6 * size).clamp_min(1e-18)
        ways.append(own / length.masked_fill(still, 1.0))
        flat = flat | still
    return (ways[0] * ways[1]).sum(dim).masked_fill(flat.squeeze(dim), 0.0)


def correlation_of_shares(a: Tensor, b: Tensor) -> Tensor:
    """`correlation` of the columns of a batch, (K,), of which each process has some rows."""
    rows = world.whole(len(a))
    owns, lengths = [], []
    flat = torch.zeros((), dtype=torch.bool, device=a.device)
    for x in (a, b):
        # without a gradient: that through the mean is the sum of all distances from it, which is 0
        own = x - world.summed(x.detach().sum(0)) / rows
        length = world.summed_through(own.square().sum(0)).clamp_min(1e-36).sqrt()
        size = world.summed(x.detach().square().sum(0)).sqrt()
        still = length <= (1e-6 * size).clamp_min(1e-18)
        owns.append(own)
        lengths.append(length.masked_fill(still, 1.0))
        flat = flat | still
    product = world.summed_through((owns[0] * owns[1]).sum(0))
    return (product / lengths[0] / lengths[1]).masked_fill(flat, 0.0)

"""How good a network is on a split."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Accuracy:
    """Mean cross-entropy (nats) and fractions of images right; `images` were looked at."""

    loss: float
    top1: float
    top5: float
    images: int


def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Accuracy:
    """The `accuracy` of a model in eval mode; it is left in the mode in which it was."""
    was_training = model.training
    model.eval()
    found = accuracy(model, batches)
    model.train(was_training)
    return found


@torch.inference_mode()
def accuracy(run: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]]) -> Accuracy:
    """How good that is which turns images into logits.

    Args:
        batches: images (N, C, H, W) and class numbers (N,).

    Raises:
        ValueError: there is no batch.
    """
    images, sums = 0, None
    for x, targets in batches:
        logits = run(x).float()
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices  # (N, 5)
        right = best == targets.unsqueeze(1)
        loss = F.cross_entropy(logits, targets, reduction="sum")
        batch = torch.stack([loss.double(), right[:, 0].sum().double(), right.sum().double()])
        sums = batch if sums is None else sums + batch
        images += len(targets)
    if sums is None:
        raise ValueError("nothing to evaluate: the split is empty")
    loss_sum, top1, top5 = (value / images for value in sums.tolist())
    return Accuracy(loss=loss_sum, top1=top1, top5=top5, images=images)

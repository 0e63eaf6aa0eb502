"""The optimizer of a stage and its parameter groups."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from ..quant.swap import quantizer_parameters
from .config import TrainConfig


def build_optimizer(learner: nn.Module, student: nn.Module, train: TrainConfig) -> Optimizer:
    """Three groups: weights; biases and batch norm, without decay; quantizer parameters.

    Each group holds its own base rate as "base_lr"; `set_lr` multiplies it.
    """
    steps = dict(quantizer_parameters(student))
    is_step = {id(p) for p in steps.values()}
    others = [p for p in learner.parameters() if p.requires_grad and id(p) not in is_step]
    settings, own = train.optimizer, train.quantizer_parameters
    step_lr = own.lr if own.lr is not None else settings.lr * own.lr_factor
    step_decay = own.weight_decay
    if step_decay is None:
        step_decay = settings.weight_decay * own.weight_decay_factor
    groups = [
        {
            "params": [p for p in others if p.dim() > 1],
            "lr": settings.lr,
            "weight_decay": settings.weight_decay,
        },
        {"params": [p for p in others if p.dim() <= 1], "lr": settings.lr, "weight_decay": 0.0},
        {"params": list(steps.values()), "lr": step_lr, "weight_decay": step_decay},
    ]
    for group in groups:
        group["base_lr"] = group["lr"]
    groups = [group for group in groups if group["params"]]
    if settings.name == "sgd":
        nesterov = settings.nesterov and settings.momentum > 0
        return SGD(groups, momentum=settings.momentum, nesterov=nesterov, fused=True)
    method = Adam if settings.name == "adam" else AdamW
    return method(groups, betas=settings.betas, fused=True)


def set_lr(optimizer: Optimizer, factor: float) -> None:
    """Sets every group to its base rate times a factor."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def global_norm_clip(learner: nn.Module, limit: float) -> None:
    """Scales all gradients down so that their joint L2 norm is at most `limit`."""
    torch.nn.utils.clip_grad_norm_(learner.parameters(), limit)

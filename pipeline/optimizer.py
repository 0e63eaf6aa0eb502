"""The optimizer of a stage and its parameter groups."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from ..quant.swap import quantizer_parameters, quantizers
from .config import OptimizerConfig, TrainConfig

Group = dict[str, Any]


class OptimizerPair:
    """Two optimizers that step together: weights by one method, quantizer parameters by another."""

    def __init__(self, *parts: Optimizer) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[Group]:
        """The groups of both, those of the weights first."""
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        """One step of each."""
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops all gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The state of each, in order."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state_dict` gave."""
        for part, own in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(own)


def build_optimizer(
    learner: nn.Module, student: nn.Module, train: TrainConfig
) -> Optimizer | OptimizerPair:
    """Groups: weights; biases and batch norm, without decay; quantizer parameters by their rates.

    Each group holds its own base rate as "base_lr"; `set_lr` multiplies it. Those of quantizer
    parameters have "quantizers".
    """
    decaying = {id(p) for q in quantizers(student).values() if q.decays for p in q.parameters()}
    steps = [(name, p, id(p) in decaying) for name, p in quantizer_parameters(student)]
    is_step = {id(p) for _, p, _ in steps}
    others = [p for p in learner.parameters() if p.requires_grad and id(p) not in is_step]
    settings, own = train.optimizer, train.quantizer_parameters
    weights = [
        _group([p for p in others if p.dim() > 1], settings.lr, settings.weight_decay),
        _group([p for p in others if p.dim() <= 1], settings.lr, 0.0),
    ]
    weights = [group for group in weights if group["params"]]
    scales = _quantizer_groups(steps, train)
    if own.optimizer in (None, settings.name) or not scales:
        return _method(settings, weights + scales)
    assert own.optimizer is not None
    return OptimizerPair(
        _method(settings, weights), _method(OptimizerConfig(name=own.optimizer), scales)
    )


def set_lr(optimizer: Optimizer | OptimizerPair, factor: float) -> None:
    """Sets every group to its base rate times a factor."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def rates(optimizer: Optimizer | OptimizerPair) -> dict[str, Any]:
    """The learning rate now: of the weights, and of each group of quantizer parameters."""
    steps = [group["lr"] for group in optimizer.param_groups if group.get("quantizers")]
    return {"lr": optimizer.param_groups[0]["lr"], **({"lr_quantizers": steps} if steps else {})}


def global_norm_clip(learner: nn.Module, limit: float) -> None:
    """Scales all gradients down so that their joint L2 norm is at most `limit`."""
    torch.nn.utils.clip_grad_norm_(learner.parameters(), limit)


def _quantizer_groups(
    steps: list[tuple[str, nn.Parameter, bool]], train: TrainConfig
) -> list[Group]:
    """A group for each pair of rate and decay that the settings and their rules give."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter, decays in steps:
        groups.setdefault(_rates(name, train, decays), []).append(parameter)
    return [{**_group(ps, lr, decay), "quantizers": True} for (lr, decay), ps in groups.items()]


def _rates(name: str, train: TrainConfig, decays: bool) -> tuple[float, float]:
    """Rate and decay of one quantizer parameter; the last rule that sets one wins.

    Args:
        decays: whether its method needs the weights' decay where the settings say nothing.
    """
    settings, own = train.optimizer, train.quantizer_parameters
    lr = own.lr or settings.lr * own.lr_factor
    decay = own.weight_decay
    if decay is None:
        factor = float(decays) if own.weight_decay_factor is None else own.weight_decay_factor
        decay = settings.weight_decay * factor
    for rule in own.rules:
        if not fnmatchcase(name, rule.match):
            continue
        if rule.lr_factor is not None:
            lr = settings.lr * rule.lr_factor
        if rule.weight_decay_factor is not None:
            decay = settings.weight_decay * rule.weight_decay_factor
        lr = rule.lr if rule.lr is not None else lr
        decay = rule.weight_decay if rule.weight_decay is not None else decay
    return lr, decay


def _group(parameters: list[nn.Parameter], lr: float, weight_decay: float) -> Group:
    return {"params": parameters, "lr": lr, "base_lr": lr, "weight_decay": weight_decay}


def _method(settings: OptimizerConfig, groups: list[Group]) -> Optimizer:
    if settings.name == "sgd":
        nesterov = settings.nesterov and settings.momentum > 0
        return SGD(groups, momentum=settings.momentum, nesterov=nesterov, fused=True)
    method = Adam if settings.name == "adam" else AdamW
    return method(groups, betas=settings.betas, fused=True)

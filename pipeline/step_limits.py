"""How far one gradient may move a learned step."""

from __future__ import annotations

import torch
from torch import nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors  # one call for all
from torch.optim import SGD, Optimizer

from ..quant.learned_step import LearnedStepQuantizer
from ..quant.swap import quantizers
from .optimizer import OptimizerPair

MOST = 0.2  # of the step, by one gradient, without momentum


class StepLimits:
    """Cuts the gradient of each learned step to what moves it by a small share of itself under SGD.

    The share is `MOST` (1 - momentum)^2: momentum carries a step that gradients of this size pull
    down for ever through zero if it is above (1 - momentum)^2 / 4. At momentum 0.9 it is 0.002.
    To the batch norm behind a layer the scale of its weights is nothing, so the gradient of their
    step grows as one over the step. A step that has become too small for its weights falls ever
    faster, through zero, and the next gradient throws it far beyond them (docs/studies.md: from
    0.003 to 134). Of a sound training's gradients 0 to 0.4 % are cut at 8 and 4 bits and 2 to 18 %
    at 2 and 1, where they are noisy; its accuracy stays (docs/studies.md). Adam's updates do not
    grow with the gradient, and are left as they are.

    Args:
        optimizer: with the state that it goes on with.
    """

    def __init__(self, student: nn.Module, optimizer: Optimizer | OptimizerPair) -> None:
        steps = {
            id(quantizer.scale)
            for quantizer in quantizers(student).values()
            if isinstance(quantizer, LearnedStepQuantizer)
        }
        parts = optimizer.parts if isinstance(optimizer, OptimizerPair) else (optimizer,)
        groups = [group for part in parts if isinstance(part, SGD) for group in part.param_groups]
        held = [(group, [p for p in group["params"] if id(p) in steps]) for group in groups]
        self._held = [(group, parameters) for group, parameters in held if parameters]

    @torch.no_grad()
    def hold(self) -> None:
        """To be called between the backward pass and the optimizer's step."""
        for group, parameters in self._held:
            steps = [p for p in parameters if p.grad is not None]
            if not steps or group["lr"] == 0:
                continue
            parts = [p.grad for p in steps]
            share = MOST * (1 - group["momentum"]) ** 2 / group["lr"]
            most = _flatten_dense_tensors(steps).abs().mul_(share)  # of one it is a view
            gradients = _flatten_dense_tensors(parts)
            held = gradients.clamp(-most, most)
            # writing back is half of the work; to ask a GPU would be to wait for it
            if gradients.is_cuda or not torch.equal(held, gradients):
                torch._foreach_copy_(parts, _unflatten_dense_tensors(held, parts))

"""A running average of a student's weights: where a stage ends, in place of its last step.

The steps of the optimizer scatter around a minimum, and of quantized weights some jump between
two levels until the end; the mean of many steps lies nearer to it. Batch norm's statistics are
those of other weights, and have to be estimated anew for the average.

Sources: Polyak and Juditsky, SIAM J. Control Optim. 30(4), 1992 (the average of the iterates);
Izmailov et al., UAI 2018, arXiv:1803.05407, SWA (the mean over the last part of the training).
Differs from SWA in: the learning rate goes on as scheduled, and every step counts, not one an
epoch. Tarvainen and Valpola, NeurIPS 2017, arXiv:1703.01780 (EMA of the student's weights).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from ..quant.swap import weight_layers

Average = Literal["ema", "tail"]


class WeightAverage(nn.Module):
    """The average of all parameters of a student, updated after each step of the optimizer.

    Float32 buffers under the parameters' names, "conv1/weight": part of a checkpoint, and not of
    the student. How far it is, is told by the step alone. Of a parameter that no longer learns (a
    step frozen by bin regularization) it holds the last value.

    Args:
        student: quantizers included; their buffers are not averaged.
        method: "ema", an exponential moving average; "tail", the plain mean since `start`.
        decay: of the EMA, a step; below it while the stage is young, see `ema_decay`.
        start: fraction of the stage at which the tail begins; at 1 it is the last step.
    """

    def __init__(
        self, student: nn.Module, *, method: Average, decay: float = 0.999, start: float = 0.75
    ) -> None:
        super().__init__()
        self.method = method
        self.decay = decay
        self.start = start
        self._learned: list[Tensor] = []  # a list registers nothing
        for name, parameter in student.named_parameters():
            if parameter.is_floating_point():
                self._learned.append(parameter)
                # a parameter of the student itself may be called `decay` or `put`
                own = name.replace(".", "/") if "." in name else f"/{name}"
                self.register_buffer(own, parameter.detach().float().clone())

    @torch.no_grad()
    def update(self, step: int, steps: int) -> None:
        """Takes the weights as they are now into the average.

        Args:
            step: 0-based optimizer step that was just made.
            steps: of the whole stage.
        """
        share = self.share(step, steps)
        if share == 0:
            return
        pairs = list(zip(self._means(), self._learned, strict=True))
        moving = [(mean, p.detach().float()) for mean, p in pairs if p.requires_grad]
        resting = [(mean, p) for mean, p in pairs if not p.requires_grad]
        if moving:
            torch._foreach_lerp_([m for m, _ in moving], [p for _, p in moving], share)
        if resting:
            torch._foreach_copy_([m for m, _ in resting], [p for _, p in resting])

    @torch.no_grad()
    def put(self) -> None:
        """Gives the student the average for its weights, in place."""
        torch._foreach_copy_(self._learned, self._means())

    def share(self, step: int, steps: int) -> float:
        """The weight of the newest step in the average, 0 .. 1."""
        if self.method == "ema":
            return 1 - ema_decay(self.decay, step)
        first = min(math.ceil(self.start * steps - 1e-9), steps - 1)  # 0.1 * 30 is above 3
        return 1 / (step - first + 1) if step >= first else 0.0

    def _means(self) -> list[Tensor]:
        return list(self.buffers(recurse=False))


def ema_decay(decay: float, step: int) -> float:
    """The decay at a 0-based step: at most (1 + t) / (10 + t), so that the start is soon forgotten.

    Source: the warm-up of TensorFlow's `ExponentialMovingAverage(num_updates=)`.
    """
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def note_ranges(student: nn.Module) -> None:
    """Lets weight quantizers note the range of the weights as they are now, for the hand-over.

    They do so in each training step, and these were other weights.
    """
    for layer in weight_layers(student).values():
        quantizer = layer.weight_quantizer
        assert quantizer is not None
        mode = quantizer.training
        quantizer.train()(layer.weight)
        quantizer.train(mode)

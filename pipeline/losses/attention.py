"""Attention transfer: the student looks where the teacher looks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import FEATURE_LOSSES
from .sizes import common_size, pooled


@FEATURE_LOSSES.register("attention_transfer")
class AttentionTransfer(nn.Module):
    """Squared distance between the attention maps of student and teacher.

    The map of an output (N, C, H, W) is the mean over the channels of |x|^power, (N, H * W), of
    length 1 for each image; the loss is the mean of the squared differences over N and H * W. It
    needs no equal number of channels. Where the maps differ in size, both are averaged down to the
    smaller one, which has to have more than one pixel: all maps of one are equal. Outputs of shape
    (N, C) are maps themselves, of |x|^power, and need equal sizes.

    Source: Zagoruyko and Komodakis, "Paying More Attention to Attention", ICLR 2017,
    arXiv:1612.03928, activation-based transfer, as in its code, whose loss is the sum over the
    layers times 1000. Differs from it in: maps of different sizes, and outputs of shape (N, C).
    """

    def __init__(
        self,
        student_size: Sequence[int],
        teacher_size: Sequence[int],
        generator: torch.Generator,
        *,
        power: float = 2.0,
    ) -> None:
        super().__init__()
        if not power >= 1:  # below it the gradient at 0, which a ReLU gives often, is infinite
            raise ValueError(f"power must be at least 1, not {power}")
        self.power = power
        if len(student_size) != len(teacher_size) or (
            len(student_size) == 2 and student_size[1] != teacher_size[1]
        ):
            raise ValueError(
                "attention_transfer compares maps: (N, C, H, W) on both sides, or (N, C) with "
                f"equal C, not {_text(student_size)} and {_text(teacher_size)}; use fitnets"
            )
        self.size = common_size(student_size, teacher_size)
        if len(student_size) == 4 and self.size == (1, 1):
            raise ValueError(
                "attention_transfer compares where in a map the strength lies, and one of "
                f"{_text(student_size)} and {_text(teacher_size)} has one pixel only; use fitnets"
            )

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Scalar, float32; 0 .. 2 / (H * W)."""
        return F.mse_loss(self._map(student), self._map(teacher))

    def _map(self, x: Tensor) -> Tensor:
        x = x.float()
        strength = x * x if self.power == 2 else x.abs() ** self.power
        if x.dim() == 4:
            strength = pooled(strength.mean(1, keepdim=True), self.size).flatten(1)  # (N, H*W)
        return F.normalize(strength, dim=1)


def _text(size: Sequence[int]) -> str:
    return f"({', '.join(['N', *map(str, size[1:])])})"

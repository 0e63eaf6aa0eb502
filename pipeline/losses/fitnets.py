"""FitNets: the student's inner layers give hints of the teacher's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import FEATURE_LOSSES
from .sizes import common_size, pooled


@FEATURE_LOSSES.register("fitnets")
class Hint(nn.Module):
    """Mean squared difference between a layer of the student, projected, and one of the teacher.

    Where the numbers of channels differ, a 1x1 convolution with bias, learned with the student,
    takes the student's to the teacher's. Where the maps differ in size, both are averaged down to
    the smaller one. An output of shape (N, C) counts as a map of one pixel.

    Source: Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, arXiv:1412.6550,
    equation 3. Differs from it in: the mean over all values, not half their sum; a 1x1 projection
    without a nonlinearity, only where it is needed; trained along with the other losses, not in a
    stage before them.

    Attributes:
        weight, bias: (C of the teacher, C of the student, 1, 1) and (C of the teacher,); or None.
    """

    def __init__(
        self,
        student_size: Sequence[int],
        teacher_size: Sequence[int],
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.size = common_size(student_size, teacher_size)
        self.weight = self.bias = None
        own, other = student_size[1], teacher_size[1]
        if own != other:
            start = torch.randn((other, own, 1, 1), generator=generator) / own**0.5
            self.weight = nn.Parameter(start)
            self.bias = nn.Parameter(torch.zeros(other))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Scalar, float32, in squared units of the teacher's output."""
        student = pooled(student.float(), self.size)
        if self.weight is not None:  # after pooling, which it commutes with: fewer pixels
            student = F.conv2d(student, self.weight, self.bias)
        return F.mse_loss(student.float(), pooled(teacher.float(), self.size))

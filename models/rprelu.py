"""ReActNet's activation, whose output has both signs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RPReLU(nn.Module):
    """Learned shift, PReLU with a learned slope, learned shift; each for every channel.

    A quantizer behind it sees signed values whose distribution it can move: the input path of
    ReActNet's sign activations and of N2UQ.

    Args:
        channels: C of the inputs (N, C, H, W).

    Source: Liu et al., ReActNet, ECCV 2020, arXiv:2003.03488, equation 4. Differs from it in:
        nothing; the parameters have one axis, so that the optimizer takes them for biases.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift_in = nn.Parameter(torch.zeros(channels))
        self.slope = nn.Parameter(torch.full((channels,), 0.25))
        self.shift_out = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        shifted = F.prelu(x + self.shift_in.view(-1, 1, 1), self.slope)
        return shifted + self.shift_out.view(-1, 1, 1)

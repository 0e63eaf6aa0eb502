"""Where the codes of an input quantizer change, found by asking it: no method is left out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core import QTensor, Quantizer

LARGEST = 3.4028234e38  # float32
STEPS = 33  # halvings of all float32 numbers


@dataclass(frozen=True)
class Staircase:
    """What a monotone quantizer does with a float32 input, exactly.

    Attributes:
        thresholds: (groups, levels - 1), ascending: code k begins at the k-th, itself included;
            infinity where no number has it. One group, or one for each channel.
        levels: (levels,) or (groups, levels), float32: what the codes stand for.
        coding: of the zeros, whose scale and zero point are those of any input.
    """

    thresholds: Tensor
    levels: Tensor
    coding: QTensor


@torch.no_grad()
def staircase(quantizer: Quantizer) -> Staircase:
    """The thresholds of an input quantizer, by bisection over all float32 numbers.

    Raises:
        ValueError: its codes do not rise with the input.
    """
    device = next((t.device for t in (*quantizer.parameters(), *quantizer.buffers())), None)
    beside = [-1 if axis == quantizer.site.channel_axis % 4 else 1 for axis in range(4)]
    channels = quantizer.site.channels

    def codes(x: Tensor) -> Tensor:
        """Of (rows, channels)."""
        shaped = torch.stack([row.view(beside) for row in x]).squeeze(1)
        return quantizer.encode(shaped).codes.reshape(len(x), channels).long()

    zeros = torch.zeros(1, channels, device=device)
    shape = [1] * 4
    shape[quantizer.site.channel_axis] = channels
    coding = quantizer.encode(torch.zeros(shape, device=device))
    wanted = torch.arange(1, coding.num_levels, device=device).unsqueeze(1)  # (L - 1, 1)
    low = _place(zeros - LARGEST).expand(len(wanted), channels).clone()
    high = _place(zeros + LARGEST).expand(len(wanted), channels).clone()
    never = codes(_number(high)) < wanted
    always = codes(_number(low)) >= wanted
    for _ in range(STEPS):
        middle = (low + high) // 2
        reached = codes(_number(middle)) >= wanted
        high = torch.where(reached, middle, high)
        low = torch.where(reached, low, middle)
    found = _number(high).masked_fill(never, torch.inf).masked_fill(always, -torch.inf).t()
    if bool((found.diff(dim=1) < 0).any()):
        raise ValueError(f"{type(quantizer).__name__} is not monotone")
    if bool((found == found[:1]).all()):
        found = found[:1]
    return Staircase(found.contiguous(), coding.levels().squeeze(0), coding)


def _place(x: Tensor) -> Tensor:
    """Float32 numbers by their order, int64; both zeros have the same place."""
    bits = x.contiguous().view(torch.int32).long()
    return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def _number(place: Tensor) -> Tensor:
    """The inverse of `_place`."""
    bits = torch.where(place < 0, (-place) | 0x80000000, place)
    return bits.to(torch.uint32).view(torch.float32)

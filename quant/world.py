"""The processes that train on one batch together, each on a part of it.

Wherever `torch.distributed` is not set up there is one process, and everything here is free.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_part: tuple[int, int] | None = None  # images of the batch: here, and in all processes


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def set_part(here: int, in_all: int) -> None:
    """Says how many images of a step's batch this process has, of how many; before the step.

    Until it is called all processes are taken to have as many.
    """
    global _part
    _part = here, in_all


def ratio() -> float:
    """How many times as large as this process' part the whole batch is."""
    if size() == 1:
        return 1.0
    return float(size()) if _part is None else _part[1] / _part[0]


def whole(count: int) -> int:
    """What a count over this process' part of the batch would be over all of it."""
    if size() == 1:
        return count
    return count * size() if _part is None else count * _part[1] // _part[0]


def summed(x: Tensor) -> Tensor:
    """The sum over all processes, on each of them; no gradient. In place."""
    if size() > 1:
        dist.all_reduce(x)
    return x


def summed_through(x: Tensor) -> Tensor:
    """The same sum with a gradient, for a loss that is one of the whole batch, on each process.

    The gradient goes to this process' part, and so that the mean over the processes, each weighed
    by its images, is that of the loss.
    """
    return x if size() == 1 else _Sum.apply(x)


def extremes(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest of all processes' first and the highest of their second, on each of them."""
    if size() == 1:
        return low, high
    both = torch.stack([-low, high])
    dist.all_reduce(both, dist.ReduceOp.MAX)
    return -both[0], both[1]


def of_first(*values: float) -> tuple[float, ...]:
    """The values that the first process gives, on every process."""
    if size() == 1:
        return values
    told = torch.tensor(values, dtype=torch.float64)
    dist.broadcast(told, 0)
    return tuple(told.tolist())


def gathered(x: Tensor) -> list[Tensor]:
    """What each process gives, of one shape, on the CPU; in order of rank, on every process."""
    parts = [torch.empty_like(x) for _ in range(size())]
    dist.all_gather(parts, x)
    return parts


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return summed(x.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ratio()

"""A network that is compiled for one size of batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

BACKEND = "inductor"


class FullBatches:
    """Runs a network compiled on batches of one size, and as it is on all others.

    An epoch's last batch is smaller; compiling for it would cost as much as for the others.

    Args:
        size: images in a full batch.
        graphs: whether to run it as CUDA graphs, recorded once and replayed; begin each step with
            `torch.compiler.cudagraph_mark_step_begin()`.
    """

    def __init__(self, network: nn.Module, size: int, *, graphs: bool = False) -> None:
        self._network, self._size = network, size
        self._compiled: Callable[[Tensor], Tensor] = torch.compile(
            network,
            dynamic=False,
            backend=BACKEND,
            mode="reduce-overhead" if graphs else None,
        )

    def __call__(self, x: Tensor) -> Tensor:
        """What the network gives, (N, K)."""
        return (self._compiled if len(x) == self._size else self._network)(x)

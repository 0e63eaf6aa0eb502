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
    """

    def __init__(self, network: nn.Module, size: int) -> None:
        self._network, self._size = network, size
        self._compiled: Callable[[Tensor], Tensor] = torch.compile(
            network, dynamic=False, backend=BACKEND
        )

    def __call__(self, x: Tensor) -> Tensor:
        """What the network gives, (N, K)."""
        return (self._compiled if len(x) == self._size else self._network)(x)

"""Teachers' logits of all training images, for stages whose images never vary."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from .data.split import Split
from .distributed import own_share


class CachedLogits:
    """What each teacher says of the images of a step.

    The batches of an epoch are a function of its number and the seed, so the step's number tells
    which images they hold.

    Args:
        tables: for each teacher its logits, (M, K), in the order of the split, on one device.
        split: the training images.
        batch_size: that they are trained in; seed: that their order comes from.
    """

    def __init__(
        self, tables: Sequence[Tensor], split: Split, *, batch_size: int, seed: int
    ) -> None:
        self.tables = list(tables)
        self._split, self._batch_size, self._seed = split, batch_size, seed
        self._epoch: int | None = None
        self._order = torch.empty(0)

    def of_step(self, step: int, left_out: frozenset[int] = frozenset()) -> list[Tensor | None]:
        """Each teacher's logits of the step's batch, (N, K); None for one that is left out.

        Of a batch that processes share, those of this one's part.

        Args:
            step: 0-based, within the stage.
        """
        share = own_share()
        per_epoch = self._split.num_batches(self._batch_size, shares=share.of)
        epoch, batch = divmod(step, per_epoch)
        if epoch != self._epoch:
            order = self._split.order(
                self._batch_size, seed=self._seed, epoch=epoch, shares=share.of
            )
            self._epoch, self._order = epoch, order.to(self.tables[0].device)
        chosen = self._order[batch * self._batch_size : (batch + 1) * self._batch_size]
        chosen = share.part(chosen)
        return [
            None if number in left_out else table[chosen]
            for number, table in enumerate(self.tables)
        ]


def logits_of(
    network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], dtype: torch.dtype
) -> Tensor:
    """A network's logits of all images of some batches: (M, K), float32.

    Args:
        batches: images (N, C, H, W) and class numbers (N,).
        dtype: that the network computes in.
    """
    with torch.inference_mode():
        logits = torch.cat([network(x.to(dtype)).float() for x, _ in batches])
    return logits.clone()  # one that autograd may save

"""Samples of one purpose, handed out in batches whose order and look the seed decides."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from .augment import Augmentation, Draws, normalise
from .order import Share, permutation, without_lone_sample

Batch = tuple[Tensor, Tensor]
Device = torch.device | str


class Split(ABC):
    """The training, the validation or the test samples.

    A batch is (x, y): float32 images, normalised, (N, C, H, W), channels-last in memory, and
    int64 labels, (N,), both on the device asked for. Nothing here touches the global generator.

    Attributes:
        labels: (N,) int64, on the CPU.
        augmentation: what `batches` does to the images where it is asked to augment.
        varies: whether a sample then looks different from epoch to epoch.
    """

    def __init__(
        self,
        labels: Tensor,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        augmentation: Augmentation,
    ) -> None:
        self.labels = labels.to("cpu", torch.int64)
        self.mean = mean
        self.std = std
        self.augmentation = augmentation
        self.varies = augmentation.varies

    def __len__(self) -> int:
        return len(self.labels)

    def num_batches(self, batch_size: int, *, shares: int = 1) -> int:
        """How many batches an epoch of training has where so many processes share each."""
        return -(-without_lone_sample(len(self), batch_size, shares=shares) // batch_size)

    def images_in(self, batch: int, batch_size: int, *, shares: int = 1) -> int:
        """How many samples batch number `batch` of an epoch has, all shares together."""
        used = without_lone_sample(len(self), batch_size, shares=shares)
        return min(batch_size, used - batch * batch_size)

    def order(self, batch_size: int, *, seed: int, epoch: int, shares: int = 1) -> Tensor:
        """Which samples an epoch of training uses, in the order of its batches: (M,) int64, CPU.

        A function of (seed, epoch); batch n holds those from n * batch_size on.
        """
        used = without_lone_sample(len(self), batch_size, shares=shares)
        return permutation(len(self), seed, epoch)[:used]

    def batches(
        self,
        batch_size: int,
        *,
        seed: int,
        epoch: int,
        augment: bool,
        device: Device,
        start: int = 0,
        share: Share | None = None,
    ) -> Iterator[Batch]:
        """One epoch of training, from batch `start` on; the batches before it cost nothing.

        The order is a function of (seed, epoch), the look of a sample one of (seed, epoch,
        index). The last batch may be smaller; one that would hold a single sample is left out
        (batch norm fails on it). With a share only its part of each batch is decoded and given.
        """
        share = share or Share()
        last = self.num_batches(batch_size, shares=share.of)
        if not 0 <= start <= last:
            raise ValueError(f"start must be from 0 to {last}, not {start}")
        order = self.order(batch_size, seed=seed, epoch=epoch, shares=share.of)
        order = order[start * batch_size :]
        if share.of > 1 and len(order):
            order = torch.cat([share.part(batch) for batch in order.split(batch_size)])
            batch_size = share.size(batch_size)  # that of the last batch is not larger
        key = (seed, epoch) if augment else None
        return self._batches(order, batch_size, torch.device(device), key)

    def evaluation_batches(self, batch_size: int, device: Device) -> Iterator[Batch]:
        """Every sample once, in the order of the set, as it is."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        return self.samples(torch.arange(len(self)), batch_size, device)

    def samples(self, numbers: Tensor, batch_size: int, device: Device) -> Iterator[Batch]:
        """The samples of these numbers, (M,) int64, in their order, as they are."""
        return self._batches(numbers, batch_size, torch.device(device))

    def calibration(
        self, batch_size: int, num_batches: int, *, seed: int, augment: bool, device: Device
    ) -> Iterator[Batch]:
        """Batches of different samples, chosen by the seed; augmented as in the first epoch.

        Statistics for a network that was trained on augmented images are those of such images:
        batch norm re-estimated without crops and flips cost a ResNet-20 up to 9 points of CIFAR-10
        (`benchmarks/batch_norm_images.py`).
        Fewer than `num_batches` where the split does not hold as many samples.
        """
        wanted = min(len(self), num_batches * batch_size)
        order = permutation(len(self), seed, "calibration")
        order = order[: without_lone_sample(wanted, batch_size)]
        key = (seed, 0) if augment else None
        return self._batches(order, batch_size, torch.device(device), key)

    def _batches(
        self,
        order: Tensor,
        batch_size: int,
        device: torch.device,
        key: tuple[int, int] | None = None,
    ) -> Iterator[Batch]:
        """The samples of `order` in batches; `key` is the (seed, epoch) of what is augmented."""
        if not len(order):
            return
        draws = None if key is None else self.augmentation.draw(len(self), *key)
        mean, std = (torch.tensor(v, device=device) for v in (self.mean, self.std))
        labels = self.labels[order].to(device)
        drawn = None if draws is None else draws.at(order).to(device)
        first = 0
        for pixels, chosen in self._pixels(order, batch_size, device, key):
            batch = slice(first, first + len(chosen))
            first = batch.stop
            if drawn is None:
                images = pixels[chosen]
            else:
                images = self.augmentation.apply(pixels, chosen, _slice(drawn, batch))
            yield normalise(images, mean, std), labels[batch]

    @abstractmethod
    def _pixels(
        self, order: Tensor, batch_size: int, device: torch.device, key: tuple[int, int] | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """For every batch: images uint8 (M, H, W, C) on the device, and which of them it is."""


class TensorSplit(Split):
    """A split that lives in memory, as one uint8 tensor on the device that asks for it.

    Args:
        images: uint8, (N, C, H, W), square.
        labels: (N,).
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        augmentation: Augmentation | None = None,
    ) -> None:
        super().__init__(labels, mean=mean, std=std, augmentation=augmentation or Augmentation())
        if images.dtype != torch.uint8 or images.dim() != 4 or len(images) != len(labels):
            raise ValueError(
                f"images must be uint8 (N, C, H, W), a label each; not {images.dtype} "
                f"{tuple(images.shape)} and {len(labels)} labels"
            )
        self.augmentation.check(images.shape[2])
        self._rows = images.permute(0, 2, 3, 1).contiguous()  # (N, H, W, C)

    @property
    def images(self) -> Tensor:
        """All images as they are: uint8, (N, C, H, W), channels-last in memory."""
        return self._rows.permute(0, 3, 1, 2)

    def _pixels(
        self, order: Tensor, batch_size: int, device: torch.device, key: tuple[int, int] | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        # kept there: a run trains and evaluates on one device, so they move once
        rows = self._rows = self._rows.to(device)
        for chosen in order.to(device).split(batch_size):
            yield rows, chosen


def _slice(draws: Draws, batch: slice) -> Draws:
    return Draws(draws.down[batch], draws.right[batch], draws.flip[batch])

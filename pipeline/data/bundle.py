"""What a data set is: three splits, and what a model and a stage key must know of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...quant.registry import Registry
from .augment import Augmentation
from .split import Split, TensorSplit
from .splits import stratified_split


class DataError(ValueError):
    """Data that are missing or unusable; the message says what to do."""


@dataclass(frozen=True)
class DataBundle:
    """A data set, ready to train on.

    Attributes:
        train: what the weights are fitted to.
        validation: what choices are made on.
        test: read once, at the end.
        class_names: by label.
        in_channels: 1 or 3.
        image_size: height and width in pixels.
        fingerprint: hash of the data and of every option that changes a number.
        mean: per channel, of pixels in 0..1, taken off before training.
        std: per channel, divided by.
    """

    train: Split
    validation: Split
    test: Split
    num_classes: int
    class_names: tuple[str, ...]
    in_channels: int
    image_size: int
    fingerprint: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


DATASETS: Registry[Callable[..., DataBundle]] = Registry("data set")


def bundle_tensors(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    validation: float | int,
    split_seed: int,
    augmentation: Augmentation,
    class_names: tuple[str, ...],
    fingerprint: str,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> DataBundle:
    """A bundle in memory, from (images uint8 (N, C, H, W), labels (N,)) pairs.

    The validation split is taken off the training images. Without published statistics, mean
    and std are those of the training images that remain.
    """
    images, labels = train
    kept, held_out = stratified_split(labels, validation, seed=split_seed)
    if mean is None or std is None:
        mean, std = channel_statistics(images[kept].permute(0, 2, 3, 1))

    def split(images: Tensor, labels: Tensor) -> TensorSplit:
        return TensorSplit(images, labels, mean=mean, std=std, augmentation=augmentation)

    return DataBundle(
        train=split(images[kept], labels[kept]),
        validation=split(images[held_out], labels[held_out]),
        test=split(*test),
        num_classes=len(class_names),
        class_names=class_names,
        in_channels=images.shape[1],
        image_size=images.shape[2],
        fingerprint=fingerprint,
        mean=mean,
        std=std,
    )


def channel_statistics(pixels: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of uint8 (N, H, W, C), in units of 255.

    Rounded to four decimals, so that they can be written down; a constant channel has std 1.
    """
    # counted, not summed: exact, and no copy eight times the size of the images
    channels = [torch.bincount(c.flatten(), minlength=256) for c in pixels.unbind(-1)]
    values = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for counts in channels:
        shares = counts / counts.sum()
        centre = (shares * values).sum()
        mean.append(round(float(centre), 4))
        std.append(round(float((shares * (values - centre).square()).sum().sqrt()), 4) or 1.0)
    return tuple(mean), tuple(std)

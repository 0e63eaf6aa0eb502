"""Pad-crop and flip of whole batches of uint8 images, on the device that they lie on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .order import generator_of

Padding = Literal["zero", "reflect"]


@dataclass(frozen=True)
class Draws:
    """What is done to each sample; all (N,), on one device.

    Attributes:
        down: the crop's window lies so many pixels lower than the image, -crop .. crop.
        right: the same to the right.
        flip: whether the cropped image is mirrored left to right.
    """

    down: Tensor
    right: Tensor
    flip: Tensor

    def to(self, device: torch.device) -> Draws:
        """The same draws on another device."""
        return Draws(self.down.to(device), self.right.to(device), self.flip.to(device))

    def at(self, chosen: Tensor) -> Draws:
        """The draws of the chosen samples."""
        return Draws(self.down[chosen], self.right[chosen], self.flip[chosen])


@dataclass(frozen=True)
class Augmentation:
    """How training images vary.

    Attributes:
        crop: pixels that the image is padded by on each side before a window of the old size
            is cut out of it at random; 0 for none.
        flip: mirror half of the images left to right.
        padding: black, or the image reflected at its edge.
    """

    crop: int = 0
    flip: bool = False
    padding: Padding = "zero"

    def check(self, image_size: int) -> None:
        """Raises ValueError if the crop does not suit images of this size."""
        if not 0 <= self.crop < image_size:
            raise ValueError(
                f"crop must be from 0 to {image_size - 1} for images of {image_size} pixels, "
                f"not {self.crop}"
            )
        if self.padding not in ("zero", "reflect"):
            raise ValueError(f"padding must be 'zero' or 'reflect', not {self.padding!r}")

    @property
    def varies(self) -> bool:
        """Whether it does anything."""
        return self.crop > 0 or self.flip

    def draw(self, num_samples: int, seed: int, epoch: int) -> Draws | None:
        """One epoch's draws for every sample, in the order of the set; None if nothing varies.

        They hang on (seed, epoch, index) alone, so batch size, order and a resume in mid-epoch
        leave them as they are.
        """
        if not self.varies:
            return None
        generator = generator_of(seed, epoch, "augment")
        shape = (2, num_samples)
        down, right = torch.randint(-self.crop, self.crop + 1, shape, generator=generator)
        coin = torch.rand(num_samples, generator=generator) < 0.5
        return Draws(down, right, coin if self.flip else torch.zeros_like(coin))

    def apply(self, pixels: Tensor, chosen: Tensor, draws: Draws) -> Tensor:
        """The chosen images, each cropped and flipped as drawn.

        Choosing, padding, cropping and flipping are one gather: no padded copy is made.

        Args:
            pixels: uint8, (M, H, W, C), contiguous.
            chosen: indices into `pixels`, (N,).
            draws: those of the chosen images.

        Returns:
            uint8, (N, H, W, C).
        """
        _, height, width, channels = pixels.shape
        down_to = torch.arange(height, device=pixels.device)
        right_to = torch.arange(width, device=pixels.device)
        rows = down_to + draws.down[:, None]  # (N, H)
        columns = torch.where(draws.flip[:, None], right_to.flip(0), right_to)
        columns = columns + draws.right[:, None]  # (N, W)
        rows, row_inside = self._into(rows, height)
        columns, column_inside = self._into(columns, width)

        source = (chosen[:, None] * height + rows)[:, :, None] * width + columns[:, None, :]
        cropped = pixels.view(-1, channels).index_select(0, source.flatten())
        cropped = cropped.view(len(chosen), height, width, channels)
        if self.padding == "reflect":
            return cropped
        return cropped.mul_((row_inside[:, :, None] & column_inside[:, None, :]).unsqueeze(-1))

    def _into(self, places: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Places brought into 0 .. size-1, and which of them were there already."""
        inside = (places >= 0) & (places < size)
        if self.padding == "reflect":
            last = size - 1
            return last - (last - places.abs()).abs(), inside
        return places.clamp(0, size - 1), inside


def normalise(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(pixels / 255 - mean) / std per channel: uint8 (N, H, W, C) -> float32 (N, C, H, W).

    The result is channels-last in memory.
    """
    values = pixels.to(torch.float32).div_(255).sub_(mean).div_(std)
    return values.permute(0, 3, 1, 2)

"""A split that does not fit in memory: images are decoded as they are needed, by workers."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .augment import Augmentation
from .bundle import DataError
from .decode import open_image, pixels_of, read_pixels
from .order import seed_of
from .split import Split

Request = tuple[int, int | None]  # index of a file; the seed of its augmentation, if there is one


@dataclass(frozen=True)
class ImageFiles(Dataset[Tensor]):
    """Files that decode to uint8 (size, size, C).

    Attributes:
        files: where they are.
        size: height and width of what comes out.
        resize: scale and cut each image to that; otherwise it must have the size.
        channels: 1 or 3.
        resized_crop: where augmented, a window of random shape is scaled to the size; this is
            its least share of the area. None: images are only decoded here.
    """

    files: tuple[str, ...]
    size: int
    resize: bool
    channels: int
    resized_crop: float | None = None

    def __len__(self) -> int:
        return len(self.files)

    def only(self, chosen: Tensor) -> ImageFiles:
        """The chosen ones of these files."""
        return replace(self, files=tuple(self.files[i] for i in chosen.tolist()))

    def __getitem__(self, request: Request) -> Tensor:
        index, seed = request
        file = self.files[index]
        try:
            if seed is None or self.resized_crop is None:
                return read_pixels(file, size=self.size, resize=self.resize, channels=self.channels)
            return self._random_window(file, seed)
        except Exception as error:  # PIL's plug-ins raise all kinds
            message = f"{file} cannot be used ({error}); repair or remove it"
            raise DataError(message) from error

    def _random_window(self, file: str, seed: int) -> Tensor:
        from torchvision.transforms import v2

        assert self.resized_crop is not None
        window = v2.RandomResizedCrop(self.size, scale=(self.resized_crop, 1.0), antialias=True)
        image = open_image(file, self.channels)
        with torch.random.fork_rng(devices=[]):  # v2 takes no generator
            torch.manual_seed(seed)
            return pixels_of(window(image))


class LoaderSplit(Split):
    """A split whose images are decoded for every batch.

    With `resized_crop=None` its batches equal those of a `TensorSplit` of the same images.

    Args:
        files: the images.
        labels: (N,).
        workers: processes that decode; 0: this one.
    """

    def __init__(
        self,
        files: ImageFiles,
        labels: Tensor,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        augmentation: Augmentation | None = None,
        workers: int = 0,
    ) -> None:
        super().__init__(labels, mean=mean, std=std, augmentation=augmentation or Augmentation())
        self.augmentation.check(files.size)
        self.varies = self.varies or files.resized_crop is not None
        self.files = files
        self.workers = workers

    def _pixels(
        self, order: Tensor, batch_size: int, device: torch.device, key: tuple[int, int] | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        loader = DataLoader(
            self.files,
            # a batch is a list of requests, so the workers need not know of seed and epoch
            batch_sampler=self._requests(order, batch_size, key),
            num_workers=self.workers,
            multiprocessing_context=_forkserver() if self.workers else None,
            worker_init_fn=die_with_trainer,
            pin_memory=device.type == "cuda",
            # else every iterator draws from the global generator, and a resume would differ
            generator=torch.Generator().manual_seed(0),
        )
        for pixels in loader:
            yield pixels.to(device, non_blocking=True), torch.arange(len(pixels), device=device)

    def _requests(
        self, order: Tensor, batch_size: int, key: tuple[int, int] | None
    ) -> Iterator[list[Request]]:
        for batch in order.split(batch_size):
            yield [(i, seed_of(*key, i) if key else None) for i in batch.tolist()]


def die_with_trainer(_worker: int) -> None:
    """Makes a worker die at once when the process that trains does, even by SIGKILL.

    Neither a parent-death signal nor torch's own watchdog would: the worker's parent is the fork
    server, which lives as long as its workers.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # at Ctrl-C the trainer saves, and needs batches
    trainer = multiprocessing.parent_process()
    assert trainer is not None

    def watch() -> None:
        trainer.join()  # waits for the end of a pipe that only the trainer holds
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _forkserver() -> multiprocessing.context.BaseContext:
    """Workers come from a server that has torch imported: 0.1 s instead of 3 s each.

    Plain fork fails inside a Prefect task, and after CUDA has started.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context

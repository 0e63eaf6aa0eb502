"""Any directory tree of images by class."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..cores import usable_cores
from .augment import Augmentation, Padding
from .bundle import DATASETS, DataBundle, DataError, channel_statistics
from .decode import OnError, check_all, read_all, size_of_first
from .fingerprint import CONTENTS, fingerprint
from .image_cache import Decoded, decoded_once
from .listing import ImageListing, list_images, list_images_now
from .loader import ImageFiles, LoaderSplit
from .split import Split, TensorSplit
from .splits import stratified_split

CACHE_VERSION = 1  # raised when the decoder gives other pixels
MAX_WORKERS = 8
NUM_STATISTICS_IMAGES = 4096  # mean and std are those of so many, at even distances


@DATASETS.register("image_folder")
def image_folder(
    *,
    root: Path,
    image_size: int | None = None,
    channels: Literal[1, 3] = 3,
    test: float | int = 0.2,
    validation: float | int = 0.1,
    split_seed: int = 0,
    crop: int = 4,
    flip: bool = True,
    padding: Padding = "zero",
    resized_crop: float | None = None,
    on_error: OnError = "fail",
    in_memory: Literal["auto"] | bool = "auto",
    memory_limit: int = 2 * 2**30,
    workers: int | None = None,
    cache: Path | None = None,
) -> DataBundle:
    """Images in one folder a class, below `train`, `test` (and `val`) or all in one tree.

    What has no folder of its own is split off the rest: `test`, then `validation`. Without
    `image_size` all images must have the size of the first; with it, each is scaled (shorter
    side, antialiased) and cut around its centre. `resized_crop` takes the place of `crop`: a
    random window of at least that share of the area, scaled (0.08 is usual for ImageNet).

    Decoded once, kept in the folder `cache`, and held in memory; images that would need more
    than `memory_limit` bytes are decoded by `workers` processes as they are needed instead. The
    numbers are the same either way.
    """
    options = dict(locals())  # first of all, while it holds the options and nothing else
    _check(image_size, channels, resized_crop, on_error, in_memory)
    listing = list_images(root)
    paths = listing.files()
    size = image_size or size_of_first(paths)
    files = ImageFiles(paths, size, image_size is not None, channels, resized_crop)
    if in_memory == "auto":
        in_memory = resized_crop is None and len(files) * size**2 * channels <= memory_limit

    if in_memory:
        pixels, good = _decoded(listing, files, on_error, cache)
    else:
        pixels, good = None, check_all(paths, size=size, resize=files.resize, on_error=on_error)
    train, held_out, tested = _partition(listing, good, test, validation, split_seed)

    sample = train[:: -(-len(train) // NUM_STATISTICS_IMAGES)]
    mean, std = channel_statistics(_read(files, sample) if pixels is None else pixels[sample])
    augmentation = Augmentation(0 if resized_crop else crop, flip, padding)
    all_labels = torch.tensor(listing.labels)
    if workers is None:
        workers = min(usable_cores(), MAX_WORKERS)

    def split(chosen: Tensor) -> Split:
        labels = all_labels[chosen]
        if pixels is not None:
            images = pixels[chosen].permute(0, 3, 1, 2)
            return TensorSplit(images, labels, mean=mean, std=std, augmentation=augmentation)
        return LoaderSplit(
            files.only(chosen),
            labels,
            mean=mean,
            std=std,
            augmentation=augmentation,
            workers=workers,
        )

    return DataBundle(
        train=split(train),
        validation=split(held_out),
        test=split(tested),
        num_classes=len(listing.classes),
        class_names=listing.classes,
        in_channels=channels,
        image_size=size,
        fingerprint=fingerprint("image_folder", options),
        mean=mean,
        std=std,
    )


@CONTENTS.register("image_folder")
def image_folder_content(*, root: Path) -> str:
    """The hash of sorted paths, sizes and times of change."""
    return list_images(root).content


def _check(
    image_size: int | None,
    channels: int,
    resized_crop: float | None,
    on_error: str,
    in_memory: Literal["auto"] | bool,
) -> None:
    if image_size is not None and image_size < 1:
        raise DataError(f"image_size must be at least 1, not {image_size}")
    if channels not in (1, 3):
        raise DataError(f"channels must be 1 (grey) or 3 (RGB), not {channels}")
    if on_error not in ("fail", "skip"):
        raise DataError(f"on_error must be 'fail' or 'skip', not {on_error!r}")
    if resized_crop is None:
        return
    if not 0 < resized_crop <= 1:
        raise DataError(f"resized_crop is a share of the area, above 0 to 1, not {resized_crop}")
    if image_size is None:
        raise DataError("resized_crop needs image_size, the size that the windows are scaled to")
    if in_memory is True:
        raise DataError("resized_crop cuts the original images; it needs in_memory: false or auto")


def _decoded(
    listing: ImageListing, files: ImageFiles, on_error: OnError, cache: Path | None
) -> Decoded:
    """All images, from the cache if it has them."""

    def decode() -> Decoded:
        decoded = read_all(
            files.files,
            size=files.size,
            resize=files.resize,
            channels=files.channels,
            on_error=on_error,
        )
        # else the cache would hold new images under the old fingerprint
        if list_images_now(listing.root).content != listing.content:
            raise DataError(f"{listing.root} changed while it was read; start again")
        return decoded

    key = (CACHE_VERSION, str(listing.root), listing.content, files.size, files.resize)
    key_hash = hashlib.sha256(repr((*key, files.channels, on_error)).encode()).hexdigest()
    return decoded_once(_cache_folder(cache) / f"images-{key_hash[:16]}.safetensors", decode)


def _cache_folder(cache: Path | None) -> Path:
    if cache is not None:
        return Path(cache).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("bitladder"))


def _partition(
    listing: ImageListing, good: Tensor, test: float | int, validation: float | int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of the training, validation and test images among those that can be used."""
    indices: dict[str, list[int]] = {"all": [], "train": [], "validation": [], "test": []}
    for index, (part, usable) in enumerate(zip(listing.parts, good.tolist(), strict=True)):
        if usable:
            indices[part].append(index)
    labels = torch.tensor(listing.labels)
    train = torch.tensor(indices["all"] or indices["train"], dtype=torch.int64)
    parts = {}
    for name, share in (("test", test), ("validation", validation)):
        if indices[name]:
            parts[name] = torch.tensor(indices[name])
        else:
            kept, held_out = stratified_split(labels[train], share, seed=seed, name=name)
            train, parts[name] = train[kept], train[held_out]
    counts = torch.bincount(labels[train], minlength=len(listing.classes)).tolist()
    lost = [name for name, count in zip(listing.classes, counts, strict=True) if not count]
    if lost:
        raise DataError(f"{listing.root}: no training image is left of {', '.join(lost[:10])}")
    return train, parts["validation"], parts["test"]


def _read(files: ImageFiles, chosen: Tensor) -> Tensor:
    """The chosen images, uint8 (N, H, W, C)."""
    pixels, _ = read_all(
        files.only(chosen).files,
        size=files.size,
        resize=files.resize,
        channels=files.channels,
        on_error="fail",
    )
    return pixels

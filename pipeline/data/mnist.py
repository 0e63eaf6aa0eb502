"""MNIST and Fashion-MNIST, from the IDX files on disk or by torchvision's download."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from torch import Tensor

from .augment import Augmentation, Padding
from .bundle import DATASETS, DataBundle, DataError, bundle_tensors
from .fingerprint import CONTENTS, fingerprint
from .idx import read_idx
from .splits import stratified_split


@dataclass(frozen=True)
class IdxSet:
    """A data set of four IDX files, and what is published about it.

    Attributes:
        title: its name in messages, and torchvision's name of the class.
        folders: where its files may lie below `root`.
        classes: names by label.
        mean: of all training pixels in 0..1.
        std: the same.
    """

    title: str
    folders: tuple[str, ...]
    classes: tuple[str, ...]
    mean: float
    std: float


MNIST = IdxSet("MNIST", ("", "MNIST/raw", "mnist"), tuple("0123456789"), 0.1307, 0.3081)
FASHION_MNIST = IdxSet(
    "FashionMNIST",
    ("", "FashionMNIST/raw", "fashion-mnist", "fashion_mnist"),
    (
        "T-shirt/top",
        "trouser",
        "pullover",
        "dress",
        "coat",
        "sandal",
        "shirt",
        "sneaker",
        "bag",
        "ankle boot",
    ),
    0.2860,
    0.3530,
)
FILES = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")


@DATASETS.register("mnist")
def mnist(
    *,
    root: Path = Path("data"),
    download: bool = True,
    limit: int | None = None,
    validation: float | int = 0.1,
    split_seed: int = 0,
    crop: int = 2,
    flip: bool = False,
    padding: Padding = "zero",
) -> DataBundle:
    """MNIST: handwritten digits, 1 x 28 x 28, 60,000 to train and 10,000 to test.

    With `limit` only so many are trained on, always the same ones for one `split_seed`, of every
    class its share; `validation` is taken off them. The test set stays whole.

    Source: LeCun, Cortes and Burges, The MNIST database of handwritten digits, 1998.
    """
    options = dict(locals())  # first of all, while it holds the options and nothing else
    train, test = _load(MNIST, root, download)
    return bundle_tensors(
        _limited(train, limit, split_seed),
        test,
        validation=validation,
        split_seed=split_seed,
        augmentation=Augmentation(crop, flip, padding),
        class_names=MNIST.classes,
        fingerprint=fingerprint("mnist", options),
        mean=(MNIST.mean,),
        std=(MNIST.std,),
    )


@DATASETS.register("fashion_mnist")
def fashion_mnist(
    *,
    root: Path = Path("data"),
    download: bool = True,
    limit: int | None = None,
    validation: float | int = 0.1,
    split_seed: int = 0,
    crop: int = 2,
    flip: bool = True,
    padding: Padding = "zero",
) -> DataBundle:
    """Fashion-MNIST: articles of clothing, 1 x 28 x 28, 60,000 to train and 10,000 to test.

    With `limit` only so many are trained on, always the same ones for one `split_seed`, of every
    class its share; `validation` is taken off them. The test set stays whole.

    Source: Xiao, Rasul and Vollgraf, Fashion-MNIST, 2017, arXiv:1708.07747.
    """
    options = dict(locals())  # first of all, while it holds the options and nothing else
    train, test = _load(FASHION_MNIST, root, download)
    return bundle_tensors(
        _limited(train, limit, split_seed),
        test,
        validation=validation,
        split_seed=split_seed,
        augmentation=Augmentation(crop, flip, padding),
        class_names=FASHION_MNIST.classes,
        fingerprint=fingerprint("fashion_mnist", options),
        mean=(FASHION_MNIST.mean,),
        std=(FASHION_MNIST.std,),
    )


@CONTENTS.register("mnist")
def mnist_content(*, root: Path, download: bool) -> str:
    """The hash of the four arrays."""
    return _content(MNIST, root, download)


@CONTENTS.register("fashion_mnist")
def fashion_mnist_content(*, root: Path, download: bool) -> str:
    """The hash of the four arrays."""
    return _content(FASHION_MNIST, root, download)


def _content(data: IdxSet, root: Path, download: bool) -> str:
    stats = [(path, path.stat()) for path in _find(data, root, download)]
    return _hash(tuple((path, s.st_size, s.st_mtime_ns) for path, s in stats))


@cache  # by size and time as well: a file that was replaced is read again
def _hash(files: tuple[tuple[Path, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for (path, _, _), name in zip(files, FILES, strict=True):
        array = read_idx(path, dims=3 if "images" in name else 1)
        digest.update(repr(tuple(array.shape)).encode())
        digest.update(array.numpy().data)
    return digest.hexdigest()


def _load(
    data: IdxSet, root: Path, download: bool
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(images uint8 (N, 1, H, W), labels int64 (N,)) to train and to test."""
    paths = _find(data, root, download)
    train, test = _pair(data, paths[0], paths[1]), _pair(data, paths[2], paths[3])
    if train[0].shape[1:] != test[0].shape[1:]:
        raise DataError(
            f"{paths[0]} and {paths[2]}: images of different sizes, "
            f"{tuple(train[0].shape[2:])} and {tuple(test[0].shape[2:])}"
        )
    return train, test


def _limited(train: tuple[Tensor, Tensor], limit: int | None, seed: int) -> tuple[Tensor, Tensor]:
    """So many of the training images; all of them without a limit."""
    images, labels = train
    if limit is None or limit == len(labels):
        return train
    if not 1 <= limit < len(labels):
        raise DataError(f"limit must be from 1 to {len(labels)} training images, not {limit}")
    _, taken = stratified_split(labels, limit, seed=seed, name="limit")
    return images[taken], labels[taken]


def _pair(data: IdxSet, images_path: Path, labels_path: Path) -> tuple[Tensor, Tensor]:
    images = read_idx(images_path, dims=3)
    labels = read_idx(labels_path, dims=1).long()
    if len(images) != len(labels):
        raise DataError(
            f"{images_path} holds {len(images)} images, {labels_path} {len(labels)} labels"
        )
    if images.shape[1] != images.shape[2]:
        raise DataError(f"{images_path}: images are {tuple(images.shape[1:])}, not square")
    if labels.max() >= len(data.classes):
        raise DataError(
            f"{labels_path}: label {int(labels.max())}, but {data.title} has "
            f"{len(data.classes)} classes"
        )
    return images.unsqueeze(1), labels


def _find(data: IdxSet, root: Path, download: bool) -> list[Path]:
    """The four files, in the order of FILES; fetched if that is allowed and needed."""
    root = Path(root).expanduser()
    if paths := _search(data, root):
        return paths
    how = (
        f"Put {', '.join(f'{name}-ubyte' for name in FILES)} (gzipped or not) into one of: "
        f"{', '.join(str(root / folder) for folder in data.folders)}; or set data.root to "
        "where they are"
    )
    if not download:
        raise DataError(f"{data.title} is not in {root}. {how}; or set data.download: true.")
    import torchvision.datasets

    try:
        getattr(torchvision.datasets, data.title)(str(root), download=True)
    except Exception as error:  # urllib's, ssl's, tarfile's, the file system's: all mean the same
        message = f"{data.title} is not in {root} and its download failed ({error}). {how}."
        raise DataError(message) from error
    if paths := _search(data, root):
        return paths
    raise DataError(f"{data.title} was downloaded, but its files are not in {root}. {how}.")


def _search(data: IdxSet, root: Path) -> list[Path] | None:
    """The four files, if one folder holds them all."""
    for folder in data.folders:
        found = [_spelled(root / folder, name) for name in FILES]
        paths = [path for path in found if path is not None]
        if len(paths) == len(FILES):
            return paths
    return None


def _spelled(folder: Path, name: str) -> Path | None:
    """`train-images-idx3-ubyte` in the spellings that are about: `.idx3` and `.gz`."""
    for stem in (f"{name}-ubyte", f"{name.replace('-idx', '.idx')}-ubyte"):
        for suffix in ("", ".gz"):
            if (path := folder / f"{stem}{suffix}").is_file():
                return path
    return None

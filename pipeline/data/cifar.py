"""CIFAR-10 and CIFAR-100 through torchvision, which checks their files and downloads them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .augment import Augmentation, Padding
from .bundle import DATASETS, DataBundle, DataError, bundle_tensors
from .fingerprint import CONTENTS, fingerprint

Images = tuple[Tensor, Tensor]


@DATASETS.register("cifar10")
def cifar10(
    *,
    root: Path = Path("data"),
    download: bool = True,
    validation: float | int = 0.1,
    split_seed: int = 0,
    crop: int = 4,
    flip: bool = True,
    padding: Padding = "zero",
) -> DataBundle:
    """CIFAR-10: photographs, 3 x 32 x 32, 10 classes, 50,000 to train and 10,000 to test.

    Source: Krizhevsky, Learning multiple layers of features from tiny images, 2009.
    """
    options = dict(locals())  # first of all, while it holds the options and nothing else
    train, test, names = _load("CIFAR10", root, download)
    return bundle_tensors(
        train,
        test,
        validation=validation,
        split_seed=split_seed,
        augmentation=Augmentation(crop, flip, padding),
        class_names=names,
        fingerprint=fingerprint("cifar10", options),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
    )


@DATASETS.register("cifar100")
def cifar100(
    *,
    root: Path = Path("data"),
    download: bool = True,
    validation: float | int = 0.1,
    split_seed: int = 0,
    crop: int = 4,
    flip: bool = True,
    padding: Padding = "zero",
) -> DataBundle:
    """CIFAR-100: photographs, 3 x 32 x 32, 100 classes, 50,000 to train and 10,000 to test.

    Source: Krizhevsky, Learning multiple layers of features from tiny images, 2009.
    """
    options = dict(locals())  # first of all, while it holds the options and nothing else
    train, test, names = _load("CIFAR100", root, download)
    return bundle_tensors(
        train,
        test,
        validation=validation,
        split_seed=split_seed,
        augmentation=Augmentation(crop, flip, padding),
        class_names=names,
        fingerprint=fingerprint("cifar100", options),
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
    )


# torchvision loads only files whose MD5 it knows, so the content is known before it is read


@CONTENTS.register("cifar10")
def cifar10_content(*, root: Path, download: bool) -> str:
    """The published archive's MD5."""
    _check_there(root, download, "cifar-10-batches-py")
    return "c58f30108f718f92721af3b95e74349a"


@CONTENTS.register("cifar100")
def cifar100_content(*, root: Path, download: bool) -> str:
    """The published archive's MD5."""
    _check_there(root, download, "cifar-100-python")
    return "eb9058c3a382ffc7106e4002c42a8d85"


def _check_there(root: Path, download: bool, folder: str) -> None:
    path = Path(root).expanduser() / folder
    if not download and not path.is_dir():
        raise DataError(f"{path} does not exist. {_how(root)}; or set data.download: true.")


def _load(name: str, root: Path, download: bool) -> tuple[Images, Images, tuple[str, ...]]:
    """(images uint8 (N, 3, 32, 32), labels) to train and to test, and the class names."""
    import torchvision.datasets

    open_set = getattr(torchvision.datasets, name)
    root = Path(root).expanduser()
    try:
        train = open_set(str(root), train=True, download=download)
        test = open_set(str(root), train=False)
    except Exception as error:  # urllib's, ssl's, tarfile's, the file system's: all mean the same
        raise DataError(f"{name} could not be loaded ({error}). {_how(root)}.") from error
    return _tensors(train), _tensors(test), tuple(train.classes)


def _tensors(data: object) -> Images:
    pixels = torch.from_numpy(data.data)  # type: ignore[attr-defined]  # (N, 32, 32, 3)
    labels = torch.tensor(data.targets)  # type: ignore[attr-defined]
    return pixels.permute(0, 3, 1, 2), labels


def _how(root: Path) -> str:
    return (
        "Unpack cifar-10-python.tar.gz or cifar-100-python.tar.gz from "
        f"https://www.cs.toronto.edu/~kriz/cifar.html into {Path(root).expanduser()}; or set "
        "data.root to where it is"
    )

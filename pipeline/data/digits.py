"""The 1,797 handwritten digits, 8x8, that scikit-learn ships: real data, no download."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .augment import Augmentation, Padding
from .bundle import DATASETS, DataBundle, bundle_tensors
from .fingerprint import CONTENTS, fingerprint
from .splits import stratified_fold, stratified_split


@DATASETS.register("digits")
def digits(
    *,
    test: float | int = 0.2,
    validation: float | int = 0.1,
    split_seed: int = 0,
    fold: int | None = None,
    folds: int = 5,
    crop: int = 1,
    flip: bool = False,
    padding: Padding = "zero",
) -> DataBundle:
    """Handwritten digits, 1 x 8 x 8, 10 classes; 360 of the 1,797 are the test set.

    With `fold` the test set is that one of `folds` stratified parts, and `test` is not used:
    over all folds each image is tested once. `validation` is a share of what is left.

    Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998 (its test
    set, as scikit-learn ships it). Differs from it in: 0..16 is stretched to 0..255.
    """
    options = dict(locals())  # first of all, while it holds the options and nothing else
    images, labels = _load()
    if fold is None:
        kept, held_out = stratified_split(labels, test, seed=split_seed, name="test")
    else:
        kept, held_out = stratified_fold(labels, fold, folds, seed=split_seed)
    return bundle_tensors(
        (images[kept], labels[kept]),
        (images[held_out], labels[held_out]),
        validation=validation,
        split_seed=split_seed,
        augmentation=Augmentation(crop, flip, padding),
        class_names=tuple("0123456789"),
        fingerprint=fingerprint("digits", options),
    )


@CONTENTS.register("digits")
@cache
def digits_content() -> str:
    """The hash of images and labels."""
    images, labels = _load()
    return hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()


@cache
def _load() -> tuple[Tensor, Tensor]:
    """Images uint8 (1797, 1, 8, 8) and labels int64 (1797,)."""
    table = torch.from_numpy(_table())  # (1797, 65): 64 pixels in 0..16, the label
    images = (table[:, :64] * 255 / 16).round().to(torch.uint8)
    return images.view(-1, 1, 8, 8), table[:, 64].to(torch.int64)


def _table() -> np.ndarray:
    # Read where it lies: `import sklearn.datasets` takes 1 to 3 s, for every command that plans.
    spec = importlib.util.find_spec("sklearn")
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if path.is_file():
        with gzip.open(path, "rt") as file:
            return np.loadtxt(file, delimiter=",")
    from sklearn.datasets import load_digits

    data = load_digits()
    return np.column_stack([data.data, data.target])

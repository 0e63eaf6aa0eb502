"""The embedded digits."""

import hashlib

import numpy as np
import pytest
import torch
from bitladder.pipeline.data import DATASETS, DataError
from bitladder.pipeline.data.fingerprint import fingerprint

digits = DATASETS["digits"].factory


def image_hashes(split) -> list[str]:
    return [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in split.images]


def test_the_images_are_those_that_scikit_learn_ships():
    from sklearn.datasets import load_digits

    theirs = load_digits()
    expected = np.round(theirs.images * 255 / 16).astype(np.uint8)
    wanted = sorted((i.tobytes(), int(t)) for i, t in zip(expected, theirs.target, strict=True))
    bundle = digits()
    found = sorted(
        (image.numpy().tobytes(), int(label))
        for split in (bundle.train, bundle.validation, bundle.test)
        for image, label in zip(split.images, split.labels, strict=True)
    )
    assert found == wanted


def test_the_default_split_is_1293_144_360():
    bundle = digits()
    assert [len(s) for s in (bundle.train, bundle.validation, bundle.test)] == [1293, 144, 360]
    assert (bundle.in_channels, bundle.image_size, bundle.num_classes) == (1, 8, 10)
    assert bundle.class_names == tuple("0123456789")


def test_every_class_has_its_share_of_every_split():
    bundle = digits()
    splits = (bundle.train, bundle.validation, bundle.test)
    overall = torch.bincount(torch.cat([s.labels for s in splits])) / 1797
    for split in splits:
        counts = torch.bincount(split.labels, minlength=10)
        assert ((counts - overall * len(split)).abs() <= 2).all()


def test_five_folds_test_every_image_once():
    bundles = [digits(fold=fold) for fold in range(5)]
    tested = [image for bundle in bundles for image in image_hashes(bundle.test)]
    everything = digits()
    splits = (everything.train, everything.validation, everything.test)
    assert len(tested) == 1797
    assert sorted(tested) == sorted(image for split in splits for image in image_hashes(split))


def test_a_fold_keeps_test_images_out_of_training():
    bundle = digits(fold=1)
    total = sum(len(s) for s in (bundle.train, bundle.validation, bundle.test))
    assert total == 1797
    test = set(image_hashes(bundle.test))
    assert not test & set(image_hashes(bundle.train))
    assert not test & set(image_hashes(bundle.validation))


def test_training_images_are_normalised_to_mean_0_and_std_1():
    bundle = digits()
    x, _ = next(iter(bundle.train.evaluation_batches(2000, "cpu")))
    assert abs(float(x.mean())) < 1e-3
    assert abs(float(x.std()) - 1) < 1e-3


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fold": 0},
        {"fold": 1},
        {"fold": 1, "folds": 4},
        {"crop": 0},
        {"flip": True},
        {"padding": "reflect"},
        {"validation": 100},
        {"test": 0.1},
        {"split_seed": 1},
    ],
)
def test_the_fingerprint_is_the_bundles_and_tells_options_apart(options):
    assert digits(**options).fingerprint == fingerprint("digits", options)
    assert (fingerprint("digits", options) == fingerprint("digits", {})) == (options == {})


def test_a_default_that_is_spelled_out_does_not_change_the_fingerprint():
    assert fingerprint("digits", {"crop": 1, "folds": 5}) == fingerprint("digits", {})


def test_an_unknown_option_is_named_with_those_that_exist():
    with pytest.raises(DataError, match=r"'cropp'; did you mean 'crop'\? known: crop, flip, fold"):
        fingerprint("digits", {"cropp": 1})

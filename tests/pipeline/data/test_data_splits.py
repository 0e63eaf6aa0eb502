"""Stratified splits and folds."""

import pytest
import torch
from bitladder.pipeline.data.splits import stratified_fold, stratified_split

LABELS = torch.tensor([0] * 50 + [1] * 30 + [2] * 20).view(10, 10).T.flatten()  # classes mixed


@pytest.mark.parametrize(
    ("held_out", "counts"),
    [(0.1, [5, 3, 2]), (0.5, [25, 15, 10]), (10, [5, 3, 2]), (7, [4, 2, 1]), (1, [1, 0, 0])],
)
def test_every_class_gives_its_share(held_out, counts):
    _, held = stratified_split(LABELS, held_out, seed=0)
    assert torch.bincount(LABELS[held], minlength=3).tolist() == counts


def test_a_split_parts_the_samples():
    kept, held = stratified_split(LABELS, 0.3, seed=0)
    assert sorted(kept.tolist() + held.tolist()) == list(range(100))


def test_the_seed_decides_the_split():
    first, again, other = (stratified_split(LABELS, 0.3, seed=s)[1] for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_test_and_validation_splits_of_one_seed_are_independent():
    names = ("test", "validation")
    test, validation = (stratified_split(LABELS, 0.3, seed=0, name=n)[1] for n in names)
    assert not torch.equal(test, validation)


@pytest.mark.parametrize("held_out", [0, 0.0, -0.1, 1.5, 100, 0.999, -3])
def test_a_split_that_leaves_nothing_is_refused(held_out):
    with pytest.raises(ValueError, match="validation"):
        stratified_split(LABELS, held_out, seed=0)


def test_folds_part_the_samples_evenly_in_every_class():
    parts = [stratified_fold(LABELS, fold, 7, seed=0)[1] for fold in range(7)]
    assert sorted(torch.cat(parts).tolist()) == list(range(100))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    counts = torch.stack([torch.bincount(LABELS[part], minlength=3) for part in parts])
    assert (counts.amax(0) - counts.amin(0) <= 1).all()


def test_a_fold_and_what_is_outside_it_are_all_samples():
    outside, inside = stratified_fold(LABELS, 2, 5)
    assert sorted(outside.tolist() + inside.tolist()) == list(range(100))


@pytest.mark.parametrize(("fold", "folds"), [(5, 5), (-1, 5), (0, 1), (0, 101)])
def test_a_fold_that_does_not_exist_is_refused(fold, folds):
    with pytest.raises(ValueError, match="fold"):
        stratified_fold(LABELS, fold, folds)

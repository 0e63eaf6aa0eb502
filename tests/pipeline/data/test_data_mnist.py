"""MNIST and Fashion-MNIST from IDX files."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from bitladder.pipeline.data import DATASETS, DataError
from bitladder.pipeline.data.fingerprint import fingerprint
from bitladder.pipeline.data.idx import read_idx

mnist = DATASETS["mnist"].factory
fashion_mnist = DATASETS["fashion_mnist"].factory


def idx_bytes(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim])
    return header + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def make_arrays(seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    arrays = {}
    for prefix, count in (("train", 60), ("t10k", 20)):
        arrays[f"{prefix}-images"] = random.integers(0, 256, (count, 8, 8), dtype=np.uint8)
        arrays[f"{prefix}-labels"] = (np.arange(count) % 10).astype(np.uint8)
    return arrays


def write_set(folder: Path, *, gz: bool = False, dotted: bool = False, seed: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in make_arrays(seed).items():
        kind = "idx3" if "images" in name else "idx1"
        file = f"{name}{'.' if dotted else '-'}{kind}-ubyte{'.gz' if gz else ''}"
        data = idx_bytes(array)
        (folder / file).write_bytes(gzip.compress(data) if gz else data)
    return folder


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("dotted", [False, True])
@pytest.mark.parametrize("folder", ["", "MNIST/raw"])
def test_the_files_are_found_in_every_spelling(tmp_path, gz, dotted, folder):
    write_set(tmp_path / folder, gz=gz, dotted=dotted)
    bundle = mnist(root=tmp_path, download=False)
    arrays = make_arrays()
    assert np.array_equal(bundle.test.images[:, 0].numpy(), arrays["t10k-images"])
    assert bundle.test.labels.tolist() == arrays["t10k-labels"].tolist()
    assert (len(bundle.train), len(bundle.validation)) == (54, 6)
    assert (bundle.in_channels, bundle.image_size, bundle.mean) == (1, 8, (0.1307,))


def test_each_set_finds_its_own_files_in_a_shared_root(tmp_path):
    write_set(tmp_path / "MNIST" / "raw", seed=1)
    write_set(tmp_path / "FashionMNIST" / "raw", seed=2)
    digits = mnist(root=tmp_path, download=False)
    clothes = fashion_mnist(root=tmp_path, download=False)
    assert np.array_equal(digits.test.images[:, 0].numpy(), make_arrays(1)["t10k-images"])
    assert np.array_equal(clothes.test.images[:, 0].numpy(), make_arrays(2)["t10k-images"])
    assert clothes.class_names[9] == "ankle boot"


def test_a_missing_set_says_how_to_get_it(tmp_path):
    with pytest.raises(DataError, match=r"(?s)MNIST is not in .*train-images-idx3.*data\.download"):
        mnist(root=tmp_path, download=False)


def test_a_failed_download_says_what_else_to_do(tmp_path, monkeypatch):
    from torchvision.datasets import MNIST

    monkeypatch.setattr(MNIST, "mirrors", [f"file://{tmp_path}/nowhere/"])
    with pytest.raises(DataError, match=r"(?s)its download failed.*data\.root"):
        mnist(root=tmp_path / "data")


@pytest.mark.parametrize("gz", [False, True])
def test_a_truncated_file_is_named(tmp_path, gz):
    write_set(tmp_path, gz=gz)
    path = next(tmp_path.glob("train-images*"))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=f"{path.name}: truncated"):
        mnist(root=tmp_path, download=False)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "too short"),
        (b"\0\0\x08\x03", "too short"),
        (b"<html>404 not found</html>", "not an IDX file"),
        (idx_bytes(np.zeros((2, 3), np.uint8)) + bytes(8), "not an IDX file"),
        (idx_bytes(np.zeros((2, 3, 3), np.uint8)) + b"x", "too long"),
        (idx_bytes(np.zeros((0, 3, 3), np.uint8)), "holds no element"),
        (gzip.compress(b"x" * 99, mtime=0)[:-12], "truncated or damaged gzip"),
        (gzip.compress(b"x" * 99, mtime=0)[:-4] + b"1234", "truncated or damaged gzip"),
    ],
)
def test_what_is_no_idx_file_is_refused(tmp_path, data, message):
    path = tmp_path / "images"
    path.write_bytes(data)
    with pytest.raises(DataError, match=message):
        read_idx(path, dims=3)


def test_images_and_labels_must_be_as_many(tmp_path):
    write_set(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(59, np.uint8)))
    with pytest.raises(DataError, match=r"60 images.* 59 labels"):
        mnist(root=tmp_path, download=False)


def test_a_label_beyond_the_classes_is_refused(tmp_path):
    write_set(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(np.full(20, 10, np.uint8)))
    with pytest.raises(DataError, match="label 10, but MNIST has 10 classes"):
        mnist(root=tmp_path, download=False)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
@pytest.mark.parametrize("changed", [{}, {"crop": 0}, {"validation": 12}, {"flip": None}])
def test_the_fingerprint_is_the_bundles(tmp_path, name, changed):
    if "flip" in changed:
        changed = {"flip": not DATASETS[name].options()["flip"].default}
    options = {"root": write_set(tmp_path), "download": False}
    plain = fingerprint(name, options)
    assert DATASETS[name].factory(**options, **changed).fingerprint == fingerprint(
        name, options | changed
    )
    assert (fingerprint(name, options | changed) == plain) == (changed == {})


def test_the_fingerprint_follows_the_content_not_the_place_or_the_packing(tmp_path):
    here = fingerprint("mnist", {"root": write_set(tmp_path / "a"), "download": False})
    there = fingerprint("mnist", {"root": write_set(tmp_path / "b", gz=True), "download": True})
    other = fingerprint("mnist", {"root": write_set(tmp_path / "c", seed=1), "download": False})
    assert here == there
    assert here != other


def test_a_replaced_file_changes_the_fingerprint(tmp_path):
    options = {"root": write_set(tmp_path), "download": False}
    before = fingerprint("mnist", options)
    write_set(tmp_path, seed=1)
    assert fingerprint("mnist", options) != before


def test_labels_are_int64_and_images_uint8(tmp_path):
    bundle = mnist(root=write_set(tmp_path), download=False)
    assert bundle.train.labels.dtype == torch.int64
    assert bundle.train.images.dtype == torch.uint8


def test_a_limit_takes_the_same_images_of_every_class_each_time(tmp_path):
    write_set(tmp_path)
    bundles = [mnist(root=tmp_path, limit=30, validation=10) for _ in range(2)]
    for one, other in zip(
        (bundles[0].train, bundles[0].validation),
        (bundles[1].train, bundles[1].validation),
        strict=True,
    ):
        assert torch.equal(one.images, other.images)
    labels = torch.cat([bundles[0].train.labels, bundles[0].validation.labels])
    assert labels.bincount().tolist() == [3] * 10
    assert len(bundles[0].test) == 20


def test_a_limit_changes_the_fingerprint(tmp_path):
    write_set(tmp_path)
    limited = mnist(root=tmp_path, limit=30)
    assert limited.fingerprint == fingerprint("mnist", {"root": tmp_path, "limit": 30})
    assert limited.fingerprint != mnist(root=tmp_path).fingerprint


@pytest.mark.parametrize("limit", [0, 61])
def test_a_limit_beyond_the_images_is_refused(tmp_path, limit):
    write_set(tmp_path)
    with pytest.raises(DataError, match=f"limit must be from 1 to 60 .* not {limit}"):
        mnist(root=tmp_path, limit=limit)

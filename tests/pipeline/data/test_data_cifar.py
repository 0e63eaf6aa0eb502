"""CIFAR through torchvision, on small files in its own format."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
from bitladder.pipeline.data import DATASETS, DataError
from bitladder.pipeline.data.fingerprint import fingerprint


def write_pickle(path: Path, content: dict) -> str:
    """Writes it and gives its MD5, as torchvision's lists of files do."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps(content))
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def small_cifar10(tmp_path, monkeypatch) -> tuple[Path, dict[str, np.ndarray]]:
    from torchvision.datasets import CIFAR10

    random = np.random.default_rng(0)
    folder, images, lists = tmp_path / "cifar-10-batches-py", {}, {}
    for name, count in (("data_batch_1", 40), ("test_batch", 20)):
        images[name] = random.integers(0, 256, (count, 3072), dtype=np.uint8)
        content = {"data": images[name], "labels": [i % 10 for i in range(count)]}
        lists[name] = [[name, write_pickle(folder / name, content)]]
    names = [f"class {i}" for i in range(10)]
    meta = write_pickle(folder / "batches.meta", {"label_names": names})
    monkeypatch.setattr(CIFAR10, "train_list", lists["data_batch_1"])
    monkeypatch.setattr(CIFAR10, "test_list", lists["test_batch"])
    entry = {"filename": "batches.meta", "key": "label_names", "md5": meta}
    monkeypatch.setattr(CIFAR10, "meta", entry)
    return tmp_path, images


def test_images_keep_their_channels_rows_and_columns(small_cifar10):
    root, images = small_cifar10
    bundle = DATASETS["cifar10"].factory(root=root, download=False)
    # a row of the file is the red, the green and the blue image
    assert np.array_equal(bundle.test.images.numpy(), images["test_batch"].reshape(-1, 3, 32, 32))
    assert bundle.test.labels.tolist() == [i % 10 for i in range(20)]
    assert (len(bundle.train), len(bundle.validation)) == (36, 4)
    assert bundle.class_names == tuple(f"class {i}" for i in range(10))


@pytest.mark.parametrize("changed", [{}, {"crop": 2}, {"flip": False}, {"split_seed": 1}])
def test_the_fingerprint_is_the_bundles_without_reading_the_files(small_cifar10, changed):
    root, _ = small_cifar10
    options = {"root": root, "download": False} | changed
    assert DATASETS["cifar10"].factory(**options).fingerprint == fingerprint("cifar10", options)


def test_the_options_change_the_fingerprint(small_cifar10):
    root, _ = small_cifar10
    assert fingerprint("cifar10", {"root": root}) != fingerprint(
        "cifar10", {"root": root, "crop": 2}
    )


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_a_missing_set_says_how_to_get_it(tmp_path, name):
    with pytest.raises(DataError, match=r"(?s)cifar-10-python\.tar\.gz.*data\.root"):
        DATASETS[name].factory(root=tmp_path, download=False)
    with pytest.raises(DataError, match=r"does not exist.*data\.download: true"):
        fingerprint(name, {"root": tmp_path, "download": False})


def test_a_damaged_file_is_not_used(small_cifar10):
    root, _ = small_cifar10
    path = root / "cifar-10-batches-py" / "data_batch_1"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError, match="CIFAR10 could not be loaded"):
        DATASETS["cifar10"].factory(root=root, download=False)

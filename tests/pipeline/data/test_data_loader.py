"""Splits that are decoded as they are needed, by worker processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from bitladder.pipeline.data import DATASETS, DataError, TensorSplit
from bitladder.pipeline.data.loader import LoaderSplit

CLASSES = {"cat": 24, "dog": 16}


@pytest.fixture
def load(write_tree, tmp_path):
    root = write_tree(CLASSES, size=10)

    def load(**options):
        options = {"cache": tmp_path / "cache", "test": 10, "validation": 10, "crop": 2} | options
        return DATASETS["image_folder"].factory(root=root, **options)

    return load


def epoch(split, **options):
    options = {"seed": 3, "epoch": 1, "augment": True, "device": "cpu"} | options
    return list(split.batches(8, **options))


def assert_same(first, second) -> None:
    assert len(first) == len(second) > 0
    for (x, y), (u, v) in zip(first, second, strict=True):
        assert torch.equal(x, u)
        assert torch.equal(y, v)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_equal_those_in_memory(load, workers):
    held = load(in_memory=True)
    streamed = load(in_memory=False, workers=workers)
    assert isinstance(held.train, TensorSplit)
    assert isinstance(streamed.train, LoaderSplit)
    assert (held.mean, held.std) == (streamed.mean, streamed.std)
    assert_same(epoch(held.train), epoch(streamed.train))
    assert_same(
        list(held.test.evaluation_batches(4, "cpu")),
        list(streamed.test.evaluation_batches(4, "cpu")),
    )


def test_workers_do_not_change_the_random_windows(load):
    options = {"in_memory": False, "image_size": 8, "resized_crop": 0.2}
    here = load(**options, workers=0).train
    there = load(**options, workers=2).train
    assert_same(epoch(here), epoch(there))


def test_random_windows_hang_on_seed_epoch_and_sample_alone(load):
    split = load(image_size=8, resized_crop=0.2, workers=0).train
    assert isinstance(split, LoaderSplit)
    assert_same(epoch(split)[1:], epoch(split, start=1))
    x, y = epoch(split)[0]
    for other in ({"epoch": 2}, {"seed": 4}, {"augment": False}):
        assert not torch.equal(x, epoch(split, **other)[0][0])
    assert x.shape == (8, 3, 8, 8)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert y.dtype == torch.int64


def test_a_set_above_the_memory_limit_is_streamed(load):
    num_bytes = 40 * 10 * 10 * 3
    assert isinstance(load(memory_limit=num_bytes).train, TensorSplit)
    assert isinstance(load(memory_limit=num_bytes - 1).train, LoaderSplit)


@pytest.mark.parametrize("resized_crop", [None, 0.5])
def test_the_global_generator_is_left_alone(load, resized_crop):
    split = load(in_memory=False, workers=0, image_size=8, resized_crop=resized_crop).train
    before = torch.get_rng_state()
    epoch(split)
    assert torch.equal(before, torch.get_rng_state())


def test_a_file_that_is_no_image_is_reported_before_training(load, write_tree, tmp_path):
    (tmp_path / "images" / "cat" / "000.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"1 of 40 images cannot be used:\s+\S*000\.png"):
        load(in_memory=False, image_size=8)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_ends_early_is_named_when_it_is_met(load, tmp_path, workers):
    split = load(in_memory=False, workers=workers).train
    path = Path(split.files.files[0])
    path.write_bytes(path.read_bytes()[:80])
    with pytest.raises(DataError, match=f"{path.name} cannot be used"):
        epoch(split)


PARENT = """
import sys
from bitladder.pipeline.data import DATASETS
if __name__ == "__main__":
    options = {"root": sys.argv[1], "image_size": 8, "in_memory": False, "workers": 2}
    split = DATASETS["image_folder"].factory(**options, test=10, validation=10).train
    batches = split.batches(2, seed=0, epoch=0, augment=False, device="cpu")
    next(batches)
    print("training", flush=True)
    import time
    time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_process_is_left_when_the_parent_is_killed(write_tree, tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    command = [sys.executable, str(script), str(write_tree(CLASSES))]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "training\n"
        assert len(members(parent.pid)) >= 4  # it, the fork server, two workers
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
        give_up = time.monotonic() + 5
        while members(parent.pid) and time.monotonic() < give_up:
            time.sleep(0.05)
        assert members(parent.pid) == []


def members(session: int) -> list[int]:
    """The living processes of a session."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, _, _, of_session = (
                    (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                )
            except OSError:  # gone meanwhile
                continue
            if int(of_session) == session and state != "Z":
                found.append(int(entry.name))
    return found

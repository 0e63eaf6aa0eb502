"""`bitladder profile`, as it is typed."""

from pathlib import Path

import pytest
import torch
import yaml

TINY = {
    "name": "tiny",
    "data": {"name": "digits", "batch_size": 128},
    "model": {"name": "tiny_convnet"},
    "train": {"epochs": 1, "calibration_batches": 2},
    "ladder": [
        {"weight_bits": 32, "activation_bits": 32},
        {"weight_bits": 2, "activation_bits": 2},
    ],
}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BITLADDER_STORE", raising=False)
    Path("tiny.yaml").write_text(yaml.safe_dump(TINY))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_profile_prints_every_part_and_writes_nothing(bitladder):
    code, out, _ = bitladder("profile", "tiny.yaml", "--steps", "2")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith("w2a2: tiny_convnet at W2A2, 1 teacher, batch 128; 1 thread of ")
    rows = {line[:17].strip(): line.split()[-2:] for line in lines[1:13]}  # by name: ms, %
    assert list(rows)[:3] == ["part", "data", "teacher"]
    parts = [float(rows[name][0]) for name in rows if name not in ("part", "whole")]
    assert sum(parts) == pytest.approx(float(rows["whole"][0]), abs=0.1)
    assert rows["whole"][1] == "100.0"
    assert "images a second" in lines[13]
    assert "FP32 step of the same network" in out
    assert sorted(path.name for path in Path().iterdir()) == ["tiny.yaml"]


def test_profile_takes_a_rung_and_changed_values(bitladder):
    words = ("--stage", "fp32", "--steps", "1", "--set", "data.batch_size=64")
    code, out, _ = bitladder("profile", "tiny.yaml", *words)
    assert code == 0
    assert out.startswith("fp32: tiny_convnet at W32A32, no teacher, batch 64;")


def test_profile_of_a_rung_that_is_not_there_is_bad_input(bitladder):
    code, out, err = bitladder("profile", "tiny.yaml", "--stage", "w4a4")
    assert (code, out) == (2, "")
    assert err == "error: no stage 'w4a4' in tiny; there are: fp32, w2a2\n"

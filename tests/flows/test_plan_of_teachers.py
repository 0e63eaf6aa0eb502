"""`bitladder plan` and `bitladder list` on a ladder of two networks with several teachers."""

import sys

import pytest
import yaml
from bitladder.flows.__main__ import main
from bitladder.pipeline.config_load import parse_config
from bitladder.pipeline.plan import make_plan
from bitladder.pipeline.store import Store

LADDER = {
    "name": "two",
    "data": {"name": "digits", "batch_size": 256},
    "model": "tiny_convnet",
    "train": {"epochs": 1},
    "ladder": [
        {"name": "big", "weight_bits": 32, "activation_bits": 32, "model": "plane2"},
        {"weight_bits": 32, "activation_bits": 32, "teacher": "big"},
        {"weight_bits": 8, "activation_bits": 8, "teacher": ["big", "fp32"]},
        {"weight_bits": 4, "activation_bits": 4, "teacher": "best", "init": "fp32"},
        {"weight_bits": 2, "activation_bits": 2, "teacher": "none"},
    ],
}


@pytest.fixture
def bitladder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(LADDER))

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["bitladder", *words])
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        return end.value.code or 0, captured.out, captured.err

    return call


def test_plan_shows_network_start_and_teachers_of_every_rung(bitladder):
    code, out, _ = bitladder("plan", "two.yaml")
    assert code == 0
    plan = make_plan(parse_config(LADDER))
    shown = [" ".join(line.split()) for line in out.splitlines()]
    assert shown[0] == plan.run
    keys = [stage.key for stage in plan.stages]
    for name, key, rest in (
        ("big train plane2", keys[0], "scratch none 1 to do"),
        ("fp32 train tiny_convnet", keys[1], "scratch big 1 to do"),
        ("w8a8 train tiny_convnet", keys[2], "fp32 big, fp32 1 to do"),
        ("w4a4 train tiny_convnet", keys[3], "fp32 best of fp32, w8a8 1 to do"),
        ("w2a2 train tiny_convnet", keys[4], "w4a4 none 1 to do"),
    ):
        assert f"{name} {key} {rest}" in shown


def test_list_names_every_network_of_a_ladder(bitladder):
    Store("artifacts").register(make_plan(parse_config(LADDER)))
    code, out, _ = bitladder("list")
    assert code == 0
    assert "plane2, tiny_convnet" in out


def test_an_unknown_teacher_is_bad_input_that_lists_the_rungs_above(bitladder):
    code, out, err = bitladder("plan", "two.yaml", "--set", "ladder.2.teacher=bgi")
    assert (code, out) == (2, "")
    assert "did you mean 'big'?" in err
    assert "rungs above: big, fp32" in err

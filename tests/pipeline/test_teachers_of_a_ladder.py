"""Ladders whose rungs have several teachers, a chosen one, or one of another architecture."""

import json
import sys

import pytest
from bitladder.models import build_model
from bitladder.pipeline.errors import ConfigError, Interrupted
from bitladder.pipeline.evaluate_stage import evaluate_stage
from bitladder.pipeline.record import MODEL
from bitladder.pipeline.report import accuracy_report, people
from bitladder.pipeline.runner import open_ladder, run_stage
from bitladder.pipeline.store import Store
from safetensors.torch import save_file
from stop_after import StopAfter

FP32 = {"weight_bits": 32, "activation_bits": 32}
W8 = {"weight_bits": 8, "activation_bits": 8}
W4 = {"weight_bits": 4, "activation_bits": 4}
W2 = {"weight_bits": 2, "activation_bits": 2}
WIDE = {"name": "tiny_convnet", "width": 12}
ANOTHER = """
from bitladder.models import build_model

def big(num_classes, in_channels, image_size, *, width=8):
    return build_model("preact_resnet8", num_classes=num_classes, in_channels=in_channels,
                       image_size=image_size, options={"width": width})

def of_seven(in_channels, image_size):
    return big(7, in_channels, image_size)
"""


@pytest.fixture
def another(tmp_path, monkeypatch):
    """A network that nobody here wrote, to be imported as `another_net:big`."""
    (tmp_path / "another_net.py").write_text(ANOTHER)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "another_net", raising=False)
    return "another_net"


def hashes(records):
    return [record.sha256 for record in records]


def test_every_teacher_of_a_dense_rung_counts(tiny, run, store):
    rungs = [FP32, W8, {**W4, "epochs": 1}]
    sums = set()
    for teacher in ("previous", "fp32", "dense", ["fp32", "w8a8"]):
        rungs[2] = {**rungs[2], "teacher": teacher}
        sums.add(run(tiny(ladder=rungs), store)[2].sha256)
    assert len(sums) == 3  # the list names the same two


@pytest.mark.parametrize("looks", [2, 7, 14])
def test_a_dense_rung_with_dropped_teachers_resumes_to_the_same_bits(
    tiny, run, store, tmp_path, looks
):
    distill = {"teacher": "dense", "drop": 1}
    config = tiny(ladder=[FP32, W8, {**W4, "distill": distill}])
    whole = hashes(run(config, Store(tmp_path / "whole")))
    ladder = open_ladder(config, store)
    for stage in ladder.plan.stages[:2]:
        run_stage(ladder, stage, lambda: None)
    with pytest.raises(Interrupted):
        run_stage(ladder, ladder.plan.stages[2], StopAfter(looks))
    assert hashes(run(config, Store(store.root))) == whole


def test_the_best_rung_above_is_chosen_by_validation_and_reported(tiny, run, store, tmp_path):
    weak = {**W8, "train": {"optimizer": {"lr": 1e-6}}, "teacher": "none", "init": "scratch"}
    config = tiny(ladder=[FP32, weak, {**W4, "init": "fp32", "teacher": "best"}])
    fp32, bad, last = run(config, store)
    assert fp32.metrics["val_top1"] > bad.metrics["val_top1"]
    assert last.metrics["teacher_chosen"] == fp32.key
    frame = accuracy_report(store)
    assert list(frame["teacher"].fillna("")) == ["", "", "best: fp32"]
    assert people(frame)["teacher"].iloc[2] == "best: fp32"
    named = tiny(ladder=[FP32, {**W4, "init": "fp32", "teacher": "fp32"}])
    assert run(named, Store(tmp_path / "named"))[1].sha256 == last.sha256


def test_a_candidate_with_other_weights_makes_the_rung_that_chose_stale(tiny, run, store, events):
    rungs = [FP32, W8, {**W4, "init": "fp32", "teacher": "best"}]
    records = run(tiny(ladder=rungs), store)
    manifest = store.stages / records[2].key / "stage.json"
    raw = json.loads(manifest.read_text())
    assert set(raw["parents"]) == {"init", "candidate-0", "candidate-1"}
    raw["parents"]["candidate-1"]["sha256"] = "0" * 64
    manifest.write_text(json.dumps(raw))
    run(tiny(ladder=rungs), Store(store.root), events)
    assert events.trained == ["w4a4"]


def test_a_large_foreign_teacher_is_imported_and_teaches_a_small_ladder(
    tiny, run, store, tmp_path, another, events
):
    model = {"name": f"{another}:big", "width": 8}
    trained = run(tiny(model=model, ladder=[{**FP32, "epochs": 6}]), Store(tmp_path / "before"))[0]
    file = Store(tmp_path / "before").stages / trained.key / MODEL
    big = {**FP32, "name": "big", "model": {**model, "weights": str(file)}, "epochs": 0}
    student = {**FP32, "name": "student", "init": "scratch", "teacher": "big"}
    rungs = [big, student, W4, {**W2, "teacher": ["big", "w4a4"]}]
    config = tiny(model={"name": "plane2", "width": 8}, ladder=rungs)
    records = run(config, store, events)
    assert records[0].metrics["test_top1"] == trained.metrics["test_top1"]
    assert records[0].sha256 == trained.sha256
    assert set(records[3].parents) == {"init", "teacher-0", "teacher-1"}
    assert records[3].parents["init"]["key"] == records[2].key
    assert [record.network["name"] for record in records] == ["another_net:big", *["plane2"] * 3]
    alone = {**FP32, "name": "student", "init": "scratch"}
    untaught = run(tiny(model={"name": "plane2", "width": 8}, ladder=[alone]), store)
    assert untaught[0].sha256 != records[1].sha256

    frame = accuracy_report(store, store.runs()[0].run)
    own = [records[0], records[1], records[1], records[1]]
    assert list(frame["fp32_top1"]) == [record.metrics["test_top1"] for record in own]
    assert list(frame["drop"])[:2] == [0.0, 0.0]
    assert list(frame["model"]) == ["another_net:big(width=8)", *["plane2(width=8)"] * 3]
    assert "model" in people(frame)
    measured = [evaluate_stage(store, store.runs()[0], record) for record in records]
    assert [each.accuracy.top1 for each in measured] == [r.metrics["test_top1"] for r in records]

    events.clear()
    assert hashes(run(config, Store(store.root), events)) == hashes(records)
    assert events.trained == []


def test_another_file_of_a_teacher_retrains_what_learned_from_it(tiny, run, store, tmp_path):
    def weights(seed):
        size = {"num_classes": 10, "in_channels": 1, "image_size": 8}
        network = build_model("tiny_convnet", **size, options={"width": 12}, seed=seed)
        save_file(network.state_dict(), tmp_path / f"{seed}.safetensors")
        return str(tmp_path / f"{seed}.safetensors")

    def keys(file):
        big = {**FP32, "name": "big", "model": {**WIDE, "weights": file}, "epochs": 0}
        rungs = [FP32, big, W8, {**W4, "teacher": "big"}, {**W2, "teacher": "none"}]
        return [stage.key for stage in open_ladder(tiny(ladder=rungs), store).plan.stages]

    before, after = keys(weights(0)), keys(weights(1))
    changed = [a != b for a, b in zip(before, after, strict=True)]
    assert changed == [False, True, False, True, True]


def test_mistakes_in_all_networks_come_at_once_and_nothing_is_written(tiny, tmp_path, another):
    wrong = tmp_path / "wrong.safetensors"
    size = {"num_classes": 10, "in_channels": 1, "image_size": 8}
    save_file(build_model("tiny_convnet", **size, seed=0).state_dict(), wrong)
    rungs = [
        {**FP32, "name": "seven", "model": f"{another}:of_seven"},
        {**FP32, "name": "big", "model": {**WIDE, "weights": str(wrong)}, "epochs": 0},
        {**FP32, "name": "deep", "model": {"name": f"{another}:big", "depth": 3}},
        {**W4, "name": "again", "model": f"{another}:of_seven", "teacher": "none"},
    ]
    with pytest.raises(ConfigError) as caught:
        open_ladder(tiny(ladder=rungs), tmp_path / "artifacts")
    text = str(caught.value)
    assert "ladder.0.model: another_net:of_seven gives (2, 7)" in text
    assert "digits has 10 classes" in text
    assert "ladder.1.model.weights: " in text
    assert "ladder.2.model: unknown another_net:big option 'depth'" in text
    assert not (tmp_path / "artifacts").exists()


def test_layers_that_cannot_be_compared_are_refused_before_anything_is_trained(tiny, tmp_path):
    at = {"name": "attention_transfer", "layers": ["act1"], "teacher_layers": ["fc"]}
    rungs = [
        FP32,
        {**W8, "distill": {"features": at}},
        {**W4, "teacher": "dense", "distill": {"features": {**at, "teacher_layers": ["act1"]}}},
        {**W2, "distill": {"features": at, "weight": 0.25}},
    ]
    with pytest.raises(ConfigError) as caught:
        open_ladder(tiny(ladder=rungs), tmp_path / "artifacts")
    assert [error.partition(": layer 'act1': ")[0] for error in caught.value.errors] == [
        f"ladder.{rung}.distill.features" for rung in (1, 3)
    ]
    assert "use fitnets" in caught.value.errors[0]
    assert not (tmp_path / "artifacts").exists()


def test_a_rungs_policy_is_held_against_its_own_network(tiny, tmp_path):
    named = {"rules": [{"match": "features.conv1", "weight_bits": 2}]}
    rungs = [
        FP32,
        {**W4, "model": "plane2", "init": "scratch", "teacher": "fp32-2", "policy": named},
        {**W2, "policy": named},
    ]
    rungs.insert(1, {**FP32, "model": "plane2"})
    with pytest.raises(ConfigError) as caught:
        open_ladder(tiny(ladder=rungs), tmp_path / "artifacts")
    assert [error.partition(":")[0] for error in caught.value.errors] == [
        "ladder.3.policy.rules.0.match"
    ]
    assert open_ladder(tiny(ladder=rungs[:3]), tmp_path / "artifacts")

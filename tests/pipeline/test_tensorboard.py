import json
import sys

import pytest
from bitladder.pipeline.config_load import parse_config
from bitladder.pipeline.errors import ConfigError, Interrupted
from bitladder.pipeline.record import METRICS
from bitladder.pipeline.runner import open_ladder, run_ladder
from bitladder.pipeline.store import Store
from bitladder.pipeline.tensorboard import Charts
from stop_after import StopAfter
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_ladder import TINY

LADDER = {
    **TINY,
    "ladder": [
        {"weight_bits": 32, "activation_bits": 32},
        {
            "weight_bits": 4,
            "activation_bits": 8,
            "bin_regularization": {"weight": 1.0, "activation": 1.0, "warmup": 0.0},
        },
    ],
}
CHARTED = {**LADDER, "runtime": {"tensorboard": True, "histogram_epochs": 2}}


def folder_of(store):
    return store.reports / store.run().run / "tensorboard"


def events_of(folder):
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0})
    return found.Reload()


def curve(found, tag):
    return [(point.step, point.value) for point in found.Scalars(tag)]


def lines_of(store):
    """The metrics of all epochs of the newest ladder, rung after rung."""
    texts = [(store.stages / key / METRICS).read_text() for key in store.run().trained]
    return [json.loads(line) for text in texts for line in text.splitlines()]


@pytest.fixture(scope="module")
def charted(tmp_path_factory):
    """A ladder that was stopped in each rung, and went on."""
    store = Store(tmp_path_factory.mktemp("charted"))
    for looks in (12, 22):  # a rung has 18 steps, 9 an epoch
        with pytest.raises(Interrupted):
            run_ladder(open_ladder(parse_config(CHARTED), store), StopAfter(looks))
    run_ladder(open_ladder(parse_config(CHARTED), store))
    return store


def test_the_rungs_stand_one_behind_the_other_with_one_point_an_epoch(charted):
    found, lines = events_of(folder_of(charted)), lines_of(charted)
    names = {"loss/total": "train_loss", "accuracy/validation": "val_top1"}
    names |= {"loss/cross_entropy": "train_cross_entropy", "learning_rate/weights": "lr"}
    for tag, name in names.items():
        expected = [(step, pytest.approx(line[name])) for step, line in enumerate(lines, 1)]
        assert curve(found, tag) == expected
    for tag in ("distillation", "bins_weight", "bins_activation"):
        assert [step for step, _ in curve(found, f"loss/{tag}")] == [3, 4]
    assert [step for step, _ in curve(found, "learning_rate/quantizers")] == [3, 4]
    steps = [(n, pytest.approx(lines[n - 1]["scales"]["conv2.weight"])) for n in (3, 4)]
    assert curve(found, "step_size/conv2.weight") == steps
    assert curve(found, "rung/weight_bits") == [(1, 32), (2, 32), (3, 4), (4, 4)]
    assert [step for step, _ in curve(found, "accuracy/test")] == [2, 4]


def test_no_point_is_written_twice(charted):
    found = events_of(folder_of(charted))
    for tag in found.Tags()["scalars"]:
        steps = [step for step, _ in curve(found, tag)]
        assert steps == sorted(set(steps)), tag
    for tag in found.Tags()["histograms"]:
        steps = [point.step for point in found.Histograms(tag)]
        assert steps == sorted(set(steps)), tag


def test_histograms_count_all_values_of_a_layer_before_and_after_quantization(charted):
    found = events_of(folder_of(charted))
    before = found.Histograms("weights/conv2/float")
    assert [point.step for point in before] == [2, 4]
    (after,) = found.Histograms("weights/conv2/quantized")
    assert sum(after.histogram_value.bucket) == before[0].histogram_value.num == 1152
    assert sum(count > 0 for count in after.histogram_value.bucket) <= 16  # 4 bits
    assert sum(count > 0 for count in before[1].histogram_value.bucket) > 16
    (before,) = found.Histograms("activations/conv2/float")
    (after,) = found.Histograms("activations/conv2/quantized")
    assert before.step == after.step == 4
    assert before.histogram_value.num == after.histogram_value.num == 128 * 8 * 8 * 8


def test_charts_change_neither_keys_nor_weights(charted, store):
    records = run_ladder(open_ladder(parse_config(LADDER), store))
    assert [r.key for r in records] == charted.run().trained
    assert [r.sha256 for r in records] == [charted.find(r.key).sha256 for r in records]
    assert not folder_of(store).exists()

    charted_later = run_ladder(open_ladder(parse_config(CHARTED), store))
    assert [r.sha256 for r in charted_later] == [r.sha256 for r in records]
    tags = ("loss/total", "accuracy/test")  # of what was trained without, all that the store has
    curves = [[curve(events_of(folder_of(s)), tag) for tag in tags] for s in (store, charted)]
    assert curves[0] == curves[1]


def test_a_finished_ladder_adds_no_file(charted):
    before = sorted(folder_of(charted).iterdir())
    run_ladder(open_ladder(parse_config(CHARTED), charted))
    assert sorted(folder_of(charted).iterdir()) == before


def test_without_the_package_nothing_is_begun(store, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # as Python has what is not installed
    with pytest.raises(ConfigError, match=r"runtime\.tensorboard.*bitladder\[tensorboard\]"):
        open_ladder(parse_config(CHARTED), store)
    assert not store.root.exists()


def epochs(*losses):
    return [{"epoch": n, "train_loss": loss} for n, loss in enumerate(losses, 1)]


def test_a_rung_trained_anew_replaces_its_points_and_what_follows(tmp_path):
    first, second = Charts(tmp_path, 0, 2, (32, 32), 0), Charts(tmp_path, 2, 1, (8, 8), 0)
    first.add(epochs(3.0, 2.0))
    second.add(epochs(1.0))
    Charts(tmp_path, 0, 2, (32, 32), 0).add(epochs(3.0, 2.5))
    assert curve(events_of(tmp_path), "loss/total") == [(1, 3.0), (2, 2.5)]
    Charts(tmp_path, 2, 1, (8, 8), 0).add(epochs(1.0))
    assert curve(events_of(tmp_path), "loss/total") == [(1, 3.0), (2, 2.5), (3, 1.0)]


def test_a_file_whose_writer_was_killed_is_taken_up_where_it_ends(tmp_path):
    Charts(tmp_path, 0, 3, (32, 32), 0).add(epochs(3.0, 2.0))
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-5])
    Charts(tmp_path, 0, 3, (32, 32), 0).add(epochs(3.0, 2.0, 1.0))
    assert curve(events_of(tmp_path), "loss/total") == [(1, 3.0), (2, 2.0), (3, 1.0)]


def test_a_rung_that_is_not_trained_has_a_place_too(tmp_path):
    result = {"val_loss": 0.5, "val_top1": 0.75, "test_top1": 0.5}
    Charts(tmp_path, 4, 0, (8, 8), 0).add([], result=result)
    assert curve(events_of(tmp_path), "accuracy/test") == [(5, 0.5)]

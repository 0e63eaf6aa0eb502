"""A ladder's results as objects; one tiny ladder for all."""

import json

import pytest
import torch
from bitladder.pipeline import Report, Store
from bitladder.pipeline.config_load import parse_config
from bitladder.pipeline.errors import ConfigError, StoreError
from bitladder.pipeline.record import METRICS
from bitladder.pipeline.runner import open_ladder, run_ladder
from bitladder.quant import quant_layers
from tiny_ladder import TINY

SHORT = {
    **TINY,
    "name": "short",
    "train": {"epochs": 1, "calibration_batches": 2},
    "ladder": [
        {"weight_bits": 32, "activation_bits": 32},
        {"weight_bits": 2, "activation_bits": 4},
    ],
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """One ladder that is finished, then one that begins like it and is not."""
    store = Store(tmp_path_factory.mktemp("report") / "artifacts")
    run_ladder(open_ladder(parse_config(SHORT), store))
    rungs = [*SHORT["ladder"], {"weight_bits": 1, "activation_bits": 4}]
    open_ladder(parse_config({**SHORT, "name": "begun", "ladder": rungs}), store)
    return store


@pytest.fixture
def report(store):
    return Report(store, "short")


def test_the_newest_ladder_is_the_default(store):
    assert [run.name for run in Report(store).runs] == ["begun"]
    assert [run.name for run in Report(str(store.root)).runs] == ["begun"]


def test_tables_have_a_row_for_each_stage_epoch_and_layer(report):
    assert list(report.frame["stage"]) == ["fp32", "w2a4"]
    assert report.frame["test_top1"].between(0, 1).all()
    assert list(report.epochs[["stage", "epoch"]].itertuples(index=False, name=None)) == [
        ("fp32", 1),
        ("w2a4", 1),
    ]
    layers = report.layers[report.layers["stage"] == "w2a4"]
    assert list(layers["layer"]) == ["conv1", "conv2", "fc"]
    assert dict(zip(layers["layer"], layers["weight_bits"], strict=True))["conv2"] == 2


def test_steps_are_those_of_metrics_jsonl(report, store):
    (line,) = (store.stages / report.record("w2a4").key / METRICS).read_text().splitlines()
    steps = report.steps
    assert dict(zip(steps["quantizer"], steps["scale"], strict=True)) == json.loads(line)["scales"]
    assert set(steps["stage"]) == {"w2a4"}


def test_a_network_is_the_one_that_was_measured(report):
    model = report.network("w2a4")
    assert not model.training
    assert quant_layers(model)["conv2"].plan.weight_bits == 2
    weights = model.state_dict()["conv2.layer.weight"]
    with torch.no_grad():
        assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert torch.equal(report.network("w2a4").state_dict()["conv2.layer.weight"], weights)


def test_the_file_to_ship_is_found(report):
    assert report.packed("w2a4").is_file()
    assert report.packed("w2a4").stat().st_size == report.frame["packed_bytes"].iloc[1]


def test_a_stage_that_is_not_there_or_not_finished_is_said(store):
    begun = Report(store, "begun")
    with pytest.raises(ConfigError, match="no stage 'w4a4'; there are: fp32, w2a4, w1a4"):
        begun.record("w4a4")
    with pytest.raises(StoreError, match="'w1a4' has no result yet: to do"):
        begun.network("w1a4")
    assert begun.packed("w2a4").is_file()  # which it shares with the other


def test_several_ladders_stand_side_by_side(store):
    both = Report(store, "short", "begun")
    first, second = (run.run for run in both.runs)
    assert list(both.frame["run"].unique()) == [first, second]
    assert both.stages[-1] == f"{second}/w1a4"
    assert both.record(f"{first}/fp32").key == both.record(f"{second}/fp32").key


def test_a_notebook_shows_the_table_with_its_text_escaped(report):
    shown = report._repr_html_()
    assert report.runs[0].run in shown
    assert shown.count("<tr") == 3
    report.frame.loc[1, "note"] = "<b> & so"
    assert "w2a4: &lt;b&gt; &amp; so" in report._repr_html_()


def test_printing_it_gives_the_table_of_the_terminal(report):
    assert "stage state" in repr(report)


def test_figures_are_drawn_once_each_when_asked_for(report):
    assert "accuracy-bytes" in report.figures
    assert len(report.figures) == len(list(report.figures))
    figure = report.figures["accuracy-bytes"]
    assert figure is report.figures["accuracy-bytes"]
    assert figure.axes


@pytest.mark.parametrize(("name", "start"), [("a.csv", "run,"), ("b/a.md", "|"), ("a.json", "[")])
def test_it_is_saved_in_the_format_of_the_ending(report, tmp_path, name, start):
    assert report.save(tmp_path / name).read_text().startswith(start)


def test_an_ending_that_is_no_format_is_refused(report, tmp_path):
    with pytest.raises(ConfigError, match="its ending is none of"):
        report.save(tmp_path / "a.doc")
    assert list(tmp_path.iterdir()) == []

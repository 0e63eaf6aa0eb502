import json
import subprocess
import sys
from html.parser import HTMLParser
from io import BytesIO, StringIO

import pandas as pd
import pytest
from bitladder.pipeline.errors import ConfigError, StageError, StoreError
from bitladder.pipeline.report import COLUMNS, FORMATS, accuracy_report, people, render, reports
from bitladder.pipeline.runner import open_ladder, run_stage
from bitladder.pipeline.store import Store

HOPELESS = {"weight_bits": 4, "activation_bits": 4, "train": {"optimizer": {"lr": 1e30}}}


@pytest.fixture
def finished(tiny, store, run):
    run(tiny(), store)
    return store


def test_a_report_has_a_row_a_stage_in_ladder_order(finished):
    frame = accuracy_report(finished)
    assert tuple(frame.columns) == COLUMNS
    assert list(frame["stage"]) == ["fp32", "w4a8", "w1a2"]
    assert list(frame["position"]) == [0, 1, 2]
    assert list(frame["weight_bits"]) == [32, 4, 1]
    assert frame["test_top1"].between(0, 1).all()
    assert list(frame["teacher"].fillna("")) == ["", "fp32", "w4a8"]


def test_the_drop_is_against_the_full_precision_network_of_the_same_run(finished):
    frame = accuracy_report(finished)
    fp32 = frame["test_top1"].iloc[0]
    assert (frame["fp32_top1"] == fp32).all()
    assert list(frame["drop"]) == list(fp32 - frame["test_top1"])


def test_a_ladder_without_full_precision_has_no_drop(tiny, store, run):
    run(tiny(ladder=[{"weight_bits": 8, "activation_bits": 8, "epochs": 1}]), store)
    frame = accuracy_report(store)
    assert frame["drop"].isna().all()
    assert people(frame)["drop"].tolist() == [""]


def test_a_failed_run_is_reported_with_its_error_and_what_was_to_come(tiny, store, run):
    config = tiny(
        ladder=[
            {"weight_bits": 32, "activation_bits": 32, "epochs": 1},
            HOPELESS,
            {"weight_bits": 1, "activation_bits": 2},
        ]
    )
    with pytest.raises(StageError):
        run(config, store)
    frame = accuracy_report(Store(store.root))
    assert list(frame["state"]) == ["done", "failed", "to do"]
    assert "the loss is" in frame["error"].iloc[1]
    assert frame["error"].isna().tolist() == [True, False, True]
    assert list(frame["weight_bits"]) == [32, 4, 1]
    assert list(frame["weight_quantizer"].fillna("")) == ["", "lsq", "uniq"]
    assert frame["test_top1"].isna().tolist() == [False, True, True]
    assert b"the loss is" in render(frame, "html")


def test_a_run_in_progress_shows_its_last_epoch(tiny, store):
    config = tiny()
    shown = []

    def look(event):
        if event.kind == "epoch" and event.epoch == 1:
            shown.append(accuracy_report(Store(store.root)))

    ladder = open_ladder(config, store, look)
    run_stage(ladder, ladder.plan.stages[0], lambda: None)
    (frame,) = shown
    assert list(frame["state"]) == ["running", "to do", "to do"]
    assert list(frame["epochs"]) == [1, 0, 0]
    assert 0 <= frame["val_top1"].iloc[0] <= 1


def test_several_runs_stand_under_each_other(tiny, store, run):
    rungs = [{"weight_bits": 32, "activation_bits": 32, "epochs": 1}]
    for seed in (0, 1):
        run(tiny(ladder=rungs, seed=seed), store)
    frame = reports(store, store.runs())
    assert list(frame["run"]) == [each.run for each in store.runs()]
    assert list(frame["seed"]) == [0, 1]
    assert "run" in people(frame)
    assert "run" not in people(accuracy_report(store))


def test_csv_json_and_parquet_give_the_same_numbers_back(finished):
    frame = accuracy_report(finished)
    csv = pd.read_csv(BytesIO(render(frame, "csv")))
    records = json.loads(render(frame, "json"))
    parquet = pd.read_parquet(BytesIO(render(frame, "parquet")))
    for name in ("test_top1", "drop", "seconds", "train_loss"):
        assert list(csv[name]) == list(frame[name])
        assert [record[name] for record in records] == list(frame[name])
    pd.testing.assert_frame_equal(parquet, frame)
    assert list(records[0]) == list(COLUMNS)
    assert isinstance(records[0]["weight_bits"], int)
    assert records[0]["teacher"] is None


class Cells(HTMLParser):
    """The text of every table cell, and every address that the page would load."""

    def __init__(self):
        super().__init__()
        self.cells, self.addresses, self._inside = [], [], False

    def handle_starttag(self, tag, attrs):
        self._inside = tag == "td"
        self.addresses += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        if self._inside:
            self.cells.append(data)

    def handle_endtag(self, tag):
        self._inside = False


def test_the_page_and_the_markdown_hold_what_people_see(finished):
    frame = accuracy_report(finished)
    seen = [value for row in people(frame).to_numpy().tolist() for value in row if value]
    page = Cells()
    page.feed(render(frame, "html").decode())
    assert page.cells == seen
    assert [address for address in page.addresses if not address.startswith("#")] == []
    rows = render(frame, "markdown").decode().splitlines()[2:]
    assert [c.strip() for row in rows for c in row.strip("|").split("|") if c.strip()] == seen


def test_the_plain_table_begins_with_the_id_of_the_run(finished):
    lines = render(accuracy_report(finished), "table").decode().splitlines()
    assert lines[0] == finished.run().run
    table = pd.read_fwf(StringIO("\n".join(lines[1:])))
    assert list(table["stage"]) == ["fp32", "w4a8", "w1a2"]


def test_an_unknown_format_lists_the_known_ones(finished):
    with pytest.raises(ConfigError) as caught:
        render(accuracy_report(finished), "xlsx")
    assert all(form in str(caught.value) for form in FORMATS)


def test_a_run_that_is_not_there_lists_those_that_are(finished):
    with pytest.raises(StoreError, match=finished.run().run):
        accuracy_report(finished, "nobody")


def test_a_report_needs_no_torch(finished):
    script = (
        "import sys\n"
        "from bitladder.pipeline import Store, accuracy_report\n"
        "assert len(accuracy_report(Store(sys.argv[1]))) == 3\n"
        "print([m for m in ('torch', 'prefect', 'yaml') if m in sys.modules])\n"
    )
    command = [sys.executable, "-c", script, str(finished.root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stderr

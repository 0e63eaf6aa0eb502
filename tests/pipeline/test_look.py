"""The look inside each trained network that a ladder leaves."""

from __future__ import annotations

import base64
import io
import json
import shutil

import numpy as np
import pytest
import torch
from bitladder.flows.commands import _removable
from bitladder.pipeline.config_load import parse_config
from bitladder.pipeline.data import DATASETS
from bitladder.pipeline.look import make_missing_looks, read_look
from bitladder.pipeline.record import LOOK, METRICS
from bitladder.pipeline.runner import open_ladder, run_ladder
from bitladder.pipeline.store import Store
from PIL import Image
from tiny_ladder import TINY

CONFIG = parse_config({**TINY, "train": {**TINY["train"], "epochs": 1}})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The store of a ladder whose last rung could not be looked into, and what it told."""
    store, told = Store(tmp_path_factory.mktemp("look")), []
    ladder = open_ladder(CONFIG, store, told.append)
    blocked = store.stages / f"{store.run().looks[2]}.part"
    blocked.touch()  # where its folder would be
    records = run_ladder(ladder)
    blocked.unlink()
    return store, records, told


def test_a_look_shows_every_layer_of_a_rung(made):
    store, records, _ = made
    found = read_look(store, records[1])
    assert found["images"] == len(DATASETS["digits"].factory().validation) < 256
    rows = {row["layer"]: row for row in found["layers"]}
    assert list(rows) == [row["layer"] for row in records[1].metrics["layers"]]
    assert {row["weight"]["bits"] for row in rows.values()} == {4, 8}
    assert all(len(row["activation"]["before"]) == 64 for row in rows.values())
    plain = read_look(store, records[0])
    assert plain["teachers"] == []
    assert {row["weight"]["bits"] for row in plain["layers"]} == {32}


def test_student_and_teacher_are_compared_on_the_whole_validation_split(made):
    store, records, _ = made
    data = DATASETS["digits"].factory()
    found = read_look(store, records[1])
    (pair,) = found["teachers"]
    assert (pair["role"], pair["key"]) == ("teacher", records[0].key)
    assert pair["images"] == len(data.validation)
    right = pair["both"] + pair["student"]
    assert right / pair["images"] == pytest.approx(records[1].metrics["val_top1"])
    right = pair["both"] + pair["teacher"]
    assert right / pair["images"] == pytest.approx(records[0].metrics["val_top1"])
    assert right + pair["student"] + pair["neither"] == pair["images"]
    differ = sum(count for *_, count in pair["pairs"])
    assert len(pair["examples"]) == min(12, differ) > 0
    assert found["classes"] == list(data.class_names)
    for example in pair["examples"]:
        assert [example["teacher"], example["student"]] in [p[:2] for p in pair["pairs"]]
        with Image.open(io.BytesIO(base64.b64decode(example["png"]))) as picture:
            pixels = torch.from_numpy(np.array(picture))[None]
        alike = (data.validation.images == pixels).flatten(1).all(1)
        assert example["target"] in data.validation.labels[alike.nonzero()[:, 0]]


def test_a_look_that_fails_stops_no_ladder_and_is_made_up_for(made):
    store, records, told = made
    assert len(records) == 3
    assert [event.stage for event in told if "not looked into" in event.text] == ["w1a2"]
    assert not [event for event in told if event.kind == "failed"]
    assert read_look(store, records[2]) is None
    assert open_ladder(CONFIG, store).finished
    first = store.stages / store.run().looks[0]
    before = (first / LOOK).read_bytes()
    shutil.rmtree(first)
    make_missing_looks(store, store.run())
    assert (first / LOOK).read_bytes() == before
    assert read_look(store, records[2])["teachers"][0]["key"] == records[1].key


def test_looks_of_runs_are_kept_and_checked(made):
    store, records, _ = made
    key = store.run().looks[1]
    assert [path for path, _ in _removable(store) if path.name.startswith(key)] == []
    file = store.stages / key / LOOK
    whole = file.read_bytes()
    file.write_bytes(whole[:-2])
    assert "checksum" in store.problem(key)
    assert read_look(store, records[1]) is None
    file.write_bytes(whole)


def test_each_epoch_notes_the_scales_of_a_quantized_rung(made):
    store, records, _ = made
    lines = [(store.stages / record.key / METRICS).read_text() for record in records]
    epochs = [json.loads(text) for text in lines]
    assert "scales" not in epochs[0]
    layers = {row["layer"]: row for row in records[1].metrics["layers"]}
    for name, row in layers.items():
        for half in ("weight", "activation"):
            assert epochs[1]["scales"][f"{name}.{half}"] == row[f"{half}_scale"]

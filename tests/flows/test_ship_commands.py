"""`bitladder export`, `predict`, `bench`, `verify RUN` and `evaluate FILE`, as they are typed."""

import errno
import json
import os
import shutil
from importlib.metadata import version
from pathlib import Path

import onnx
import pytest
import yaml
from bitladder.flows import commands, ship_commands
from bitladder.pipeline import derived, runtimes, verify
from bitladder.pipeline import predict as predicting
from bitladder.pipeline.config_load import parse_config
from bitladder.pipeline.errors import ConfigError
from bitladder.pipeline.predict import Prediction
from bitladder.pipeline.runner import open_ladder, run_ladder
from bitladder.pipeline.store import Store
from bitladder.quant.export import openvino_ir
from PIL import Image

LADDER = {
    "name": "tiny",
    "data": {"name": "digits", "batch_size": 128},
    "model": {"name": "tiny_convnet"},
    "train": {"epochs": 1, "calibration_batches": 2},
    "runtime": {"threads": 1},
    "ladder": [
        {"weight_bits": 32, "activation_bits": 32},
        {"weight_bits": 4, "activation_bits": 4},
    ],
}


@pytest.fixture(scope="module")
def shipped_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shipped")
    run_ladder(open_ladder(parse_config(LADDER), folder / "artifacts"))
    return folder


@pytest.fixture
def store(shipped_once, tmp_path, monkeypatch):
    """The store of a finished ladder, in the current folder."""
    shutil.copytree(shipped_once, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(yaml.safe_dump(LADDER))
    return Store("artifacts")


def test_export_copies_one_rung_to_a_file_and_all_to_a_folder(bitladder, store):
    code, out, _ = bitladder("export", "tiny", "--stage", "w4a4", "--out", "w4a4.safetensors")
    assert code == 0
    packed = store.stages / store.run().packed[1] / "packed.safetensors"
    assert Path("w4a4.safetensors").read_bytes() == packed.read_bytes()
    code, out, _ = bitladder("export", "tiny", "-f", "openvino", "--out", "shipped")
    assert code == 0
    assert sorted(path.name for path in Path("shipped").iterdir()) == [
        *("fp32.bin", "fp32.xml", "w4a4.bin", "w4a4.xml"),
    ]
    assert "shipped/w4a4.xml" in out


@pytest.mark.parametrize("out", ["theirs", "theirs.xml", "folder"])
def test_no_file_of_an_export_is_written_over_another(bitladder, store, out):
    Path("folder").mkdir()
    kept = Path("folder/w4a4.bin" if out == "folder" else "theirs.bin")
    kept.write_text("mine")
    words = ("export", "tiny", "--stage", "w4a4", "-f", "openvino", "--out", out)
    code, _, err = bitladder(*words)
    assert (code, kept.read_text()) == (2, "mine")
    assert f"{kept} exists already" in err
    assert not kept.with_suffix(".xml").exists()
    assert bitladder(*words, "--force")[0] == 0
    assert kept.stat().st_size > 1000


def test_a_name_with_a_point_keeps_it(bitladder, store):
    assert bitladder("export", "tiny", "--stage", "w4a4", "--out", "net-1.5")[0] == 0
    assert Path("net-1.5.safetensors").is_file()


def test_several_rungs_do_not_go_into_a_file(bitladder, store):
    Path("file").write_text("mine")
    code, _, err = bitladder("export", "tiny", "--out", "file", "--force")
    assert (code, Path("file").read_text()) == (2, "mine")
    assert "several rungs need a folder" in err


def test_of_an_export_that_cannot_be_written_whole_nothing_is_left(bitladder, store, monkeypatch):
    written = []

    def full_after_one_file(path, data):
        if written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        path.write_bytes(data)
        written.append(path)

    monkeypatch.setattr(ship_commands, "write_atomic", full_after_one_file)
    words = ("export", "tiny", "--stage", "w4a4", "-f", "openvino", "--out", "theirs")
    code, _, err = bitladder(*words)
    assert code == 2
    assert "No space left on device" in err
    assert len(written) == 1
    assert not list(Path().glob("*theirs*"))


def test_an_output_that_exists_is_kept(bitladder, store):
    Path("mine.onnx").write_text("mine")
    words = ("export", "tiny", "--stage", "w4a4", "-f", "onnx", "--out", "mine.onnx")
    code, _, err = bitladder(*words)
    assert code == 2
    assert "--force" in err
    assert Path("mine.onnx").read_text() == "mine"
    assert bitladder(*words, "--force")[0] == 0
    assert Path("mine.onnx").stat().st_size > 1000


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--stage", "w2a2"), "there are: fp32, w4a4"),
        (("--batch", "2"), "--batch is for --format openvino"),
        (("--narrow",), "--narrow is for --format onnx"),
        (("-f", "onnx", "--vnni"), "--vnni is for --format openvino"),
        (("-f", "openvino", "--stage", "w4a4", "--batch", "2"), "no layer is binary"),
    ],
)
def test_what_cannot_be_exported_is_said(bitladder, store, words, says):
    code, _, err = bitladder("export", "tiny", *words)
    assert code in (1, 2)
    assert says in err


def test_an_onnx_file_that_is_not_for_openvino_here_is_said_to_be_so(bitladder, store, monkeypatch):
    monkeypatch.setattr(openvino_ir, "adds_in_int32", lambda: False)
    code, out, _ = bitladder("export", "tiny", "-f", "onnx")
    assert code == 0
    notes = [line for line in out.splitlines() if "without VNNI" in line]
    assert [line.split(":")[0] for line in notes] == ["w4a4"]  # its classifier has 8 bits


def test_a_file_is_evaluated_on_the_data_of_a_config(bitladder, store):
    bitladder("export", "tiny", "--stage", "w4a4", "-f", "onnx", "--out", "w4a4.onnx")
    code, out, _ = bitladder("evaluate", "w4a4.onnx", "--config", "tiny.yaml")
    assert code == 0
    recorded = store.read(store.run().packed[1]).metrics["deployed_top1"]
    assert f"test top-1 {100 * recorded:.2f} %, 360 images" in out
    code, _, err = bitladder("evaluate", "w4a4.onnx")
    assert code == 2
    assert "--config" in err


def test_verify_measures_the_networks_of_a_run_again(bitladder, store):
    bitladder("export", "tiny", "--stage", "w4a4", "-f", "onnx")
    code, out, _ = bitladder("verify", "tiny")
    assert code == 0
    assert out.count(": ok") == 5  # two packed files, two accuracies, one export
    assert "w4a4: onnx file against the packed file: ok" in out


def test_verify_finds_a_packed_file_of_another_network(bitladder, store):
    ours, theirs = (store.stages / key for key in store.run().packed)
    shutil.copy(theirs / "packed.safetensors", ours / "packed.safetensors")
    code, out, _ = bitladder("verify", "tiny")
    assert code == 1
    assert "does not match its checksum" in out


def test_verify_finds_an_export_that_no_longer_says_what_it_is(bitladder, store):
    bitladder("export", "tiny", "--stage", "w4a4", "-f", "onnx")
    export = store.of_kind("export")[0].key
    manifest = store.stages / export / "stage.json"
    manifest.write_text(manifest.read_text()[:100])
    code, out, _ = bitladder("verify", "tiny")
    assert code == 1
    assert f"{export}: {manifest} is not JSON" in out


def test_verify_goes_on_where_a_packed_file_cannot_be_read(bitladder, store, monkeypatch):
    bitladder("export", "tiny", "--stage", "w4a4", "-f", "onnx")

    def refuse(file, **_):
        raise ConfigError([f"{file}: refused"])

    monkeypatch.setattr(verify, "read_packed", refuse)
    code, out, _ = bitladder("verify", "tiny")
    assert code == 1
    assert out.count(": refused") == 3  # two packed files, one export


def test_predict_prints_a_line_an_image(bitladder, store):
    Path("images").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("L", (8, 8), 100).save(Path("images") / name)
    packed = store.stages / store.run().packed[1] / "packed.safetensors"
    code, out, _ = bitladder("predict", packed, "images", "--top", "2")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["images/a.png", "images/b.png"]
    code, _, err = bitladder("predict", packed, "none.png")
    assert code == 2
    assert "none.png: no such file" in err


def test_predict_prints_names_that_look_like_markup(bitladder, store, monkeypatch):
    Image.new("L", (8, 8), 100).save("c[red]x.png")
    found = [Prediction(Path("c[red]x.png"), (("[bold]cat", 0.75),))]
    monkeypatch.setattr(predicting, "predict", lambda *_, **__: found)
    _, out, _ = bitladder("predict", "file", "c[red]x.png")
    assert out.splitlines()[1].split() == ["c[red]x.png", "[bold]cat", "75.0", "%"]


def test_predict_refuses_a_folder_and_an_onnx_file_with_too_few_names(bitladder, store):
    Image.new("L", (8, 8), 100).save("one.png")
    code, _, err = bitladder("predict", "artifacts", "one.png")
    assert (code, err) == (2, "error: artifacts: Is a directory\n")
    bitladder("export", "tiny", "--stage", "w4a4", "-f", "onnx", "--out", "net.onnx")
    model = onnx.load("net.onnx")
    facts = {entry.key: entry for entry in model.metadata_props}["images"]
    images = json.loads(facts.value)
    for changed, says in (
        ({"classes": ["a"]}, "names 1 classes and has 10 logits"),
        ({"mean": [0.5, 0.5]}, "not an ONNX file of Bitladder"),
    ):
        facts.value = json.dumps(images | changed)
        onnx.save(model, "net.onnx")
        code, _, err = bitladder("predict", "net.onnx", "one.png")
        assert code == 2
        assert says in err


def test_a_name_that_is_too_long_is_one_error(bitladder, store):
    code, _, err = bitladder("export", "tiny", "--stage", "w4a4", "--out", "a" * 300)
    assert (code, err) == (2, f"error: --out {'a' * 300}: File name too long\n")


def test_bench_of_a_ladder_is_recorded_and_in_the_report(bitladder, store):
    code, out, _ = bitladder("bench", "tiny", "--batch", "1", "--threads", "1")
    assert code == 0
    assert out.count("openvino  ") == 2
    _, page, _ = bitladder("report", "-f", "markdown")
    assert "| w4a4" in page
    assert "onnxruntime" in page
    assert "onnxruntime" in bitladder("report", "-f", "html")[1]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("w4.onnx", "w4.onnx: bench takes packed files"),
        ("w5.safetensors", "there is no file w5.safetensors, and no such run"),
    ],
)
def test_bench_says_what_it_takes(bitladder, store, name, says):
    Path("w4.onnx").write_text("not looked into")
    code, _, err = bitladder("bench", "tiny", name)
    assert code == 2
    assert says in err
    assert store.of_kind("bench") == []  # before anything is timed


def test_bench_measures_anew_where_a_runtime_is_another_or_it_is_asked_to(
    bitladder, store, monkeypatch
):
    def bench(*words):
        code, out, _ = bitladder("bench", "tiny", "--batch", "1", "--threads", "1", *words)
        assert code == 0
        return out, len(Store("artifacts").of_kind("bench"))

    rungs = 2
    rows = 2 * rungs + openvino_ir.adds_in_int32()  # w4a4, whose classifier has 8 bits, twice
    out, records = bench()
    assert f"openvino {version('openvino')}" in out
    assert (records, bench()) == (rungs, (out, rungs))
    again, records = bench("--again")
    assert (again != out, records) == (True, 2 * rungs)
    assert bench() == (again, 2 * rungs)  # the last measurement counts
    page = bitladder("report", "-f", "markdown")[1]
    assert page.count("onnxruntime") == rungs
    monkeypatch.setattr(runtimes, "version", lambda package: "99.0")
    out, records = bench()
    assert ("onnxruntime 99.0" in out, records) == (True, 3 * rungs)
    assert bitladder("report", "-f", "markdown")[1].count("| 99.0") == rows


def test_clean_keeps_what_was_made_from_a_packed_network_until_its_ladder_is_gone(bitladder, store):
    bitladder("export", "tiny", "--stage", "w4a4", "-f", "onnx")
    bitladder("bench", "tiny", "--batch", "1", "--threads", "1")
    before = store.keys()
    assert bitladder("clean", "--yes")[1] == "nothing to remove\n"
    assert store.keys() == before
    shutil.rmtree(store.reports)
    Path("artifacts/results.db").unlink()
    bitladder("clean", "--yes")
    assert store.keys() == []


def test_a_packed_network_unlike_its_training_ends_a_run_with_1(bitladder, store, monkeypatch):
    monkeypatch.setattr(derived, "MOST_FLIPS", -1.0)
    assert commands.differs_too_much is derived.differs_too_much
    code, out, err = bitladder("run", "tiny.yaml")
    assert code == 1
    assert "w4a4: the packed network classifies 0 of 360 test images otherwise" in err
    assert "w4a4: the packed network" in out  # marked in the table


@pytest.mark.parametrize(
    ("name", "says"),
    [("net.xml", "give a packed or an ONNX file"), ("cut.safetensors", "no whole safetensors")],
)
def test_predict_says_what_is_wrong_with_a_file(bitladder, store, name, says):
    whole = (store.stages / store.run().packed[1] / "packed.safetensors").read_bytes()
    Path(name).write_bytes(whole[: len(whole) // 2])
    Image.new("L", (9, 9)).save("one.png")
    code, _, err = bitladder("predict", name, "one.png")
    assert code == 2
    assert says in err

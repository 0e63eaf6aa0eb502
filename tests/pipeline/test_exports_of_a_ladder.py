"""ONNX and OpenVINO files of a ladder's rungs, and what is done with them."""

import numpy as np
import pytest
import torch
from bitladder.pipeline import bench as benching
from bitladder.pipeline import exported
from bitladder.pipeline.bench import bench
from bitladder.pipeline.derive import derive
from bitladder.pipeline.derived import export_spec, pack_spec
from bitladder.pipeline.errors import ConfigError, StageError
from bitladder.pipeline.packed_file import read_packed
from bitladder.pipeline.predict import predict
from bitladder.pipeline.record import PACKED
from bitladder.pipeline.runtimes import Opened
from bitladder.quant.export import openvino_ir
from bitladder.quant.export.openvino_ir import adds_in_int32
from PIL import Image


@pytest.fixture
def shipped(tiny, run, store):
    run(tiny(), store)
    return store, store.run()


def packed_key(run, name):
    return pack_spec(next(s["key"] for s in run.stages if s["name"] == name)).key


@pytest.mark.parametrize(
    ("form", "runtimes"), [("onnx", ["onnxruntime", "openvino"]), ("openvino", ["openvino"])]
)
def test_an_export_is_a_stage_with_its_own_accuracy(shipped, form, runtimes):
    store, run = shipped
    spec = export_spec(packed_key(run, "w4a8"), form)
    record = derive(run, "w4a8", spec, store)
    assert record.metrics["export_flips"] == 0
    assert record.metrics["export_images"] == 360
    assert record.metrics["export_error"] < 0.2  # a code that flips; without, 1e-6
    assert list(record.metrics["runtimes"]) == runtimes
    assert all(found["flips"] == 0 for found in record.metrics["runtimes"].values())
    assert store.find(spec.key) == record
    assert derive(run, "w4a8", spec, store) == record  # found, not made again


def test_rungs_of_an_automatic_ladder_are_exported_too(tiny, run, store):
    auto = {"weight_bits": 4, "activation_bits": 4, "budget": 1.0, "step_budget": 1.0}
    run(tiny(ladder="auto", auto=auto, train={"epochs": 1, "calibration_batches": 2}), store)
    found = store.run()
    assert [stage["name"] for stage in found.stages] == ["fp32", "w8a8", "w4a4"]
    record = derive(found, "w4a4", export_spec(packed_key(found, "w4a4"), "onnx"), store)
    assert record.metrics["export_flips"] == 0


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_file_that_classifies_otherwise_gets_no_name(shipped, monkeypatch, runtime):
    store, run = shipped
    always_the_first = -torch.arange(10.0)
    answer = Opened(lambda x: always_the_first.expand(len(x), 10))
    opens = {"onnxruntime": "open_onnx", "openvino": "open_openvino"}
    monkeypatch.setattr(exported, opens[runtime], lambda path, threads: answer)
    spec = export_spec(packed_key(run, "w4a8"), "onnx")
    with pytest.raises(StageError, match=f"{runtime} .* otherwise than the packed network"):
        derive(run, "w4a8", spec, store)
    assert store.find(spec.key) is None
    assert store.state(spec.key)[0] == "failed"


@pytest.mark.parametrize(("flips", "refused"), [(1, False), (2, True)])
def test_of_few_images_one_may_be_classified_otherwise(
    shipped, tmp_path, monkeypatch, flips, refused
):
    store, run = shipped
    packed = read_packed(store.stages / packed_key(run, "w4a8") / PACKED)

    def differs(path, threads):
        def logits(x):
            found = packed.model(x).detach()
            found[:flips] = found[:flips].neg()
            return found

        return Opened(logits)

    monkeypatch.setattr(exported, "open_openvino", differs)
    batch = torch.randn(20, 1, 8, 8), torch.zeros(20, dtype=torch.long)
    how = {"narrow": False, "on_bits": False}
    found, problem = exported.compare("openvino", tmp_path, packed, lambda: [batch], **how)
    assert found["openvino"].flips == flips
    assert (problem is not None) == refused


def test_layers_on_bits_are_compared_with_whole_numbers_too(tiny, run, store, monkeypatch):
    inner = {"activation_bits": 1, "quantizer": {"name": "uniq"}}
    rungs = [{"weight_bits": 32, "activation_bits": 32}, {"weight_bits": 1, **inner}]
    run(tiny(ladder=rungs, train={"epochs": 1, "calibration_batches": 2}), store)
    name = store.run().stages[-1]["name"]
    packed = packed_key(store.run(), name)
    made = derive(store.run(), name, export_spec(packed, "openvino", batch=8), store)
    assert made.metrics["export_flips"] == 0
    always_the_first = -torch.arange(10.0)
    monkeypatch.setattr(
        exported,
        "integer_reference",
        lambda model, weights: lambda x: always_the_first.expand(len(x), 10),
    )
    with pytest.raises(StageError, match="otherwise than the integer reference"):
        derive(store.run(), name, export_spec(packed, "openvino", batch=4), store)


def test_without_vnni_files_that_need_it_are_not_run_where_they_would_be_wrong(
    shipped, monkeypatch
):
    store, run = shipped
    monkeypatch.setattr(openvino_ir, "adds_in_int32", lambda: False)
    key = packed_key(run, "w4a8")
    made = derive(run, "w4a8", export_spec(key, "onnx"), store)
    assert list(made.metrics["runtimes"]) == ["onnxruntime"]
    with pytest.raises(ConfigError, match=r"lacks.*--format openvino, without --vnni"):
        derive(run, "w4a8", export_spec(key, "openvino", vnni=True), store)
    assert derive(run, "w4a8", export_spec(key, "openvino"), store).metrics["export_flips"] == 0
    timings = bench(read_packed(store.stages / key / PACKED), batches=(1,), rounds=3)
    assert "no VNNI" in timings.left_out["openvino, vnni"]


@pytest.mark.skipif(not adds_in_int32(), reason="this processor has no VNNI")
def test_a_file_for_vnni_is_a_stage_of_its_own(shipped):
    store, run = shipped
    key = packed_key(run, "w4a8")
    anywhere, vnni = (export_spec(key, "openvino", vnni=way) for way in (False, True))
    made = [derive(run, "w4a8", spec, store) for spec in (anywhere, vnni)]
    assert all(record.metrics["export_flips"] == 0 for record in made)
    texts = [(store.stages / record.key / "model.xml").read_text() for record in made]
    assert ["openvino_needs" in text for text in texts] == [False, True]


def test_without_the_extra_it_is_said_what_to_install(shipped, monkeypatch):
    store, run = shipped
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(ConfigError, match=r"bitladder\[deploy\]"):
        derive(run, "w4a8", export_spec(packed_key(run, "w4a8"), "onnx"), store)


@pytest.fixture
def digits(tmp_path):
    """A folder with twenty image files, and their pixels."""
    from sklearn.datasets import load_digits

    pixels = (load_digits().images[:20] * 255 / 16).round().astype(np.uint8)
    folder = tmp_path / "digits"
    folder.mkdir()
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number:02}.png")
    return folder, torch.from_numpy(pixels)


@pytest.mark.parametrize("form", ["packed", "onnx"])
def test_predict_names_the_classes_of_image_files(shipped, digits, form):
    store, run = shipped
    file = store.stages / packed_key(run, "fp32") / PACKED
    if form == "onnx":
        record = derive(run, "fp32", export_spec(packed_key(run, "fp32"), form), store)
        file = store.stages / record.key / "model.onnx"
    folder, pixels = digits
    Image.fromarray(pixels[0].numpy()).resize((30, 24)).convert("RGB").save(folder.parent / "a.jpg")
    found = predict(file, [folder, folder.parent / "a.jpg"], top=3)
    assert [p.image.name for p in found] == [*(f"{n:02}.png" for n in range(20)), "a.jpg"]
    packed = read_packed(store.stages / packed_key(run, "fp32") / PACKED)
    facts = packed.description.images
    x = (pixels.unsqueeze(1) / 255 - facts.mean[0]) / facts.std[0]
    with torch.no_grad():
        expected = packed.model(x).argmax(1).tolist()
    assert [p.classes[0][0] for p in found[:20]] == [facts.classes[n] for n in expected]
    for prediction in found:
        shares = [share for _, share in prediction.classes]
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) <= 1.0001


def test_predict_names_everything_that_it_cannot_use(shipped, tmp_path):
    store, run = shipped
    file = store.stages / packed_key(run, "fp32") / PACKED
    text = tmp_path / "text.png"
    text.write_text("no image")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError) as error:
        predict(file, [tmp_path / "none.png", tmp_path / "empty"])
    assert len(error.value.errors) == 2
    with pytest.raises(ConfigError, match=r"text\.png"):
        predict(file, [text])
    other = tmp_path / "other.onnx"
    other.write_bytes(b"no model")
    with pytest.raises(ConfigError, match=r"other\.onnx"):
        predict(other, [text])


def test_bench_times_each_runtime_beside_float32(shipped):
    store, run = shipped
    packed = read_packed(store.stages / packed_key(run, "w4a8") / PACKED)
    timings = bench(packed, batches=(1, 2), rounds=3)
    found = timings.speeds
    runtimes = ["pytorch", "onnxruntime", "openvino"]
    if adds_in_int32():
        runtimes.append("openvino, vnni")  # of the 8-bit classifier
        assert timings.left_out == {}
    assert [(s.runtime, s.batch) for s in found] == [(r, b) for b in (1, 2) for r in runtimes]
    assert all(s.low <= s.seconds <= s.high and s.ratio > 0 for s in found)
    assert any("int8" in s.kernels for s in found if s.runtime == "openvino")


def test_a_runtime_that_refuses_a_network_is_left_out_and_the_others_time_it(shipped, monkeypatch):
    def refuse(*_, **__):
        raise ConfigError(["conv2: ONNX export has no such thing"])

    monkeypatch.setattr(benching, "write_onnx", refuse)
    store, run = shipped
    packed = read_packed(store.stages / packed_key(run, "w4a8") / PACKED)
    timings = bench(packed, batches=(1,), rounds=3)
    assert {speed.runtime for speed in timings.speeds} >= {"pytorch", "openvino"}
    assert timings.left_out["onnxruntime"] == "conv2: ONNX export has no such thing"

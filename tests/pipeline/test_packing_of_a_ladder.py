"""Packed files: made with every ladder, read back, refused where they are not what they claim."""

import json
import time

import pytest
import torch
from bitladder.models import build_model, source_hash
from bitladder.pipeline import packed_file
from bitladder.pipeline.config_load import parse_config
from bitladder.pipeline.derived import pack_spec
from bitladder.pipeline.errors import ConfigError, StageError
from bitladder.pipeline.network import load_network
from bitladder.pipeline.packed_description import PackedImages
from bitladder.pipeline.packed_file import read_packed, write_packed
from bitladder.pipeline.record import PACKED
from bitladder.pipeline.report import accuracy_report, people
from bitladder.pipeline.runner import open_ladder, run_ladder
from bitladder.pipeline.store import Store
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_ladder import TINY


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """The store of a ladder, its records, and the file of its 4-bit rung."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    store = Store(tmp_path_factory.mktemp("shipped") / "artifacts")
    records = run_ladder(open_ladder(parse_config(TINY), store, lambda event: None))
    torch.set_num_threads(before)
    return store, records, [packed_path(store, record) for record in records]


def packed_path(store, record):
    return store.stages / pack_spec(record.key).key / PACKED


NAN = float("nan")


def images(count=8):
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_every_rung_ends_in_a_file_that_gives_the_same_logits(shipped):
    store, records, files = shipped
    for record, file in zip(records, files, strict=True):
        packed = read_packed(file)
        trained = load_network(store, record, torch.device("cpu"))
        with torch.no_grad():
            logits = packed.model(images())
            torch.testing.assert_close(logits, trained(images()), rtol=1e-4, atol=1e-4)
        assert packed.description.made["stage"] == record.key
        assert packed.description.made["test_top1"] == record.metrics["test_top1"]
        assert packed.description.images.classes == [str(n) for n in range(10)]


def test_the_table_has_size_and_accuracy_of_the_files(shipped):
    store, _, files = shipped
    table = accuracy_report(store)
    assert list(table["packed_bytes"]) == [file.stat().st_size for file in files]
    assert list(table["flips"]) == [0, 0, 0]
    assert list(table["deployed_top1"]) == list(table["test_top1"])
    assert table["compression"].is_monotonic_increasing


def test_people_see_the_size_beside_what_the_widths_alone_would_take(shipped):
    frame = accuracy_report(shipped[0])
    shown = people(frame)
    place = list(shown.columns).index("size kB")
    assert list(shown.columns)[place : place + 3] == ["size kB", "ideal kB", "ratio"]
    assert list(shown["ideal kB"]) == [f"{size / 1e3:.1f}" for size in frame["ideal_bytes"]]


def test_what_each_layer_costs_adds_up_to_the_table(shipped):
    store, records, _ = shipped
    for record in records:
        found = store.find(pack_spec(record.key).key).metrics
        layers = found["layers"]
        assert sum(layer["bitops"] for layer in layers) == record.metrics["bitops"]
        assert all(0 < layer["weight_bytes"] < found["packed_bytes"] for layer in layers)
    wide, narrow = (store.find(pack_spec(records[i].key).key).metrics for i in (0, 2))
    assert wide["parameters"] == narrow["parameters"]
    inner = [next(r for r in m["layers"] if r["layer"] == "conv2") for m in (wide, narrow)]
    assert inner[0]["weight_bytes"] > 25 * inner[1]["weight_bytes"]  # float32 and one bit


def test_a_packing_that_is_gone_is_done_again_without_training(shipped, tiny, tmp_path, events):
    store, _, files = shipped
    before = files[1].read_bytes()
    files[1].unlink()
    run_ladder(open_ladder(tiny(), store, events))
    assert events.trained == []
    assert files[1].read_bytes() == before  # the same bytes, too


def test_a_packed_file_names_the_teacher_that_was_chosen(tiny, store):
    rungs = [*TINY["ladder"][:2], {"weight_bits": 2, "activation_bits": 8, "teacher": "best"}]
    train = {"epochs": 1, "calibration_batches": 2}
    last = run_ladder(open_ladder(tiny(ladder=rungs, train=train), store))[-1]
    made = read_packed(packed_path(store, last)).description.made
    assert made["teachers"] == [last.metrics["teacher_chosen"]]
    assert made["distillation"] is not None


def test_a_packed_file_holds_no_latent_weights(shipped):
    _, _, files = shipped
    with safe_open(files[1], framework="pt") as file:
        names = set(file.keys())
        dtypes = {name: file.get_slice(name).get_dtype() for name in names}
    codes = {name for name in names if name.endswith(".codes")}
    assert len(codes) == 3
    assert {dtypes[name] for name in codes} == {"U8"}
    assert not any(name.endswith("layer.weight") for name in names)


# -- refused -------------------------------------------------------------------------------


def contents(file):
    with safe_open(file, framework="pt") as opened:
        names = opened.keys()
        return {n: opened.get_tensor(n) for n in names}, dict(opened.metadata())


def rewritten(file, out, change, *, honest=True):
    """The file with its description changed, and with the checksum of that unless `honest`."""
    tensors, metadata = contents(file)
    entry = json.loads(metadata["bitladder"])
    change(entry["description"], tensors)
    if honest:
        entry["sha256"] = packed_file.checksum(entry["description"], tensors)
    save_file(tensors, out, {"bitladder": json.dumps(entry)})
    return out


def network(**values):
    return lambda raw, tensors: raw["network"].update(values)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda raw, tensors: raw.update(format=99), "newer Bitladder"),
        (lambda raw, tensors: raw.pop("images"), "images: Field required"),
        (lambda raw, tensors: raw.update(more=1), "more: Extra inputs"),
        (network(name="no_such_net"), "no_such_net"),
        (network(source="tiny_convnet/v0"), r"packed .* install bitladder \d"),
        (lambda raw, tensors: raw.update(format=0), "format: "),
        (lambda raw, tensors: raw["images"]["mean"].append(0.5), "mean has 2 entries.* 1 channels"),
        (lambda raw, tensors: raw["images"].update(std=[]), "std has 0 entries"),
        (lambda raw, tensors: raw["images"].update(std=[0.0]), "images.std.0: "),
        (lambda raw, tensors: raw["images"].update(mean=[NAN]), "images.mean.0: "),
        (lambda raw, tensors: raw["images"]["classes"].pop(), "classes has 9 entries"),
        (lambda raw, tensors: raw["codings"][0].update(zero_point=NAN), "zero_point: "),
        (network(image_size=10**9), "image_size: "),
        (network(num_classes=10**12), "and the network 1000000000000 classes"),
        (network(num_classes=-1), "num_classes"),
        (network(options={"width": 10**5}), "more than its"),
        (network(options={"width": 10**9}), "cannot be built"),
        (lambda raw, tensors: raw["quantizers"][0].update(channels=10**12), "more than its"),
        (lambda raw, tensors: raw["quantizers"][0].update(quantizer="none"), "none"),
        (lambda raw, tensors: raw["quantizers"][0].update(version=9), "9.* install bitladder"),
        (lambda raw, tensors: raw["codings"][0].update(bits=30), "less than or equal to 16"),
        (lambda raw, tensors: raw["quantizers"][0].update(bits=2**40), "less than or equal to 16"),
        (lambda raw, tensors: raw["layers"].pop("fc"), "fc"),
        (lambda raw, tensors: raw["layers"]["fc"].update(weight=77), "no weight quantizer 77"),
        (lambda raw, tensors: tensors.pop("fc.layer.bias"), "without fc.layer.bias"),
        (lambda raw, tensors: tensors.update(x=torch.zeros(1)), "with unknown x"),
        (lambda raw, tensors: tensors.update({"fc.scale": torch.ones(3)}), "fc.scale"),
    ],
)
def test_a_file_that_does_not_fit_together_is_refused(shipped, tmp_path, change, says):
    file = rewritten(shipped[2][1], tmp_path / "changed.safetensors", change)
    with pytest.raises(ConfigError, match=says) as error:
        read_packed(file)
    assert str(file) in str(error.value)


def test_a_changed_tensor_is_noticed(shipped, tmp_path):
    def turn(raw, tensors):
        tensors["fc.codes"][0] ^= 1

    file = rewritten(shipped[2][1], tmp_path / "changed.safetensors", turn, honest=False)
    with pytest.raises(ConfigError, match="does not match its checksum"):
        read_packed(file)


def test_what_is_no_packed_file_is_said_so(shipped, tmp_path):
    missing = tmp_path / "missing.safetensors"
    with pytest.raises(ConfigError, match="No such file"):
        read_packed(missing)
    other = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, other)
    with pytest.raises(ConfigError, match="bitladder export"):
        read_packed(other)
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(shipped[2][1].read_bytes()[:-7])
    with pytest.raises(ConfigError, match=str(torn)):
        read_packed(torn)


def test_code_of_somebody_runs_only_where_it_is_trusted(shipped, tmp_path, monkeypatch):
    (tmp_path / "their_net.py").write_text("raise SystemExit('their code ran')\n")
    monkeypatch.syspath_prepend(tmp_path)
    file = rewritten(shipped[2][1], tmp_path / "theirs.safetensors", network(name="their_net:net"))
    with pytest.raises(ConfigError, match="--trust their_net:net"):
        read_packed(file)
    with pytest.raises(SystemExit, match="their code ran"):
        read_packed(file, trust=["their_net:net"])


def test_a_network_of_torchvision_outlives_the_version_that_packed_it(tmp_path):
    name = "torchvision:shufflenet_v2_x0_5"
    shape = {"options": {}, "num_classes": 2, "in_channels": 1, "image_size": 32}
    model = build_model(name, **shape).eval()
    facts = PackedImages(mean=[0.5], std=[0.5], classes=["a", "b"])
    whole = tmp_path / "whole.safetensors"
    write_packed(whole, model, network={"name": name, **shape}, images=facts, made={})
    older = rewritten(whole, tmp_path / "older.safetensors", network(source=f"{name}/0.1"))
    x = torch.zeros(1, 1, 32, 32)
    assert torch.equal(read_packed(older).model(x), model(x))
    x1_0 = network(name="torchvision:shufflenet_v2_x1_0")
    other = rewritten(whole, tmp_path / "other.safetensors", x1_0)
    with pytest.raises(ConfigError, match="was another one when it was packed"):
        read_packed(other)


def test_a_network_of_a_million_blocks_is_not_begun(shipped, tmp_path):
    blocks = {"inverted_residual_setting": [[1, 16, 10**6, 1]]}
    source = source_hash("torchvision:mobilenet_v2")
    change = network(name="torchvision:mobilenet_v2", options=blocks, source=source)
    file = rewritten(shipped[2][1], tmp_path / "endless.safetensors", change)
    began = time.monotonic()
    with pytest.raises(ConfigError, match="parameters, and its file"):
        read_packed(file)
    assert time.monotonic() - began < 10


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_does_more_than_a_message(shipped, tmp_path, data):
    whole = shipped[2][1].read_bytes()
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(damaged) - 1))
        damaged[place] = data.draw(st.integers(0, 255))
    end = data.draw(st.sampled_from([len(damaged), len(damaged) // 2, 8, 0]))
    file = tmp_path / "damaged.safetensors"
    file.write_bytes(bytes(damaged[:end]))
    if file.read_bytes() == whole:
        return
    with pytest.raises(ConfigError, match=r"damaged\.safetensors"):
        read_packed(file)


def test_a_file_that_is_not_the_network_fails_the_stage(tiny, store, monkeypatch):
    from bitladder.pipeline.stages import pack

    real = pack.read_packed

    def other(path, **more):
        found = real(path, **more)
        with torch.no_grad():
            next(found.model.parameters()).add_(1)
        return found

    monkeypatch.setattr(pack, "read_packed", other)
    with pytest.raises(StageError, match="not the one that was packed"):
        run_ladder(open_ladder(tiny(), store))

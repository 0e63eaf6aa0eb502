import json
import math

import pytest
import torch
from bitladder.pipeline.config_load import parse_config
from bitladder.pipeline.errors import ConfigError, Interrupted, StageError
from bitladder.pipeline.files import sha256_of
from bitladder.pipeline.network import load_network
from bitladder.pipeline.record import CHECKPOINT, MODEL
from bitladder.pipeline.runner import data_of, open_ladder, run_ladder, run_stage
from bitladder.pipeline.store import Store
from bitladder.quant.metrics import max_levels
from bitladder.quant.swap import quantizers
from stop_after import StopAfter


def hashes(records):
    return [record.sha256 for record in records]


def test_a_ladder_trains_every_rung_and_records_it(tiny, store, run, events):
    records = run(tiny(), store, events)
    assert events.trained == ["fp32", "w4a8", "w1a2"]
    for record in records:
        assert sha256_of(store.stages / record.key / MODEL) == record.sha256
        assert record.metrics["test_images"] == 360
        lines = (store.stages / record.key / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["epoch"] for line in lines] == [1, 2]
    lines = (store.stages / records[0].key / "metrics.jsonl").read_text().splitlines()
    first, last = (json.loads(line)["train_loss"] for line in lines)
    assert last < first
    assert not list(store.stages.glob("*.part"))


@pytest.mark.parametrize("augment", [True, False])
def test_statistics_are_those_of_images_as_in_training(tiny, store, run, augment):
    train = {"epochs": 1, "augment": augment, "batch_norm_batches": 3}
    config = tiny(train=train, data={"name": "digits", "batch_size": 64, "crop": 3})
    for record, quantized in zip(run(config, store), (False, True, True), strict=True):
        model = load_network(store, record, torch.device("cpu"))
        norm, others = model.bn1, []
        assert bool(quantizers(model)) == quantized
        for look in (augment, not augment):
            batches = data_of(config.data).train.calibration(
                64, 3, seed=config.seed, augment=look, device="cpu"
            )
            with torch.no_grad():
                means = [model.conv1(x).mean((0, 2, 3)) for x, _ in batches]
            others.append(torch.stack(means).mean(0))
        torch.testing.assert_close(norm.running_mean, others[0])
        assert not torch.allclose(norm.running_mean, others[1], atol=1e-2)


def test_a_second_run_trains_nothing_and_gives_the_same_records(tiny, store, run, events):
    first = run(tiny(), store)
    again = run(tiny(), Store(store.root), events)
    assert events.trained == []
    assert hashes(again) == hashes(first)


def test_editing_a_rung_reruns_it_and_those_below(tiny, store, run, events):
    run(tiny(), store)
    rungs = [rung.model_dump(mode="json") for rung in tiny().ladder]
    rungs[1]["train"]["epochs"] = 1
    run(tiny(ladder=rungs), store, events)
    assert events.trained == ["w4a8", "w1a2"]


def test_the_same_seed_gives_the_same_bits(tiny, store, run, tmp_path):
    other = Store(tmp_path / "other")
    assert hashes(run(tiny(), store)) == hashes(run(tiny(), other))


@pytest.mark.parametrize("looks", [2, 12, 13, 23, 46])
def test_a_stopped_ladder_resumes_to_the_same_bits(tiny, store, run, tmp_path, looks):
    bins = {"weight": 0.1, "activation": 0.1, "warmup": 0.4, "freeze_weight_scale": True}
    config = tiny(bin_regularization=bins, train={"epochs": 2, "optimizer": "adam"})
    whole = hashes(run(config, Store(tmp_path / "whole")))
    ladder = open_ladder(config, store)
    stop = StopAfter(looks)
    with pytest.raises(Interrupted):
        [run_stage(ladder, stage, stop) for stage in ladder.plan.stages]
    assert list(store.stages.glob(f"*.part/{CHECKPOINT}")) or looks == 2
    assert hashes(run(config, Store(store.root))) == whole


def test_a_torn_checkpoint_is_not_used_and_the_result_is_the_same(tiny, store, run, events):
    ladder = open_ladder(tiny(), store)
    with pytest.raises(Interrupted):
        run_stage(ladder, ladder.plan.stages[0], StopAfter(4))
    (checkpoint,) = store.stages.glob(f"*.part/{CHECKPOINT}")
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    torn = hashes(run(tiny(), store, events))
    assert any("does not match its checksum" in e.text for e in events if e.kind == "message")
    assert torn == hashes(run(tiny(), Store(store.root.parent / "whole")))


@pytest.mark.parametrize("name", [MODEL, "stage.json", "metrics.jsonl"])
def test_a_damaged_stage_is_never_used_but_redone(tiny, store, run, events, name):
    records = run(tiny(), store)
    path = store.stages / records[1].key / name
    path.write_bytes(path.read_bytes()[:-3])
    again = run(tiny(), Store(store.root), events)
    assert events.trained == ["w4a8"]  # its weights come out the same, so its child stands
    assert hashes(again) == hashes(records)


def test_a_parent_with_other_weights_makes_its_children_stale(tiny, store, run, events):
    records = run(tiny(), store)
    manifest = store.stages / records[2].key / "stage.json"
    raw = json.loads(manifest.read_text())
    raw["parents"]["init"]["sha256"] = "0" * 64
    manifest.write_text(json.dumps(raw))
    run(tiny(), Store(store.root), events)
    assert events.trained == ["w1a2"]


def test_no_layer_of_a_trained_network_has_more_levels_than_its_bits_allow(tiny, store, run):
    records = run(tiny(), store)
    images = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for record in records[1:]:
        model = load_network(store, record, torch.device("cpu"))
        bits = {name: q.bits for name, q in quantizers(model).items()}
        levels = max_levels(model, [images])
        assert levels
        assert all(1 <= levels[name] <= 2 ** bits[name] for name in levels)
        assert record.metrics["weight_levels"] <= 2 ** record.metrics["weight_bits"]


def test_an_infinite_loss_stops_the_stage_and_names_the_step_and_the_layer(tiny, store, run):
    rungs = [{"weight_bits": 32, "activation_bits": 32, "train": {"optimizer": {"lr": 1e30}}}]
    with pytest.raises(StageError, match=r"the loss is (nan|inf) at step \d+ .*(layer|parameter)"):
        run(tiny(ladder=rungs), store)
    state, error = store.state(open_ladder(tiny(ladder=rungs), store).plan.stages[0].key)
    assert state == "failed"
    assert "the loss is" in error


def test_a_failed_rung_keeps_those_above(tiny, store, run, events):
    bad = {"weight_bits": 4, "activation_bits": 4, "train": {"optimizer": {"lr": 1e30}}}
    rungs = [{"weight_bits": 32, "activation_bits": 32}, bad]
    with pytest.raises(StageError):
        run(tiny(ladder=rungs), store)
    rungs[1] = {**bad, "train": {"optimizer": {"lr": 0.01}}}
    run(tiny(ladder=rungs), store, events)
    assert events.trained == ["w4a4"]


def test_zero_epochs_imports_trained_weights_as_they_are(tiny, store, run, tmp_path):
    trained = run(tiny(), store)[0]
    weights = str(store.stages / trained.key / MODEL)
    config = tiny(
        model={"name": "tiny_convnet", "weights": weights},
        ladder=[
            {"weight_bits": 32, "activation_bits": 32, "epochs": 0},
            {"weight_bits": 8, "activation_bits": 8, "epochs": 1},
        ],
    )
    imported = run(config, Store(tmp_path / "imported"))[0]
    assert imported.metrics["test_top1"] == trained.metrics["test_top1"]
    assert imported.sha256 == trained.sha256


def test_weights_of_another_network_are_refused_before_anything_is_written(tiny, store, run):
    trained = run(tiny(), store)[0]
    weights = str(store.stages / trained.key / MODEL)
    config = tiny(model={"name": "tiny_convnet", "width": 5, "weights": weights})
    elsewhere = Store(store.root.parent / "elsewhere")
    with pytest.raises(ConfigError, match=r"^model\.weights: "):
        open_ladder(config, elsewhere)
    assert not elsewhere.root.exists()


def test_a_network_with_the_wrong_number_of_classes_is_refused(tiny, tmp_path, monkeypatch):
    (tmp_path / "seven.py").write_text(
        "from torch import nn\n\ndef net(in_channels, image_size):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * image_size**2, 7))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="digits has 10 classes"):
        open_ladder(tiny(model={"name": "seven:net"}), tmp_path / "artifacts")
    assert not (tmp_path / "artifacts").exists()


def test_a_foreign_network_with_dropout_resumes_to_the_same_bits(tiny, tmp_path, monkeypatch, run):
    (tmp_path / "dropped.py").write_text(
        "from torch import nn\n\ndef net(num_classes, in_channels):\n"
        "    return nn.Sequential(nn.Conv2d(in_channels, 8, 3), nn.ReLU(), nn.Dropout(0.3),\n"
        "        nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, num_classes))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    config = tiny(model={"name": "dropped:net"})
    whole = hashes(run(config, Store(tmp_path / "whole")))
    ladder = open_ladder(config, Store(tmp_path / "stopped"))
    with pytest.raises(Interrupted):
        run_stage(ladder, ladder.plan.stages[0], StopAfter(8))
    assert hashes(run_ladder(ladder)) == whole


def test_what_a_run_stored_runs_again_under_the_same_id(tiny, store, run):
    run(tiny(), store)
    stored = store.run()
    assert open_ladder(parse_config(stored.config), store).plan.run == stored.run


def test_bits_that_are_not_the_default_widths_work_too(tiny, store, run):
    rungs = [
        {"weight_bits": 3, "activation_bits": 32, "init": "scratch", "epochs": 1},
        {"weight_bits": 32, "activation_bits": 5, "epochs": 1, "quantizer": "dorefa"},
        {"weight_bits": 16, "activation_bits": 16, "epochs": 1},
        {"weight_bits": 6, "activation_bits": 7, "epochs": 1, "quantizer": "range_linear"},
    ]
    records = run(tiny(ladder=rungs), store)
    methods = [r.metrics["weight_quantizer"] for r in records]
    assert methods == ["lsq", None, "range_linear", "range_linear"]
    assert all(math.isfinite(r.metrics["train_loss"]) for r in records)


def test_a_width_that_a_layer_cannot_have_is_refused_before_anything_is_written(tiny, tmp_path):
    rungs = [
        {"weight_bits": 32, "activation_bits": 32},
        {
            "weight_bits": 4,
            "activation_bits": 4,
            "policy": {
                "rules": [
                    {"match": "conv1", "activation": {"name": "dorefa"}},
                    {"match": "layer9.*", "weight_bits": 2},
                    {"kind": "depthwise", "weight_bits": 2},
                ]
            },
        },
    ]
    with pytest.raises(ConfigError) as caught:
        open_ladder(tiny(ladder=rungs), tmp_path / "artifacts")
    assert "no layer is named 'layer9.*'; layers: conv1" in str(caught.value)
    assert "no layer is depthwise; there are: Conv2d, Linear, convolution" in str(caught.value)
    assert "ladder.1: layer 'conv1'" in str(caught.value)
    assert not (tmp_path / "artifacts").exists()


def test_rates_for_a_parameter_that_no_rung_has_are_refused(tiny, store, run):
    rules = {"rules": [{"match": "*.clpi", "lr": 0.1}]}
    config = tiny(train={"epochs": 1, "quantizer_parameters": rules})
    with pytest.raises(ConfigError, match=r"no rung has a quantizer parameter named '\*\.clpi'"):
        run(config, store)
    assert not list(store.stages.glob("*"))

"""Oscillation control in a ladder: the config, the terms, the metrics, and resuming."""

import json

import pytest
import torch
from bitladder.pipeline.config import OscillationConfig
from bitladder.pipeline.errors import ConfigError, Interrupted
from bitladder.pipeline.network import load_network
from bitladder.pipeline.plan import make_plan
from bitladder.pipeline.record import CHECKPOINT
from bitladder.pipeline.runner import open_ladder, run_stage
from bitladder.pipeline.schedule import annealed
from bitladder.pipeline.store import Store
from bitladder.pipeline.tensors import read_checkpoint
from bitladder.quant import quant_layers
from bitladder.quant.quantizers.lsq import LSQ
from bitladder.quant.swap import quantizers
from safetensors.torch import load_file
from stop_after import StopAfter

RUNGS = [
    {"weight_bits": 32, "activation_bits": 32},
    {"weight_bits": 2, "activation_bits": 4},
]
TRAIN = {"epochs": 3, "optimizer": {"lr": 0.1}, "calibration_batches": 2}
FREEZE = {
    "momentum": 0.1,
    "freezing": {"start": 0.15, "final": 0.02, "warmup": 0.3},
    "dampening": {"final": 0.01},
}


def keys(config):
    return [stage.key for stage in make_plan(config).stages]


def lines(store, record):
    text = (store.stages / record.key / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


# the schedule


def test_a_value_rests_until_the_warmup_ends_and_then_falls_or_rises_to_its_end():
    assert [annealed(0.0, 0.1, p / 100, warmup=0.25) for p in (0, 10, 24)] == [0.0] * 3
    rise = [annealed(0.0, 0.1, p / 100, warmup=0.25) for p in range(25, 101)]
    assert rise == sorted(rise)
    assert rise[0] == 0
    assert rise[-1] == pytest.approx(0.1)
    assert annealed(0.0, 0.1, 0.625, warmup=0.25) == pytest.approx(0.05)
    assert annealed(0.1, 0.01, 0.5, warmup=0.0) == pytest.approx(0.055)
    assert annealed(0.1, 0.01, 1.0, warmup=1.0) == 0.1


# the config


def test_nothing_is_done_unless_asked_for(tiny):
    plain = keys(tiny(ladder=RUNGS))
    off = {"momentum": 0.5, "dampening": {"aggregation": "sum"}, "freezing": {"warmup": 0.5}}
    assert keys(tiny(ladder=RUNGS, oscillation=off)) == plain
    assert not OscillationConfig().tracks


@pytest.mark.parametrize(
    "changes",
    [
        {"track": True},
        {"dampening": {"final": 0.1}},
        {"dampening": {"start": 0.1}},
        {"freezing": {"start": 0.1, "final": 0.01}},
    ],
)
def test_what_is_done_enters_the_key_of_quantized_rungs(tiny, changes):
    plain, other = keys(tiny(ladder=RUNGS)), keys(tiny(ladder=RUNGS, oscillation=changes))
    assert plain[0] == other[0]
    assert plain[1] != other[1]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"freezing": {"final": 0.01}}, "oscillation.freezing: give start and final"),
        ({"dampening": {"final": -1.0}}, "oscillation.dampening.final"),
        ({"dampening": {"aggregation": "median"}}, "oscillation.dampening.aggregation"),
        ({"momentum": 0.0}, "oscillation.momentum"),
        ({"max_bits": 16}, "oscillation.max_bits"),
        ({"dampning": {}}, "unknown key"),
    ],
)
def test_settings_without_sense_are_refused_by_their_path(tiny, section, message):
    with pytest.raises(ConfigError, match=message):
        tiny(ladder=RUNGS, oscillation=section)


# training


def test_following_tells_shares_and_changes_no_weight(tiny, store, run, tmp_path):
    plain = run(tiny(ladder=RUNGS, train=TRAIN), store)
    followed = run(tiny(ladder=RUNGS, train=TRAIN, oscillation={"track": True}), store)
    assert followed[0].key == plain[0].key
    assert followed[1].sha256 == plain[1].sha256
    assert "weights_oscillating" not in plain[1].metrics
    for line in lines(store, followed[1]):
        assert 0 <= line["weights_oscillating"] <= 1
        assert line["weights_frozen"] == 0
    layers = {row["layer"]: row for row in followed[1].metrics["layers"]}
    narrow = {name for name, row in layers.items() if row["weight_bits"] <= 4}
    assert narrow
    assert {name for name, row in layers.items() if "weight_oscillating" in row} == narrow


def test_frozen_weights_are_told_and_the_model_holds_them(tiny, store, run):
    record = run(tiny(ladder=RUNGS, train=TRAIN, oscillation=FREEZE), store)[1]
    shares = [line["weights_frozen"] for line in lines(store, record)]
    assert shares == sorted(shares)
    assert shares[0] == 0  # the warm-up
    assert 0 < shares[-1] < 1
    assert record.metrics["weights_frozen"] == shares[-1]
    stored = load_file(store.stages / record.key / "model.safetensors")
    assert not [name for name in stored if "frozen" in name or "tracker" in name]
    model = load_network(store, record, torch.device("cpu"))
    for layer in quant_layers(model).values():
        q = layer.weight_quantizer
        assert torch.equal(q(layer.weight), q.encode(layer.weight).dequantize())


def test_dampening_is_a_term_after_its_warmup(tiny, store, run):
    late = {"dampening": {"final": 1.0, "warmup": 0.5, "aggregation": "mean"}}
    record = run(tiny(ladder=RUNGS, train=TRAIN, oscillation=late), store)[1]
    found = ["train_dampening" in line for line in lines(store, record)]
    assert found == [False, True, True]


def distance(store, record):
    """Root mean square of latent weights from their levels, in steps."""
    model = load_network(store, record, torch.device("cpu"))
    found = []
    for layer in quant_layers(model).values():
        q = layer.weight_quantizer.encode(layer.weight)
        if q.bits == 2:
            low, high = layer.weight_quantizer.range()
            found.append(((layer.weight.clamp(low, high) - q.dequantize()) / q.scale).flatten())
    return torch.cat(found).square().mean().sqrt().item()


def test_dampening_leaves_weights_nearer_to_their_levels(tiny, store, run):
    plain = run(tiny(ladder=RUNGS, train=TRAIN), store)[1]
    strong = {"dampening": {"start": 10.0, "final": 10.0}}
    dampened = run(tiny(ladder=RUNGS, train=TRAIN, oscillation=strong), store)[1]
    assert distance(store, dampened) < 0.8 * distance(store, plain)


def test_a_rung_without_narrow_weights_is_not_followed(tiny, store, run):
    rungs = [RUNGS[0], {"weight_bits": 8, "activation_bits": 4, "epochs": 1}]
    record = run(tiny(ladder=rungs, oscillation=FREEZE), store)[1]
    assert "weights_frozen" not in record.metrics


# the second with its first oscillations, the others with frozen weights
@pytest.mark.parametrize(("looks", "optimizer"), [(41, None), (60, None), (62, "adam")])
def test_a_stopped_rung_resumes_to_the_same_bits_and_metrics(
    tiny, store, run, tmp_path, looks, optimizer
):
    own = {"optimizer": optimizer, "lr": 1e-3} if optimizer else {}
    config = tiny(ladder=RUNGS, train={**TRAIN, "quantizer_parameters": own}, oscillation=FREEZE)
    other = Store(tmp_path / "whole")
    whole = run(config, other)
    ladder = open_ladder(config, store)
    stop = StopAfter(looks)
    with pytest.raises(Interrupted):
        [run_stage(ladder, stage, stop) for stage in ladder.plan.stages]
    (left,) = store.stages.glob(f"*.part/{CHECKPOINT}")
    state = read_checkpoint(left)
    assert state["learner"]["tracker.frozen"].any() == (looks > 50)
    assert ("parts" in state["optimizer"]) == (optimizer is not None)
    again = run(config, Store(store.root))
    assert [record.sha256 for record in again] == [record.sha256 for record in whole]
    timing = ("seconds", "images_per_second")
    for a, b in zip(lines(store, again[1]), lines(other, whole[1]), strict=True):
        assert {k: v for k, v in a.items() if k not in timing} == {
            k: v for k, v in b.items() if k not in timing
        }
    assert again[1].metrics["layers"] == whole[1].metrics["layers"]


def test_every_quantizer_hears_the_progress_of_its_own_stage(tiny, store, run, monkeypatch):
    heard = []
    rungs = [RUNGS[0], {**RUNGS[1], "quantizer": "lsq", "epochs": 1}]
    monkeypatch.setattr(LSQ, "at_progress", lambda self, fraction: heard.append(fraction))
    record = run(tiny(ladder=rungs), store)[1]
    model = load_network(store, record, torch.device("cpu"))
    count = sum(isinstance(q, LSQ) for q in quantizers(model).values())
    told = heard[::count]
    assert told == sorted(set(heard))
    assert told[0] == 0
    assert told[-1] < 1

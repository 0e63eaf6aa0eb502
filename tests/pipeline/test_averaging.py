"""Weight averaging: the averages themselves, the config, and a stage that ends with one."""

import json

import pytest
import torch
from bitladder.pipeline.averaging import WeightAverage, ema_decay, note_ranges
from bitladder.pipeline.config_load import parse_config
from bitladder.pipeline.errors import ConfigError, Interrupted
from bitladder.pipeline.learner import Learner
from bitladder.pipeline.network import load_network
from bitladder.pipeline.plan import make_plan
from bitladder.pipeline.record import CHECKPOINT, MODEL
from bitladder.pipeline.runner import open_ladder, run_stage
from bitladder.pipeline.store import Store
from bitladder.pipeline.tensors import read_checkpoint
from bitladder.quant.oscillation import followed_layers
from safetensors.torch import load_file
from stop_after import StopAfter
from torch import nn

RUNGS = [
    {"weight_bits": 32, "activation_bits": 32},
    {"weight_bits": 2, "activation_bits": 4},
]
METHODS = [
    {"name": "ema", "decay": 0.9},
    {"name": "tail", "start": 0.5},
]
BATCHES = 2  # of the re-estimation


def train(averaging, **more):
    return {
        "epochs": 2,
        "optimizer": {"lr": 0.1},
        "calibration_batches": 2,
        "batch_norm_batches": BATCHES,
        "averaging": averaging,
        **more,
    }


def keys(config):
    return [stage.key for stage in make_plan(config).stages]


def walk(seed, steps):
    """A model whose weights make random steps; they are yielded after each."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    for step in range(steps):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        yield step, model


def test_parameters_may_have_any_name():
    model = nn.Module()
    for name in ("decay", "start", "put"):
        model.register_parameter(name, nn.Parameter(torch.ones(2)))
    average = WeightAverage(model, method="tail", start=0.0)
    with torch.no_grad():
        model.decay.fill_(3.0)
    average.update(0, 1)
    with torch.no_grad():
        model.decay.zero_()
    average.put()
    assert model.decay.tolist() == [3.0, 3.0]


def now(model):
    return [p.detach().double().clone() for p in model.parameters()]


def assert_close(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


# the averages


@pytest.mark.parametrize(
    ("start", "first"), [(0.0, 0), (0.1, 3), (0.75, 23), (0.99, 29), (1.0, 29)]
)
def test_the_tail_is_the_plain_mean_of_the_weights_since_its_start(start, first):
    average, path = None, []
    for step, model in walk(0, 30):
        average = average or WeightAverage(model, method="tail", start=start)
        average.update(step, 30)
        path.append(now(model))
    average.put()
    means = [torch.stack(values).mean(0) for values in zip(*path[first:], strict=True)]
    assert_close(model.parameters(), means)


@pytest.mark.parametrize("decay", [0.05, 0.5, 0.999])
def test_the_ema_is_that_of_a_loop_by_hand(decay):
    average = None
    for step, model in walk(1, 40):
        if average is None:
            average, hand = WeightAverage(model, method="ema", decay=decay), now(model)
        average.update(step, 40)
        d = min(decay, (1 + step) / (10 + step))
        hand = [d * old + (1 - d) * new for old, new in zip(hand, now(model), strict=True)]
    average.put()
    assert_close(model.parameters(), hand)


def test_the_decay_rises_to_its_value_and_stays():
    decays = [ema_decay(0.99, step) for step in range(2000)]
    assert decays[0] == 0.1
    assert decays == sorted(decays)
    assert decays[-1] == 0.99


def test_of_a_parameter_that_stops_learning_the_average_is_its_last_value():
    average = None
    for step, model in walk(2, 20):
        average = average or WeightAverage(model, method="ema", decay=0.9)
        if step == 10:
            model[0].bias.requires_grad_(False)
            last = model[0].bias.clone()
        if step > 10:
            model[0].bias.copy_(last)
        average.update(step, 20)
    running = model[0].weight.clone()
    average.put()
    assert torch.equal(model[0].bias, last)
    assert not torch.allclose(model[0].weight, running)


def test_averages_are_float32_whatever_the_student_is():
    student = nn.Linear(4, 4).bfloat16()
    average = WeightAverage(student, method="ema")
    average.update(0, 10)
    assert {buffer.dtype for buffer in average.buffers()} == {torch.float32}
    average.put()
    assert student.weight.dtype == torch.bfloat16


# the config


def test_no_averaging_changes_no_key(tiny):
    plain = keys(tiny(ladder=RUNGS))
    assert keys(tiny(ladder=RUNGS, train={**train("none"), "batch_norm_batches": 50})) == plain
    stored = tiny(ladder=RUNGS).model_dump(mode="json")
    assert keys(parse_config(stored)) == plain


def test_an_average_and_its_own_setting_enter_the_key(tiny):
    short = [keys(tiny(ladder=RUNGS, train=train(name)))[0] for name in ("none", "ema", "tail")]
    assert len(set(short)) == 3
    for method, other in zip(METHODS, [{"decay": 0.8}, {"start": 0.6}], strict=True):
        own = keys(tiny(ladder=RUNGS, train=train(method)))
        changed = keys(tiny(ladder=RUNGS, train=train({**method, **other})))
        assert own[0] != changed[0]
        assert own[0] not in short


def test_an_average_over_no_epoch_does_not_enter_the_key(tiny):
    rungs = [RUNGS[0], {**RUNGS[1], "epochs": 0}]
    plain = tiny(ladder=rungs)
    rungs[1] = {**rungs[1], "train": {"averaging": "ema"}}
    assert keys(tiny(ladder=rungs)) == keys(plain)


def test_a_rung_with_another_average_takes_no_setting_of_the_first(tiny):
    rungs = [RUNGS[0], {**RUNGS[1], "train": {"averaging": "tail"}}]
    config = tiny(ladder=rungs, train=train(METHODS[0]))
    assert config.ladder[0].train.averaging.decay == 0.9
    assert config.ladder[1].train.averaging.name == "tail"
    assert parse_config(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (train({"name": "ema", "start": 0.5}), "train.averaging: ema has no start"),
        (train({"name": "tail", "decay": 0.5}), "train.averaging: tail has no decay"),
        (train({"decay": 0.5}), "train.averaging: none has no decay"),
        (train("mean"), "train.averaging.name"),
        (train({"name": "ema", "decay": 1.0}), "train.averaging.decay"),
        (train("ema", batch_norm_batches=0), "train: averaging: ema .* give batch_norm_batches"),
    ],
)
def test_settings_without_sense_are_refused_by_their_path(tiny, section, message):
    with pytest.raises(ConfigError, match=message):
        tiny(ladder=RUNGS, train=section)


# training


@pytest.fixture
def recorded(monkeypatch):
    """The student's parameters after each step of the stage that runs."""
    path = []
    original = Learner.after_step

    def after_step(self, progress):
        original(self, progress)
        path.append({n: p.detach().clone() for n, p in self.student.named_parameters()})

    monkeypatch.setattr(Learner, "after_step", after_step)
    return path


def test_a_stage_stores_the_mean_of_its_tail(tiny, store, run, recorded):
    rungs = [RUNGS[0], {**RUNGS[1], "train": train({"name": "tail", "start": 0.5})}]
    record = run(tiny(ladder=rungs), store)[1]
    own = recorded[len(recorded) // 2 :]
    assert "conv2.input_quantizer.scale" in own[0]
    stored = load_file(store.stages / record.key / MODEL)
    for name in own[0]:
        mean = torch.stack([weights[name] for weights in own[len(own) // 2 :]]).mean(0)
        torch.testing.assert_close(stored[name], mean, rtol=1e-5, atol=1e-6)
        if mean.dim() > 1:
            assert not torch.allclose(stored[name], own[-1][name], rtol=1e-5, atol=1e-6)


def test_what_is_not_learned_is_as_after_the_last_step_and_statistics_are_new(tiny, store, run):
    last = run(tiny(ladder=RUNGS, train=train("none")), store)
    averaged = run(tiny(ladder=RUNGS, train=train(METHODS[1])), store)
    for a, b in [(load_file(store.stages / r.key / MODEL) for r in (last[0], averaged[0]))]:
        assert not torch.equal(a["bn2.running_mean"], b["bn2.running_mean"])
        assert a["bn2.num_batches_tracked"] == b["bn2.num_batches_tracked"] == BATCHES
        assert set(a) == set(b)
    a, b = (lines(store, r) for r in (last[0], averaged[0]))
    assert a == b  # validation of the running weights


def lines(store, record):
    text = (store.stages / record.key / "metrics.jsonl").read_text()
    timing = ("seconds", "images_per_second")
    rows = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in row.items() if k not in timing} for row in rows]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method["name"])
def test_averages_at_one_bit_have_two_levels_and_a_range_of_their_own(tiny, store, run, method):
    rungs = [
        RUNGS[0],
        {"weight_bits": 1, "activation_bits": 2, "quantizer": {"weight": "bireal"}},
    ]
    record = run(tiny(ladder=rungs, train=train(method)), store)[1]
    assert record.metrics["weight_levels"] == 2
    model = load_network(store, record, torch.device("cpu"))
    quantizer = model.conv2.weight_quantizer
    levels = quantizer.encode(model.conv2.weight).levels()
    torch.testing.assert_close(quantizer.range()[1], levels[:, 1])


FROZEN = {"weight": 0.1, "warmup": 0.4, "freeze_weight_scale": True}
CONTROL = {"momentum": 0.1, "freezing": {"start": 0.15, "final": 0.02, "warmup": 0.3}}


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method["name"])
@pytest.mark.parametrize("looks", [5, 30, 46])  # 22 steps a rung, a look more before each
def test_a_stopped_rung_resumes_to_the_same_average(tiny, store, run, tmp_path, method, looks):
    config = tiny(ladder=RUNGS, train=train(method), bin_regularization=FROZEN, oscillation=CONTROL)
    other = Store(tmp_path / "whole")
    whole = run(config, other)
    ladder = open_ladder(config, store)
    stop = StopAfter(looks)
    with pytest.raises(Interrupted):
        [run_stage(ladder, stage, stop) for stage in ladder.plan.stages]
    (left,) = store.stages.glob(f"*.part/{CHECKPOINT}")
    assert "averaging.bn1/weight" in read_checkpoint(left)["learner"]
    again = run(config, Store(store.root))
    assert [record.sha256 for record in again] == [record.sha256 for record in whole]


def test_frozen_steps_and_frozen_weights_keep_what_they_were_frozen_to(
    tiny, store, run, recorded, monkeypatch
):
    trackers = []
    original = Learner.end

    def end(self):
        before = self.tracker.state.frozen_codes.clone() if self.tracker else None
        original(self)
        if self.tracker:
            trackers.append((self.tracker, before))

    monkeypatch.setattr(Learner, "end", end)
    method = {"name": "ema", "decay": 0.95}
    config = tiny(
        ladder=RUNGS,
        train=train(method, epochs=3),
        bin_regularization=FROZEN,
        oscillation=CONTROL,
    )
    record = run(config, store)[1]
    ((tracker, codes),) = trackers
    frozen = tracker.state.frozen
    assert 0 < frozen.float().mean() < 1
    model = load_network(store, record, torch.device("cpu"))
    layers = followed_layers(model, max_bits=4).values()
    stored = torch.cat([q.encode(layer.weight).codes.flatten() for layer, q in layers])
    assert torch.equal(stored[frozen], codes[frozen])
    quantizer = model.conv2.weight_quantizer
    name = next(n for n, p in model.named_parameters() if p is quantizer.scale)
    assert torch.equal(quantizer.scale, recorded[-1][name])


def test_ranges_are_noted_and_modes_left_as_they_were(tiny, store, run):
    rungs = [RUNGS[0], {"weight_bits": 2, "activation_bits": 4, "quantizer": "dorefa"}]
    model = load_network(store, run(tiny(ladder=rungs), store)[1], torch.device("cpu"))
    layer = model.conv2
    with torch.no_grad():
        layer.latent.mul_(3)
    highest = layer.weight_quantizer.encode(layer.weight).levels().max()
    assert layer.weight_quantizer.range()[1] < 0.9 * highest
    modes = [module.training for module in model.modules()]
    note_ranges(model)
    torch.testing.assert_close(layer.weight_quantizer.range()[1], highest)
    assert [module.training for module in model.modules()] == modes

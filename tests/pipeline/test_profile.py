"""The profile of a training step: its parts, and what it must leave alone."""

import pytest
import torch
from bitladder.pipeline import stopwatch
from bitladder.pipeline.errors import ConfigError
from bitladder.pipeline.fresh_steps import fresh_steps
from bitladder.pipeline.profile import profile_stage
from bitladder.pipeline.runner import load_data
from bitladder.pipeline.stopwatch import BACKWARD, INPUTS, PARTS, REST, WEIGHTS, Stopwatch, watched
from bitladder.quant.swap import quantizers

CPU = torch.device("cpu")


@pytest.fixture
def made(tiny):
    """The steps of the rung W1A2, under one teacher."""
    return fresh_steps(tiny(), 2, load_data("digits", "{}"), CPU)


@pytest.fixture
def batch():
    x = torch.randn(16, 1, 8, 8).contiguous(memory_format=torch.channels_last)
    return x, torch.randint(10, (16,))


def seconds_of(step, batch):
    watch = Stopwatch(CPU)
    with watched(watch, step):
        watch.begin(REST)
        step(*batch, 1)
        watch.end()
    return watch.read()


class Clock:
    """Stands still but for what is said to take a second."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def second(self, function):
        def slow(*args, **kwargs):
            self.now += 1.0
            return function(*args, **kwargs)

        return slow

    def backward(self, x):
        """`x`, whose gradient takes a second."""
        clock = self

        class Slow(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, grad):
                clock.now += 1.0
                return grad

        return Slow.apply(x)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(stopwatch, "time", clock)
    return clock


def test_the_parts_add_up_to_the_step(tiny):
    found = profile_stage(tiny(), "w4a8", steps=2)
    assert set(found.parts) == set(PARTS)
    assert sum(found.parts.values()) == pytest.approx(found.step)
    assert all(found.parts[part] > 0 for part in PARTS)


def test_an_fp32_rung_spends_nothing_on_quantizers_and_teachers(tiny):
    found = profile_stage(tiny(), "fp32", steps=1)
    assert found.teachers == 0
    assert [part for part in PARTS if found.parts[part] == 0] == ["teacher", WEIGHTS, INPUTS]


def test_the_last_rung_is_profiled_unless_another_is_named(tiny):
    found = profile_stage(tiny(), steps=1)
    assert found.stage.name == "w1a2"
    assert (found.batch_size, found.teachers, found.steps) == (128, 1, 1)


@pytest.mark.parametrize("part", ["teacher", "losses", "optimizer", "after the step", "rest"])
def test_what_takes_a_second_shows_in_its_own_part(part, made, batch, clock, monkeypatch):
    step = made.own
    slow = {
        "teacher": (step.teachers.networks[0], "forward"),
        "losses": (step.learner.objective, "forward"),
        "optimizer": (step.optimizer, "_init_group"),
        "after the step": (step.learner, "after_step"),
        "rest": (step.learner, "before_step"),
    }
    monkeypatch.setattr(*slow[part], clock.second(getattr(*slow[part])))
    seconds = seconds_of(step, batch)
    groups = len(step.optimizer.param_groups)
    assert {each: took for each, took in seconds.items() if took} == {
        part: groups if part == "optimizer" else 1.0
    }


@pytest.mark.parametrize(
    ("end", "part"), [("weight_quantizer", WEIGHTS), ("input_quantizer", INPUTS)]
)
def test_a_quantizer_s_backward_pass_counts_as_the_quantizer_s(end, part, made, batch, clock):
    found = [q for n, q in quantizers(made.own.learner.student).items() if n.endswith(end)]
    inner = found[-1].forward
    found[-1].forward = lambda x: clock.backward(inner(x))
    seconds = seconds_of(made.own, batch)
    assert {each: took for each, took in seconds.items() if took} == {part: 1.0}


def test_the_backward_pass_of_a_layer_is_not_its_quantizers(made, batch, clock):
    step = made.own
    loss = step.learner.objective.forward

    def slow(*args):
        terms = loss(*args)
        return {**terms, "total": clock.backward(terms["total"])}

    step.learner.objective.forward = slow
    seconds = seconds_of(step, batch)
    assert {each: took for each, took in seconds.items() if took} == {BACKWARD: 1.0}


def test_watching_changes_nothing_that_is_computed(tiny, batch):
    def after(watch):
        step = fresh_steps(tiny(), 2, load_data("digits", "{}"), CPU).own
        seconds_of(step, batch) if watch else step(*batch, 1)
        return step.learner.state_dict()

    torch.testing.assert_close(after(watch=True), after(watch=False), rtol=0, atol=0)


def test_nothing_of_the_watch_stays_behind(made, batch):
    seconds_of(made.own, batch)
    left = [
        module
        for module in (*made.own.learner.modules(), *made.own.teachers.networks[0].modules())
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    ]
    assert left == []


def test_a_stage_that_is_compiled_is_timed_both_ways(tiny, monkeypatch):
    monkeypatch.setattr("bitladder.pipeline.full_batches.BACKEND", "eager")
    found = profile_stage(tiny(train={"epochs": 1, "compile": "on"}), "w4a8", steps=1)
    assert found.compiled is not None
    assert found.parts[INPUTS] > 0
    assert found.images_per_second == pytest.approx(128 / (found.data + found.compiled))


def test_a_rung_that_is_not_there_is_named_with_those_that_are(tiny):
    with pytest.raises(ConfigError, match="no stage 'w2a2' in tiny; there are: fp32, w4a8, w1a2"):
        profile_stage(tiny(), "w2a2")


def test_a_rung_that_is_not_trained_has_no_step(tiny):
    rungs = [{"weight_bits": 32, "activation_bits": 32}, {"weight_bits": 8, "activation_bits": 8}]
    with pytest.raises(ConfigError, match="w8a8 has 0 epochs"):
        profile_stage(tiny(ladder=[rungs[0], {**rungs[1], "epochs": 0}]))


def test_several_teachers_and_inner_layers_are_profiled_too(tiny):
    rungs = [
        {"weight_bits": 32, "activation_bits": 32},
        {"weight_bits": 8, "activation_bits": 8},
        {
            "weight_bits": 4,
            "activation_bits": 4,
            "teacher": "dense",
            "distill": {"features": {"name": "attention_transfer", "layers": ["conv2"]}},
        },
    ]
    assert profile_stage(tiny(ladder=rungs), steps=1).teachers == 2


def test_a_rung_of_an_automatic_ladder_is_profiled(tiny):
    auto = {"weight_bits": 2, "activation_bits": 2, "budget": 0.5}
    assert profile_stage(tiny(ladder="auto", auto=auto), "w2a2", steps=1).stage.weight_bits == 2

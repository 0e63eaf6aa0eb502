import pytest
import torch
import torch._dynamo
from bitladder.pipeline import full_batches
from bitladder.pipeline.compiling import compile_networks, pays, wants
from bitladder.pipeline.config import TrainConfig
from bitladder.pipeline.errors import Interrupted
from bitladder.pipeline.runner import open_ladder, run_ladder, run_stage
from bitladder.pipeline.store import Store
from bitladder.pipeline.teachers import Teachers
from bitladder.quant import probe
from quantized_learner import quantized_learner
from safetensors.torch import load_file
from stop_after import StopAfter
from torch import nn
from torch._dynamo.utils import counters

FP32 = {"weight_bits": 32, "activation_bits": 32}
RUNGS = [FP32, *({"weight_bits": bits, "activation_bits": bits} for bits in (8, 4, 2, 1))]


@pytest.fixture(autouse=True)
def traced_only(monkeypatch):
    """Graphs are traced and differentiated as ever, and then run by torch, not by generated C++."""
    monkeypatch.setattr(full_batches, "BACKEND", "aot_eager")
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def weights(store, records):
    return [load_file(store.stages / record.key / "model.safetensors") for record in records]


def messages(events):
    return [event.text for event in events if event.kind == "message"]


def test_five_rungs_share_their_compiled_code(tiny, run, tmp_path, events):
    config = tiny(ladder=RUNGS, train={"epochs": 1, "compile": "on"})
    records = run(config, Store(tmp_path / "a"), events)
    assert all(record.metrics["compiled"] for record in records)
    # students in FP32, in LSQ at 8, 4 and 2 bits, in UniQ; teachers in FP32 and in LSQ
    assert counters["stats"]["unique_graphs"] == 5
    assert not counters["graph_break"]
    assert not counters["recompile_limit"]
    assert [text.partition(" in ")[0] for text in messages(events)] == ["compiled"] * 5


def test_compiled_steps_follow_the_same_path(tiny, run, tmp_path):
    found = []
    for compile_ in ("on", "off"):
        store = Store(tmp_path / compile_)
        train = {"epochs": 1, "compile": compile_, "optimizer": {"lr": 0.01}}
        found.append(weights(store, run(tiny(ladder=RUNGS, train=train), store)))
    for compiled, plain in zip(*found, strict=True):
        for name, value in plain.items():
            torch.testing.assert_close(compiled[name], value, rtol=1e-2, atol=1e-3)


def test_bin_regularization_of_activations_is_not_lost_in_compiled_code(tiny, run, tmp_path):
    bins = {"activation": 0.1, "warmup": 0.0}
    found = []
    for compile_ in ("on", "off"):
        store = Store(tmp_path / compile_)
        train = {"epochs": 1, "compile": compile_}
        config = tiny(ladder=RUNGS[:3], train=train, bin_regularization=bins)
        found.append(weights(store, run(config, store))[1:])  # the quantized rungs
    for compiled, plain in zip(*found, strict=True):
        assert all(torch.equal(compiled[name], value) for name, value in plain.items())


def test_a_stage_goes_on_as_it_began(tiny, tmp_path):
    config = tiny(ladder=RUNGS[:2], train={"epochs": 2, "compile": "on"})
    whole = Store(tmp_path / "whole")
    expected = weights(whole, run_ladder(open_ladder(config, whole)))
    ladder = open_ladder(config, tmp_path / "stopped")
    run_stage(ladder, ladder.plan.stages[0], lambda: None)
    with pytest.raises(Interrupted):
        run_stage(ladder, ladder.plan.stages[1], StopAfter(15))
    off = tiny(ladder=RUNGS[:2], train={"epochs": 2, "compile": "off"})  # the keys are the same
    again = open_ladder(off, tmp_path / "stopped")
    records = run_ladder(again)
    assert records[1].metrics["compiled"]
    for mine, other in zip(weights(again.store, records), expected, strict=True):
        assert all(torch.equal(mine[name], other[name]) for name in other)


def test_without_a_compiler_a_stage_says_so_and_trains(tiny, run, store, events, monkeypatch):
    def none_here(*_):
        raise RuntimeError("no C++ compiler found\nand so on")

    monkeypatch.setattr(full_batches, "BACKEND", none_here)
    config = tiny(ladder=RUNGS[:2], train={"epochs": 1, "compile": "on"})
    records = run(config, store, events)
    assert not any(record.metrics["compiled"] for record in records)
    assert len(messages(events)) == 2
    assert all("no C++ compiler found" in text for text in messages(events))
    assert all("\n" not in text for text in messages(events))


def test_an_annealed_gradient_is_not_compiled(tiny, run, store, events):
    ede = {"name": "bireal", "estimator": "ede"}
    rung = {"weight_bits": 1, "activation_bits": 32, "quantizer": {"weight": ede}}
    records = run(tiny(ladder=[FP32, rung], train={"compile": "on", "epochs": 1}), store, events)
    assert [record.metrics["compiled"] for record in records] == [True, False]
    assert "annealed" in messages(events)[-1]


def test_trying_the_compiled_code_leaves_no_trace():
    learner, x = quantized_learner(4)
    before = {name: value.clone() for name, value in learner.state_dict().items()}
    drawn = torch.get_rng_state()
    compile_networks(learner, Teachers([]), x)
    assert learner.fast is not None
    assert all(torch.equal(value, before[name]) for name, value in learner.state_dict().items())
    assert all(parameter.grad is None for parameter in learner.parameters())
    assert torch.equal(torch.get_rng_state(), drawn)


def test_a_smaller_batch_compiles_nothing_more():
    learner, x = quantized_learner(4)
    compile_networks(learner, Teachers([]), x)
    graphs = counters["stats"]["unique_graphs"]
    targets = torch.zeros(8, dtype=torch.int64)
    for size in (8, 5, 3):
        learner(x[:size], targets[:size], (), 0.0)["total"].backward()
    assert counters["stats"]["unique_graphs"] == graphs


def test_generated_code_gives_the_same_step(monkeypatch):
    monkeypatch.setattr(full_batches, "BACKEND", "inductor")
    targets = torch.arange(8) % 10
    found = []
    for fast in (False, True):
        learner, x = quantized_learner(2)
        if fast:
            compile_networks(learner, Teachers([]), x)
            assert learner.fast is not None
        loss = learner(x, targets, (), 0.0)["total"]
        loss.backward()
        found.append((loss, {n: p.grad for n, p in learner.student.named_parameters()}))
    (plain, expected), (loss, gradients) = found
    torch.testing.assert_close(loss, plain, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-2, atol=1e-4)


def test_auto_compiles_only_where_compiled_steps_are_faster(monkeypatch):
    found = probe(nn.Conv2d(3, 16, 3), [torch.randn(2, 3, 32, 32)])
    for capability, wanted in (("AVX2", False), ("AVX512", True)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda c=capability: c)
        for compiled, want in (("auto", wanted), ("on", True), ("off", False)):
            train = TrainConfig(compile=compiled)
            device = torch.device("cpu")
            assert wants(train, found, batch_size=64, steps=10**6, device=device) is want


def test_compiling_pays_for_long_stages_only():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))
    found = probe(model, [torch.randn(2, 3, 32, 32)])
    cpu = torch.device("cpu")
    assert not pays(found, batch_size=64, steps=20, device=cpu)
    assert pays(found, batch_size=64, steps=10**6, device=cpu)
    long_enough = [n for n in range(5) if pays(found, batch_size=64, steps=10**n, device=cpu)]
    assert long_enough == sorted(long_enough)


def test_the_embedded_ladder_is_too_short_to_compile(tiny, run, store, events):
    records = run(tiny(train={"epochs": 2, "compile": "auto"}), store, events)
    assert not any(record.metrics["compiled"] for record in records)
    assert messages(events) == []

import pytest
import torch
from bitladder.pipeline import precision
from bitladder.pipeline.plan import make_plan
from quantized_learner import quantized_learner
from safetensors.torch import load_file
from torch import nn

RUNGS = [{"weight_bits": bits, "activation_bits": bits} for bits in (32, 8, 2, 1)]


def keys(config):
    return [stage.key for stage in make_plan(config).stages]


def test_precision_is_part_of_what_a_stage_is_and_compilation_is_not(tiny):
    plain = keys(tiny())
    assert keys(tiny(train={"epochs": 2, "optimizer": {"lr": 0.1}, "calibration_batches": 2})) == (
        plain
    )
    half = tiny(
        train={
            "epochs": 2,
            "optimizer": {"lr": 0.1},
            "calibration_batches": 2,
            "precision": "bf16",
        }
    )
    assert not set(keys(half)) & set(plain)
    off = {"epochs": 2, "optimizer": {"lr": 0.1}, "calibration_batches": 2, "compile": "off"}
    assert keys(tiny(train=off)) == plain


def test_a_ladder_in_bf16_learns_and_keeps_its_files_in_float32(tiny, run, store):
    train = {"epochs": 4, "optimizer": {"lr": 0.1}, "precision": "bf16", "calibration_batches": 2}
    records = run(tiny(ladder=RUNGS, train=train, data={"name": "digits", "batch_size": 32}), store)
    for record in records:
        assert record.metrics["precision"] == "bf16"
        state = load_file(store.stages / record.key / "model.safetensors")
        assert torch.bfloat16 not in {value.dtype for value in state.values()}
    assert records[0].metrics["test_top1"] > 0.4  # chance is 0.1
    assert records[2].metrics["max_levels"] <= 4


def half_step(bits):
    """A step in bf16: what each layer gave, the losses, and the learner with its gradients."""
    learner, x = quantized_learner(bits, precision="bf16")
    given = {}
    for name, module in learner.student.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda m, a, y, name=name: given.update({name: y.dtype}))
    terms = learner(x, torch.arange(8), (), 0.0)
    terms["total"].backward()
    return given, terms, learner


def test_layers_compute_in_bf16_and_all_that_is_learned_stays_in_float32():
    given, terms, learner = half_step(4)
    assert set(given.values()) == {torch.bfloat16}
    assert {term.dtype for term in terms.values()} == {torch.float32}
    for name, parameter in learner.named_parameters():
        assert parameter.dtype == torch.float32, name
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32, name
    assert all(b.dtype != torch.bfloat16 for b in learner.buffers())


@pytest.mark.parametrize("fast", [True, False])
def test_auto_is_settled_by_machine_and_width_before_anything_is_planned(tiny, monkeypatch, fast):
    monkeypatch.setattr(precision, "_bf16_is_fast", lambda device: fast)
    rungs = [*RUNGS, {"weight_bits": 8, "activation_bits": 4}, {**RUNGS[0], "epochs": 1}]
    train = {"epochs": 2, "optimizer": {"lr": 0.1}, "calibration_batches": 2}
    config = tiny(ladder=rungs, train={**train, "precision": "auto"})
    got = {stage.name: stage.train.precision for stage in config.ladder}
    wide = "bf16" if fast else "fp32"
    assert got == {
        **dict.fromkeys(("fp32", "w8a8", "w8a4", "fp32-2"), wide),
        **dict.fromkeys(("w2a2", "w1a1"), "fp32"),
    }
    if not fast:
        assert keys(config) == keys(tiny(ladder=rungs, train=train))


def test_auto_is_settled_on_the_rungs_of_an_automatic_ladder(tiny, monkeypatch):
    monkeypatch.setattr(precision, "_bf16_is_fast", lambda device: True)
    rules = {"weight_bits": 2, "activation_bits": 2, "budget": 0.1}
    config = tiny(ladder="auto", auto=rules, train={"epochs": 1, "precision": "auto"})
    got = {name: stage.train.precision for name, stage in config.auto.rungs.items()}
    assert got["w8a8"] == "bf16"
    assert got["w2a2"] == "fp32"


def test_this_machine_says_whether_bf16_is_fast(tiny):
    rung = tiny(ladder=RUNGS[:1], train={"epochs": 1, "precision": "auto"}).ladder[0]
    assert rung.train.precision in ("fp32", "bf16")
    nowhere = tiny(runtime={"device": "nowhere"}, train={"epochs": 1, "precision": "auto"})
    assert {stage.train.precision for stage in nowhere.ladder} == {"fp32"}

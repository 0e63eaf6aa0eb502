"""The way down to one bit, as YAML says it: two steps, one half alone, and both kinds of levels."""

from types import SimpleNamespace

import pytest
import torch
from bitladder.pipeline import fit
from bitladder.pipeline.config_load import parse_config
from bitladder.pipeline.errors import ConfigError
from bitladder.pipeline.network import load_network
from bitladder.pipeline.runner import open_ladder, run_ladder
from bitladder.pipeline.store import Store
from bitladder.pipeline.yaml_reader import read_yaml
from bitladder.quant.probing import evaluating
from bitladder.quant.signs import SignQuantizer
from bitladder.quant.swap import quantizers
from torch.optim import SGD, Adam

# activations first, then weights; Adam at one bit, without decay on the weights of the last rung
TWO_STEPS = """
name: two-steps
data: {name: digits, batch_size: 32}
model: {name: preact_resnet8, width: 4, activation: rprelu}
train:
  optimizer: {name: sgd, lr: 0.02, momentum: 0.95, weight_decay: 1e-4}
  calibration_batches: 4
  batch_norm_batches: 16
policy: {shortcut: 8}
total_epochs: 6
ladder:
  - {weight_bits: 32, activation_bits: 32, epochs: 3}
  - {weight_bits: 2, activation_bits: 2, share: 1}
  - weight_bits: 2
    activation_bits: 1
    share: 2
    quantizer: {activation: {name: reactnet, estimator: ede}}
    train: {optimizer: {name: adam, lr: 5e-3, weight_decay: 1e-5}}
  - weight_bits: 1
    activation_bits: 1
    share: 3
    quantizer:
      weight: {name: bireal, estimator: ede}
      activation: {name: reactnet, estimator: ede}
    train: {optimizer: {name: adam, lr: 5e-3, weight_decay: 0.0}}
"""
SIGNED = ["bireal", "reactnet", "xnor"]
UNSIGNED = ["auto", "uniq", "dorefa"]
WEIGHTS = ["auto", "bireal", "xnor", "dorefa"]
CHANCE = 0.1

# one rung for each combination, all from one FP32 network
BEHIND_RPRELU = {
    f"w{bits}-{method}": (bits, 1, {"weight": "bireal"} if bits == 1 else {}, method)
    for method in SIGNED
    for bits in (1, 32)
}
BEHIND_RELU = {
    f"w{bits}-{method}": (bits, 1, {}, method) for method in UNSIGNED for bits in (1, 32)
}
WEIGHTS_ALONE = {
    f"{method}-a{bits}": (1, bits, {"weight": method}, "auto")
    for method in WEIGHTS
    for bits in (2, 32)
}


def ladder_of(activation, rungs):
    """FP32, and the rungs beside each other under it."""
    return parse_config(
        {
            "name": "beside",
            "data": {"name": "digits", "batch_size": 32},
            "model": {"name": "tiny_convnet", "activation": activation},
            "train": {
                "epochs": 2,
                "optimizer": {"name": "adam", "lr": 0.01, "weight_decay": 0.0},
                "calibration_batches": 4,
                "batch_norm_batches": 16,
            },
            "ladder": [
                {"weight_bits": 32, "activation_bits": 32, "epochs": 4},
                *(
                    {
                        "name": name,
                        "weight_bits": weight_bits,
                        "activation_bits": activation_bits,
                        "init": "fp32",
                        "teacher": "none",
                        "quantizer": {"activation": method, **quantizer},
                    }
                    for name, (weight_bits, activation_bits, quantizer, method) in rungs.items()
                ),
            ],
        }
    )


def run_once(config, store):
    """Records and networks by rung."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        records = run_ladder(open_ladder(config, store))
    finally:
        torch.set_num_threads(threads)
    models = [load_network(store, record, torch.device("cpu")) for record in records]
    names = [stage.name for stage in config.ladder]
    return {
        name: SimpleNamespace(metrics=record.metrics, model=model)
        for name, record, model in zip(names, records, models, strict=True)
    }


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """The ladder of two steps, run once, with its optimizers and what the signs were told."""
    optimizers, told = [], []
    build, at_progress = fit.build_optimizer, SignQuantizer.at_progress

    def built(*args):
        optimizers.append(build(*args))
        told.append([])
        return optimizers[-1]

    def hear(self, fraction):
        at_progress(self, fraction)
        told[-1].append(self.gradient.progress)

    config = parse_config(read_yaml(TWO_STEPS, "two-steps"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "build_optimizer", built)
        patch.setattr(SignQuantizer, "at_progress", hear)
        rungs = run_once(config, Store(tmp_path_factory.mktemp("two") / "artifacts"))
    return SimpleNamespace(rungs=list(rungs.values()), optimizers=optimizers, told=told)


@pytest.fixture(scope="module")
def behind_relu(tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("relu") / "artifacts")
    return run_once(ladder_of("relu", BEHIND_RELU | WEIGHTS_ALONE), store)


@pytest.fixture(scope="module")
def behind_rprelu(tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("rprelu") / "artifacts")
    return run_once(ladder_of("rprelu", BEHIND_RPRELU), store)


def binary(model, target):
    """The quantizers of one half at one bit."""
    own = quantizers(model).values()
    return [q for q in own if q.bits == 1 and q.site.target == target]


def values_met(model, quantizer):
    """The distinct values that a quantizer of activations gives on some images."""
    images = torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    met = set()
    hook = quantizer.register_forward_hook(lambda _, args, y: met.update(y.unique().tolist()))
    with torch.no_grad(), evaluating(model):
        model(images)
    hook.remove()
    return sorted(met)


def test_the_rungs_at_one_bit_train_by_adam_and_the_last_without_weight_decay(two_steps):
    assert [type(optimizer) for optimizer in two_steps.optimizers] == [SGD, SGD, Adam, Adam]
    decays = [{g["weight_decay"] for g in o.param_groups} for o in two_steps.optimizers]
    assert decays[1:] == [{1e-4, 0.0}, {1e-5, 0.0}, {0.0}]
    assert two_steps.optimizers[1].param_groups[0]["momentum"] == 0.95


def test_two_steps_share_the_epochs_and_end_above_chance(two_steps):
    assert [rung.metrics["epochs"] for rung in two_steps.rungs] == [3, 1, 2, 3]
    assert min(rung.metrics["test_top1"] for rung in two_steps.rungs) > 3 * CHANCE


def test_two_steps_binarize_activations_and_then_weights(two_steps):
    _, w2a2, w2a1, w1a1 = (rung.model for rung in two_steps.rungs)
    counts = [
        (len(binary(model, "weight")), len(binary(model, "activation")))
        for model in (w2a2, w2a1, w1a1)
    ]
    assert counts == [(0, 0), (0, 6), (6, 6)]
    for model in (w2a1, w1a1):
        for quantizer in binary(model, "activation"):
            assert values_met(model, quantizer) == [-1.0, 1.0]


def test_estimators_are_annealed_over_each_stage_by_itself(two_steps):
    assert [bool(told) for told in two_steps.told] == [False, False, True, True]
    for told in two_steps.told[2:]:
        assert told[0] == 0
        assert told == sorted(told)
        assert 0.98 < told[-1] < 1


@pytest.mark.parametrize("name", BEHIND_RPRELU)
def test_signs_of_activations_are_minus_and_plus_one(behind_rprelu, name):
    rung = behind_rprelu[name]
    (quantizer,) = binary(rung.model, "activation")
    assert values_met(rung.model, quantizer) == [-1.0, 1.0]
    assert len(binary(rung.model, "weight")) == name.startswith("w1-")
    assert rung.metrics["test_top1"] > 3 * CHANCE


@pytest.mark.parametrize("name", BEHIND_RELU)
def test_one_bit_behind_a_relu_is_zero_and_a_positive_level(behind_relu, name):
    rung = behind_relu[name]
    (quantizer,) = binary(rung.model, "activation")
    zero, level = values_met(rung.model, quantizer)
    assert zero == 0
    assert level > 0
    assert len(binary(rung.model, "weight")) == name.startswith("w1-")
    assert rung.metrics["test_top1"] > 3 * CHANCE


@pytest.mark.parametrize("name", WEIGHTS_ALONE)
def test_weights_alone_go_to_one_bit_as_well(behind_relu, name):
    rung = behind_relu[name]
    assert len(binary(rung.model, "weight")) == 1
    assert not binary(rung.model, "activation")
    assert rung.metrics["weight_levels"] == 2
    assert rung.metrics["test_top1"] > 3 * CHANCE


@pytest.mark.parametrize("method", SIGNED)
def test_signs_behind_a_relu_are_refused_with_the_way_out(store, run, method):
    config = ladder_of("relu", {"w1a1": (1, 1, {}, method)})
    with pytest.raises(ConfigError, match=r"makes every value of an unsigned activation \+1; use"):
        run(config, store)
    assert not list(store.stages.glob("*"))

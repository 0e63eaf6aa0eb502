"""Which parameter is trained at which rate, by which method."""

from copy import deepcopy

import pytest
import torch
from bitladder.pipeline.config import (
    OptimizerConfig,
    ParameterRuleConfig,
    QuantizerParametersConfig,
    TrainConfig,
)
from bitladder.pipeline.optimizer import OptimizerPair, build_optimizer, set_lr
from bitladder.quant import QuantizerChoice, QuantPolicy, calibrate, quantize_model
from torch import nn


def quantized(weight: str = "lsq", activation: str = "lsq") -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(16, 4)
    policy = QuantPolicy(4, 4, QuantizerChoice(weight), QuantizerChoice(activation))
    model = quantize_model(model, policy, batches=[x])
    calibrate(model, [x])
    return model


def rates(optimizer, model):
    """(lr, weight decay) by parameter name."""
    of = {
        id(p): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    return {name: of[id(p)] for name, p in model.named_parameters()}


def train_config(**own) -> TrainConfig:
    return TrainConfig(
        optimizer=OptimizerConfig(lr=0.1, weight_decay=0.01),
        quantizer_parameters=QuantizerParametersConfig(**own),
    )


@pytest.mark.parametrize("weight", ["lsq", "weight_norm"])
def test_every_parameter_is_in_one_group(weight):
    model = quantized(weight)
    optimizer = build_optimizer(model, model, train_config())
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


def test_weights_decay_and_biases_and_steps_do_not():
    model = quantized()
    found = rates(build_optimizer(model, model, train_config()), model)
    assert found["2.layer.weight"] == (0.1, 0.01)
    assert found["2.layer.bias"] == (0.1, 0.0)
    assert found["2.weight_quantizer.scale"] == (0.1, 0.0)


def test_the_clip_of_pact_decays_unless_the_settings_say_otherwise():
    model = quantized(activation="pact")
    name = "2.input_quantizer.clip"
    assert rates(build_optimizer(model, model, train_config()), model)[name] == (0.1, 0.01)
    half = train_config(weight_decay_factor=0.5)
    assert rates(build_optimizer(model, model, half), model)[name] == (0.1, 0.005)
    none = train_config(weight_decay=0.0)
    assert rates(build_optimizer(model, model, none), model)[name] == (0.1, 0.0)


def test_a_rule_sets_the_rates_of_the_parameters_that_it_names():
    rules = (
        ParameterRuleConfig(match="*.input_quantizer.*", lr=0.5, weight_decay=0.2),
        ParameterRuleConfig(match="2.*", lr_factor=0.25),
    )
    model = quantized()
    found = rates(build_optimizer(model, model, train_config(lr_factor=0.01, rules=rules)), model)
    assert found["0.input_quantizer.scale"] == (0.5, 0.2)
    assert found["2.input_quantizer.scale"] == (0.025, 0.2)  # the last rule that sets a value wins
    assert found["2.weight_quantizer.scale"] == (0.025, 0.0)
    assert found["2.layer.weight"] == (0.1, 0.01)


def test_steps_may_have_a_method_of_their_own():
    model = quantized()
    optimizer = build_optimizer(model, model, train_config(optimizer="adam", lr=1e-5))
    assert isinstance(optimizer, OptimizerPair)
    assert [type(part).__name__ for part in optimizer.parts] == ["SGD", "Adam"]
    before = model.get_parameter("2.weight_quantizer.scale").item()
    model(torch.randn(8, 4)).square().sum().backward()
    optimizer.step()
    # the first step of Adam has the size of its learning rate, whatever the gradient
    change = abs(model.get_parameter("2.weight_quantizer.scale").item() - before)
    assert change == pytest.approx(1e-5, rel=0.05)


def test_a_pair_goes_on_from_its_state_as_if_it_had_not_stopped():
    def steps(model, optimizer, count, start):
        for i in range(start, start + count):
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(i))
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    settings = train_config(optimizer="adamw", lr=1e-3)
    model = quantized()
    optimizer = build_optimizer(model, model, settings)
    steps(model, optimizer, 3, 0)
    again = quantized()
    again.load_state_dict(model.state_dict())
    resumed = build_optimizer(again, again, settings)
    resumed.load_state_dict(deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (again, resumed)):
        set_lr(o, 0.5)
        steps(m, o, 3, 3)
    for mine, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_a_rule_says_absolute_or_factor():
    with pytest.raises(ValueError, match="give lr or lr_factor, not both"):
        ParameterRuleConfig(match="*", lr=0.1, lr_factor=0.5)

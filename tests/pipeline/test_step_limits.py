"""A learned step cannot run away, and one that does not is trained as if nothing were there."""

import pytest
import torch
from bitladder.pipeline.config import OptimizerConfig, QuantizerParametersConfig, TrainConfig
from bitladder.pipeline.optimizer import build_optimizer
from bitladder.pipeline.step_limits import MOST, StepLimits
from bitladder.quant import QuantizerChoice, QuantPolicy, calibrate, quantize_model
from bitladder.quant.learned_step import LearnedStepQuantizer
from bitladder.quant.swap import quantizers
from torch import nn

LR = 0.1


def quantized(activation: str = "lsq") -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(4)))
    x = torch.randn(8, 3, 5, 5)
    bits = 1 if activation == "reactnet" else 8
    policy = QuantPolicy(8, bits, QuantizerChoice("lsq"), QuantizerChoice(activation))
    model = quantize_model(model, policy, batches=[x])
    calibrate(model, [x])
    return model


def optimizer_of(model, name="sgd", own=None, momentum=0.9):
    train = TrainConfig(
        optimizer=OptimizerConfig(name=name, lr=LR, weight_decay=0.0, momentum=momentum),
        quantizer_parameters=QuantizerParametersConfig(optimizer=own),
    )
    return build_optimizer(model, model, train)


def scales(model: nn.Module) -> dict[str, nn.Parameter]:
    found = quantizers(model).items()
    return {name: q.scale for name, q in found if isinstance(q, LearnedStepQuantizer)}


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.95])
@pytest.mark.parametrize("gradient", [1e6, -1e6])
def test_however_large_its_gradients_a_step_keeps_its_sign(gradient, momentum):
    model = quantized()
    optimizer = optimizer_of(model, momentum=momentum)
    limits, steps = StepLimits(model, optimizer), scales(model)
    assert steps
    for number in range(300):
        last = {name: step.detach().clone() for name, step in steps.items()}
        for step in steps.values():
            step.grad = torch.full_like(step, gradient)
        limits.hold()
        optimizer.step()
        for name, step in steps.items():
            assert step > 0
            assert (step < last[name]) == (gradient > 0)
            if number == 0:  # Nesterov's look ahead at most doubles it
                assert abs(step - last[name]) <= 2.01 * MOST * (1 - momentum) ** 2 * last[name]


def test_gradients_of_sound_size_and_those_of_weights_are_left_as_they_are():
    model = quantized()
    limits = StepLimits(model, optimizer_of(model))
    for name, parameter in model.named_parameters():
        sound = 0.009 * MOST / LR * parameter.detach().abs() if "scale" in name else 1e6
        parameter.grad = torch.zeros_like(parameter) - sound
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    limits.hold()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, before[name])


def test_a_step_by_itself_is_not_changed_by_looking_at_it():
    plain = QuantizerChoice("range_linear")  # has no learned step
    edges = {"first_last_weight": plain, "first_last_activation": plain}
    torch.manual_seed(0)
    x = torch.randn(8, 3, 5, 5)
    model = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3)))
    policy = QuantPolicy(8, 8, QuantizerChoice("lsq"), plain, **edges)
    model = quantize_model(model, policy, batches=[x])
    calibrate(model, [x])
    (step,) = scales(model).values()
    limits, before = StepLimits(model, optimizer_of(model)), step.item()
    step.grad = torch.full_like(step, 1e6)
    limits.hold()
    assert step.item() == before
    assert 0 < step.grad.item() < 1e6


@pytest.mark.parametrize(("name", "own"), [("adam", None), ("sgd", "adam")])
def test_adam_is_left_alone(name, own):
    model = quantized()
    limits = StepLimits(model, optimizer_of(model, name, own))
    for step in scales(model).values():
        step.grad = torch.full_like(step, 1e6)
    limits.hold()
    assert all(float(step.grad) == 1e6 for step in scales(model).values())


def test_a_shift_of_zero_can_be_learned():
    model = quantized("reactnet")
    limits = StepLimits(model, optimizer_of(model))
    own = {n: p for n, p in model.named_parameters() if "input_quantizer" in n}
    shifts = [p for name, p in own.items() if not name.endswith("scale")]
    assert shifts
    for shift in shifts:
        shift.grad = torch.full_like(shift, 1e6)
    limits.hold()
    assert all((shift.grad == 1e6).all() for shift in shifts)

"""The doors of `benchmarks/step.py`, as another program would use them."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

PATH = Path(__file__).parents[1] / "benchmarks" / "step.py"


@pytest.fixture(scope="module")
def step():
    """The file loaded by its path alone: its own folder is not among those searched."""
    spec = importlib.util.spec_from_file_location("benchmark_step", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Foreign(nn.Module):
    """A network that nothing here knows."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Linear(8, 5)

    def forward(self, x):
        x = self.norm(self.first(x)).relu()
        return self.last(self.inner(x).relu().mean((2, 3)))


class Context:
    """What the doors are given; remembers what it gave."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = Foreign()
        self.own_teacher = Foreign().eval()

    def make_model(self):
        return self.model

    def batch(self):
        return torch.randn(8, 3, 6, 6), torch.arange(8) % 5

    def teacher(self, bits=32):
        return self.own_teacher


@pytest.fixture(params=["qat_step", "kd_step"])
def door(request, step):
    return getattr(step, request.param)


@pytest.mark.parametrize("mode", ["eager", "bf16-eager"])
def test_a_step_moves_every_weight_and_its_loss_is_finite(door, mode):
    context = Context()
    weights = [context.model.first.weight, context.model.inner.weight, context.model.last.weight]
    before = [weight.detach().clone() for weight in weights]
    loss = door(context, mode=mode)()
    assert loss.isfinite()
    assert not loss.requires_grad
    assert not any(torch.equal(old, new) for old, new in zip(before, weights, strict=True))


def test_the_same_batch_is_learned(door):
    run = door(Context())
    losses = [float(run()) for _ in range(30)]
    assert losses[-1] < losses[0]


def test_a_step_may_be_given_another_batch(door):
    run = door(Context())
    assert run(torch.randn(4, 3, 6, 6), torch.zeros(4, dtype=torch.int64)).isfinite()


def test_inner_layers_have_four_bits_and_the_others_eight(step):
    context = Context()
    step.qat_step(context)
    layers = step.quant_layers(context.model)
    assert {name: layer.plan.weight_bits for name, layer in layers.items()} == {
        "first": 8,
        "inner": 4,
        "last": 8,
    }


def test_the_teacher_is_left_as_it_is(step):
    context = Context()
    before = {name: value.clone() for name, value in context.own_teacher.state_dict().items()}
    step.kd_step(context, bits=32)()
    after = context.own_teacher.state_dict()
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert all(p.requires_grad and p.grad is None for p in context.own_teacher.parameters())


def test_an_unknown_mode_is_refused_with_those_that_are_known(door):
    with pytest.raises(ValueError, match="unknown mode 'fast'; known: eager, compiled"):
        door(Context(), mode="fast")

"""nuLSQ: what holds besides the laws and the golden numbers."""

from __future__ import annotations

import pytest
import torch
from bitladder.quant import QUANTIZERS, Quantizer, Site
from torch import Tensor

SIDES = [("weight", True), ("activation", True), ("activation", False)]


def build(target: str, bits: int, signed: bool, **options: object) -> Quantizer:
    return QUANTIZERS["nulsq"].factory(Site(target, bits, signed, 8), **options)


def sample(signed: bool = True, shape: tuple[int, ...] = (8, 8, 33, 32), seed: int = 0) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x if signed else x.relu()


def passed(quantizer: Quantizer, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = quantizer(x)
    y.backward(grad)
    return y.detach(), x.grad


def steps_of(quantizer: Quantizer, values: list[float]) -> Quantizer:
    quantizer.steps.data = torch.tensor(values)
    quantizer.steps_floor.fill_(1e-6)
    return quantizer


@pytest.mark.parametrize(("target", "signed"), SIDES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_with_equal_steps_it_is_lsq(target, signed, bits):
    x, grad = sample(signed), sample(seed=1)
    free = build(target, bits, signed, grad_scale="none")
    lsq = QUANTIZERS["lsq"].factory(Site(target, bits, signed, 8), grad_scale="none")
    for quantizer in (free, lsq):
        quantizer.calibrate(x)
    (y, grad_x), (want, want_x) = passed(free, x, grad), passed(lsq, x, grad)
    # levels are sums of steps, so a value on a threshold may fall to either side
    off = (y - want).abs() > 1e-4 * want.abs().max()
    assert off.float().mean() < 1e-4
    torch.testing.assert_close(y[~off], want[~off], rtol=1e-5, atol=1e-6)
    assert (grad_x != want_x).float().mean() < 1e-4
    # to move the step of LSQ is to move all steps at once
    torch.testing.assert_close(free.steps.grad.sum(), lsq.scale.grad, rtol=1e-3, atol=0.05)


def test_levels_are_sums_of_the_steps_of_either_side():
    quantizer = steps_of(build("weight", 2, True), [1.0, 3.0, 0.5])
    assert quantizer.levels().tolist() == [-4, -1, 0, 0.5]
    assert steps_of(build("activation", 2, False), [1.0, 3.0, 0.5]).levels().tolist() == [
        0,
        1,
        4,
        4.5,
    ]


def test_a_value_on_a_threshold_takes_the_lower_level():
    quantizer = steps_of(build("weight", 2, True), [1.0, 2.0, 1.0])
    x = torch.tensor([[-2.0, -0.5, 0.5, 0.51]])
    assert quantizer(x).tolist() == [[-3, -1, 0, 1]]


def test_only_the_step_of_its_own_interval_learns_from_a_value():
    quantizer = steps_of(build("activation", 2, False, grad_scale="none"), [1.0, 2.0, 1.0])
    passed(quantizer, torch.tensor([[1.5]]), torch.ones(1, 1))
    assert quantizer.steps.grad.tolist() == [0, -0.25, 0]


def test_a_value_beyond_the_range_moves_every_step_of_its_side():
    quantizer = steps_of(build("weight", 3, True, grad_scale="none"), [1.0] * 7)
    passed(quantizer, torch.tensor([[9.0, -9.0, -9.0]]), torch.tensor([[1.0, 1.0, 2.0]]))
    assert quantizer.steps.grad.tolist() == [-3] * 4 + [1] * 3


def test_each_step_gradient_is_the_derivative_of_its_ramp():
    """A level is held while the threshold stays: the origin's rule, value by value."""
    quantizer = build("weight", 4, True, grad_scale="none")
    x, grad = sample(), sample(seed=1)
    quantizer.calibrate(x)
    quantizer.steps.data *= 0.5 + torch.rand(15, generator=torch.Generator().manual_seed(2))
    y, _ = passed(quantizer, x, grad)
    levels, steps = quantizer.levels().double(), quantizer.steps.detach().double()
    want = torch.zeros(15, dtype=torch.float64)
    for k in range(8):  # down from zero
        inside = (x > levels[7 - k]) & (x <= levels[8 - k])
        want[k] = (grad * (y - x))[inside].double().sum() / steps[k]
        want[k] -= grad[x < levels[0]].double().sum()
    for k in range(7):
        inside = (x > levels[8 + k]) & (x <= levels[9 + k])
        want[8 + k] = (grad * (y - x))[inside].double().sum() / steps[8 + k]
        want[8 + k] += grad[x > levels[-1]].double().sum()
    torch.testing.assert_close(quantizer.steps.grad.double(), want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("target", "signed"), SIDES)
def test_a_step_below_zero_is_bounded_and_comes_back(target, signed):
    quantizer = build(target, 2, signed)
    x = sample(signed)
    quantizer.calibrate(x)
    quantizer.steps.data[0] *= -0.5
    first = quantizer.steps[0].item()
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=1.0)
    for _ in range(60):
        optimizer.zero_grad()
        y = quantizer(x)
        assert y.isfinite().all()
        assert (quantizer.levels().diff() > 0).all()
        (y - x).square().sum().backward()
        quantizer.steps.grad.clamp_(-0.01, 0.01)
        optimizer.step()
    assert quantizer.steps[0] > max(first, 0)


def test_free_steps_fit_an_uneven_distribution_better_than_equal_ones():
    x = sample(signed=False) ** 3
    quantizer = build("activation", 3, False, init="mse")
    quantizer.calibrate(x)
    start = (quantizer(x) - x).square().mean().item()
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        (quantizer(x) - x).square().mean().backward()
        optimizer.step()
    assert (quantizer(x) - x).square().mean() < 0.8 * start
    assert quantizer.steps.max() > 1.5 * quantizer.steps.min()


def test_the_gradient_factors_are_the_origins():
    x = torch.zeros(2, 8, 3, 3)
    positive = build("activation", 3, False, grad_scale="channel_count")
    torch.testing.assert_close(positive.grad_factors(x), torch.full((7,), 56.0) ** -0.5)
    weight = build("weight", 3, True).grad_factors(x)
    want = torch.tensor([2 * (144 * 4) ** -0.5] * 4 + [2 * (144 * 3) ** -0.5] * 3)
    torch.testing.assert_close(weight, want)
    lsq = QUANTIZERS["lsq"].factory(Site("activation", 3, False, 8))
    assert build("activation", 3, False).grad_factors(x)[0] == pytest.approx(lsq.grad_factor(x))


def test_a_kept_range_is_tried_as_a_start():
    x = torch.rand(4000, generator=torch.Generator().manual_seed(0))
    quantizer = build("activation", 4, False)
    quantizer.calibrate(x, keep=(torch.tensor(0.0), torch.tensor(1.0)))
    torch.testing.assert_close(quantizer.steps.detach(), torch.full((15,), 1 / 15))


def test_what_is_not_a_number_stays_so():
    quantizer = build("weight", 4, True)
    for shape in ((8, 9), (8, 8, 33, 32)):
        x = sample(shape=shape)
        x[0, 0] = torch.nan
        assert torch.equal(quantizer(x).isnan(), x.isnan())


def test_large_activations_are_exported_without_the_table():
    quantizer = build("activation", 4, False).eval()
    x = sample(signed=False)
    quantizer.calibrate(x)
    assert torch.equal(torch.export.export(quantizer, (x,)).module()(x), quantizer(x))


@pytest.mark.parametrize(
    ("target", "bits", "signed", "way_out"),
    [("weight", 1, True, "use uniq"), ("activation", 16, False, "use lsq")],
)
def test_a_width_that_it_does_not_have_names_the_way_out(target, bits, signed, way_out):
    with pytest.raises(ValueError, match=way_out):
        build(target, bits, signed)

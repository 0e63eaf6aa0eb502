"""N2UQ: what holds besides the laws and the golden numbers."""

from __future__ import annotations

import pytest
import torch
from bitladder.quant import QUANTIZERS, Quantizer, Site
from torch import Tensor

WIDTHS = [1, 2, 3, 4, 8]
PARAMETERS = ("start", "a", "scale1", "scale2")


def build(bits: int, target: str = "activation", signed: bool = False, **options: object):
    site = Site(target, bits, signed or target == "weight", 8)
    return QUANTIZERS["n2uq"].factory(site, **options)


def sample(seed: int = 0, shape: tuple[int, ...] = (8, 8, 33, 32)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moved(bits: int, **options: object) -> Quantizer:
    """Calibrated, then with parameters as training leaves them."""
    quantizer = build(bits, **options)
    quantizer.calibrate(sample())
    generator = torch.Generator().manual_seed(7)
    quantizer.a.data *= 0.5 + torch.rand(quantizer.a.shape, generator=generator)
    quantizer.start.data += 0.1
    quantizer.scale2.data *= 1.3
    return quantizer


def ramp(x: Tensor, start: Tensor, a: Tensor, scale1: Tensor, scale2: Tensor) -> Tensor:
    """The piecewise linear function whose gradient the method takes."""
    ends = torch.cat([start[None], start + a.cumsum(0)])
    shares = [
        ((scale1 * x - low) / length).clamp(0, 1) for low, length in zip(ends[:-1], a, strict=True)
    ]
    return scale2 * (2 / len(a)) * sum(shares)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_gradient_is_that_of_the_ramp(bits):
    quantizer = moved(bits, grad_scale="none")
    x, grad = sample(1).requires_grad_(), sample(2)
    y = quantizer(x)
    y.backward(grad)
    precise = x.detach().double().requires_grad_()
    parameters = [
        quantizer.get_parameter(name).detach().double().requires_grad_() for name in PARAMETERS
    ]
    ramp(precise, *parameters).backward(grad.double())
    # a value on an end may count for either interval
    off = (x.grad - precise.grad).abs() > 1e-4 * precise.grad.abs().max()
    assert off.float().mean() < 1e-4
    for name, want in zip(PARAMETERS[:3], parameters[:3], strict=True):
        got = quantizer.get_parameter(name).grad.double()
        torch.testing.assert_close(got, want.grad, rtol=2e-3, atol=2e-3 * want.grad.abs().max())
    scale2 = (grad.double() * y.detach()).sum() / parameters[3]  # the levels, not the ramp
    torch.testing.assert_close(quantizer.scale2.grad.double(), scale2.detach(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("signed", [False, True])
def test_it_starts_as_lsq_on_what_is_above_zero(bits, signed):
    x = sample() if signed else sample().relu()
    quantizer = build(bits, signed=signed)
    quantizer.calibrate(x)
    lsq = QUANTIZERS["lsq"].factory(Site("activation", bits, False, 8))
    lsq.calibrate(x.relu())
    y, want = quantizer(x), lsq(x.relu())
    off = (y - want).abs() > 1e-4 * want.max()  # on a threshold, by rounding
    assert off.float().mean() < 1e-4
    torch.testing.assert_close(y[~off], want[~off])


@pytest.mark.parametrize("bits", WIDTHS)
def test_thresholds_are_uneven_and_levels_are_even(bits):
    q = moved(bits).encode(sample(1))
    assert q.codebook is None
    torch.testing.assert_close(q.levels().diff(), q.scale.expand(1, q.num_levels - 1))
    marks = moved(bits).marks()[:-1]
    assert (marks.diff() > 0).all()


def test_a_short_interval_stays_dead_unless_it_is_to_recover():
    for option, alive in (("stay", False), ("recover", True)):
        quantizer = moved(2, dead_intervals=option)
        quantizer.a.data[1] = -0.01
        x = sample(1).relu()
        quantizer(x).backward(sample(2))
        assert bool(quantizer.a.grad[1] != 0) is alive
        assert (quantizer.a.grad[[0, 2]] != 0).all()
        assert (quantizer.marks().diff() > 0).all()


@pytest.mark.parametrize("name", ["scale1", "scale2"])
def test_a_scale_below_zero_is_bounded_and_gets_a_gradient(name):
    quantizer = build(4)
    x = sample().relu()
    quantizer.calibrate(x)
    quantizer.get_parameter(name).data.neg_()
    y = quantizer(x)
    assert y.isfinite().all()
    assert quantizer.encode(x).scale > 0
    (y - x).square().sum().backward()
    assert quantizer.get_parameter(name).grad.isfinite()
    if name == "scale2":
        assert quantizer.scale2.grad < 0  # descent raises it


def test_a_start_that_would_make_all_zero_is_not_taken():
    quantizer = build(1, init="constant")
    x = sample().relu()
    quantizer.calibrate(x)
    assert quantizer.encode(x).codes.any()


def test_thresholds_learn_where_the_levels_are_wanted():
    """Levels stay even, so what thresholds can gain is shown on a target that is not x."""
    x = sample().relu()
    target = 0.6 * sum((x > threshold).float() for threshold in (0.8, 1.0, 1.2))
    quantizer = build(2)
    quantizer.calibrate(x)
    start = (quantizer(x) - target).square().mean().item()
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        (quantizer(x) - target).square().mean().backward()
        optimizer.step()
    assert (quantizer(x) - target).square().mean() < 0.5 * start


def test_the_latent_ramp_has_the_gradient_of_the_forward_pass():
    quantizer = moved(3, grad_scale="none")
    x, grad = sample(1), sample(2)
    gradients = []
    for function in (quantizer, quantizer.latent):
        leaf = x.clone().requires_grad_()
        quantizer.zero_grad()
        function(leaf).backward(grad)
        gradients.append((leaf.grad, quantizer.a.grad.clone(), quantizer.start.grad.clone()))
    for got, want in zip(*gradients, strict=True):
        close = (got - want).abs() <= 2e-3 * want.abs().max()
        assert close.float().mean() > 0.9999


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_weights_are_spread_over_all_codes_of_each_channel(bits):
    w = 0.05 * sample(shape=(8, 64, 3, 3)) * torch.arange(1, 9).view(8, 1, 1, 1)
    quantizer = build(bits, "weight")
    quantizer.calibrate(w)
    q = quantizer.encode(w)
    assert q.channel_axis == 0
    for codes in q.codes:
        assert len(codes.unique()) == 2**bits
    if bits == 2:  # of a Gaussian, between 0.20 and 0.30 a code: near the largest entropy
        shares = torch.stack([torch.bincount(c.flatten(), minlength=4) for c in q.codes])
        assert ((shares / 576 - 0.25).abs() < 0.1).all()
    if bits == 1:
        mean = w.abs().flatten(1).mean(1).view(8, 1, 1, 1)
        torch.testing.assert_close(quantizer(w).abs(), mean.expand_as(w))


def test_the_weight_gradient_is_plain_or_over_the_scale():
    w, grad = sample(shape=(8, 4, 3, 3)), sample(1, (8, 4, 3, 3))
    half_range = 1.5 * w.abs().flatten(1).mean(1).view(8, 1, 1, 1)
    for option, want in (("plain", grad), ("over_scale", grad / half_range)):
        leaf = w.clone().requires_grad_()
        build(2, "weight", weight_gradient=option)(leaf).backward(grad)
        torch.testing.assert_close(leaf.grad, want)


def test_a_weight_of_zero_counts_as_positive_at_one_bit():
    w = torch.tensor([[0.0, 1.0, -1.0]])
    quantizer = QUANTIZERS["n2uq"].factory(Site("weight", 1, True, 1))
    assert quantizer(w).sign().tolist() == [[1, 1, -1]]


def test_large_activations_are_exported_without_the_table():
    quantizer = moved(4).eval()
    x = sample(1)
    assert torch.equal(torch.export.export(quantizer, (x,)).module()(x), quantizer(x))


def test_sixteen_bits_name_the_way_out():
    with pytest.raises(ValueError, match="use lsq"):
        build(16)

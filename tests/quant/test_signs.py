"""One bit by the sign: estimators, scales, RSign, XNOR's stored weight; and WRPN's fixed range."""

from __future__ import annotations

import math

import pytest
import torch
from bitladder.quant import QUANTIZERS, Quantizer, Site
from bitladder.quant.signs import SignGradient, sign, sign_through
from torch import Tensor

WEIGHT = Site("weight", 1, True, 6)
ACTIVATION = Site("activation", 1, True, 6)
SIGNS = ("bwn", "xnor", "bireal", "reactnet")
WITH_ACTIVATIONS = ("xnor", "bireal", "reactnet")


def build(name: str, site: Site, **options: object) -> Quantizer:
    return QUANTIZERS[name].factory(site, **options)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def factor(x: Tensor, gradient: SignGradient, grad: float = 1.0) -> Tensor:
    """What the estimator multiplies a constant gradient by."""
    x = x.clone().requires_grad_()
    sign_through(x, None, gradient).backward(torch.full_like(x, grad))
    return x.grad / grad


def reste_power(progress: float) -> float:
    return 1 + 2 * (1 - math.cos(math.pi / 2 * progress))


def test_the_sign_of_zero_is_plus_one():
    x = torch.tensor([-1e30, -1e-30, -0.0, 0.0, 1e-30, 1e30])
    assert sign(x).tolist() == [-1, -1, 1, 1, 1, 1]


def test_identity_passes_everywhere():
    assert torch.equal(factor(normal(500), SignGradient("identity")), torch.ones(500))


@pytest.mark.parametrize(("closed", "at_the_bound"), [(True, 1.0), (False, 0.0)])
def test_clipped_passes_within_one(closed, at_the_bound):
    x = torch.tensor([-2, -1.001, -1, -0.999, 0, 0.999, 1, 1.001, 2])
    want = [0, 0, at_the_bound, 1, 1, 1, at_the_bound, 0, 0]
    assert factor(x, SignGradient("clipped", closed=closed)).tolist() == want


def test_quadratic_is_the_derivative_of_the_bireal_polynomial():
    x = normal(500).double().requires_grad_()
    inner = torch.where(x < 0, 2 * x + x.square(), 2 * x - x.square())
    torch.where(x.abs() < 1, inner, x.sign()).sum().backward()
    torch.testing.assert_close(factor(x.detach(), SignGradient("quadratic")), x.grad)


@pytest.mark.parametrize("progress", [0.0, 0.3, 0.5, 0.8, 1.0])
def test_ede_is_the_derivative_of_a_tanh_that_sharpens(progress):
    t = 0.1 * 100**progress
    x = normal(500).double().requires_grad_()
    (max(1 / t, 1) * torch.tanh(t * x)).sum().backward()
    got = factor(x.detach(), SignGradient("ede", progress=progress))
    torch.testing.assert_close(got, x.grad)


@pytest.mark.parametrize("progress", [0.0, 0.4, 1.0])
def test_reste_is_the_derivative_of_a_power_and_finite_at_zero(progress):
    o = reste_power(progress)
    x = (1.5 * normal(1000)).double().requires_grad_()
    (x.sign() * x.abs() ** (1 / o)).sum().backward()
    got = factor(x.detach(), SignGradient("reste", progress=progress))
    size = x.detach().abs()
    middle = (size > 0.1) & (size <= 1.5)
    torch.testing.assert_close(got[middle], x.grad[middle])
    near = got[size <= 0.1]  # the secant from zero to 0.1
    torch.testing.assert_close(near, torch.full_like(near, 0.1 ** (1 / o) / 0.1))
    assert (got[size > 1.5] == 0).all()
    assert {bool(m.any()) for m in (middle, size <= 0.1, size > 1.5)} == {True}
    assert factor(torch.zeros(1), SignGradient("reste", progress=progress)).isfinite().all()


@pytest.mark.parametrize("grad", [1.0, -1.0])
def test_ewgs_pulls_harder_on_values_far_from_their_level(grad):
    x = normal(500)
    got = factor(x, SignGradient("ewgs", delta=0.2), grad)
    want = 1 + 0.2 * math.copysign(1, grad) * (x - sign(x)) / 2
    torch.testing.assert_close(got, want * (x.abs() <= 1))


def test_ewgs_measures_weights_in_their_scale():
    x, scale = 0.05 * normal(6, 40), torch.full((6, 1), 0.04)
    latent = x.clone().requires_grad_()
    sign_through(latent, scale, SignGradient("ewgs", delta=1.0)).sum().backward()
    want = 1 + ((x / scale).clamp(-1, 1) - sign(x)) / 2
    torch.testing.assert_close(latent.grad, want)


@pytest.mark.parametrize("delta", [-0.1, 2.5])
def test_a_delta_that_could_turn_a_gradient_round_is_refused(delta):
    with pytest.raises(ValueError, match="within 0"):
        build("bwn", WEIGHT, estimator="ewgs", delta=delta)


@pytest.mark.parametrize("name", SIGNS)
@pytest.mark.parametrize("estimator", ["ede", "reste"])
def test_annealing_changes_the_gradient_and_nothing_that_is_stored(name, estimator):
    quantizer = build(name, WEIGHT, estimator=estimator)
    state = {k: v.clone() for k, v in quantizer.state_dict().items()}
    x = normal(6, 4, 3, 3)
    upstream = normal(*x.shape, seed=1)
    before = quantizer.encode(x)

    def gradient() -> Tensor:
        latent = x.clone().requires_grad_()
        quantizer.eval()(latent).backward(upstream)
        return latent.grad

    untold = gradient()
    quantizer.at_progress(0.0)
    assert torch.equal(gradient(), untold)
    quantizer.at_progress(1.0)
    assert not torch.allclose(gradient(), untold)
    assert torch.equal(quantizer.encode(x).dequantize(), before.dequantize())
    assert all(torch.equal(v, state[k]) for k, v in quantizer.state_dict().items())


@pytest.mark.parametrize("name", SIGNS)
def test_a_filter_becomes_plus_and_minus_its_mean_size(name):
    quantizer = build(name, WEIGHT)
    x = 0.1 * normal(6, 4, 3, 3)
    latent = quantizer.latent(x)
    want = latent.abs().mean((1, 2, 3), keepdim=True) * sign(latent)
    torch.testing.assert_close(quantizer(x), want)
    low, high = quantizer.range()
    assert torch.equal(low, -high)
    torch.testing.assert_close(high, latent.abs().mean((1, 2, 3)))


def test_bwn_can_have_one_scale_for_the_tensor():
    x = normal(6, 4, 3, 3)
    y = build("bwn", WEIGHT, per_channel=False)(x)
    torch.testing.assert_close(y, x.abs().mean() * sign(x))


@pytest.mark.parametrize("name", SIGNS)
def test_the_range_follows_the_weights_in_training_only(name):
    quantizer = build(name, WEIGHT)
    quantizer.calibrate(normal(6, 4, 3, 3))
    calibrated = quantizer.range()[1]
    x = 0.2 * normal(6, 4, 3, 3, seed=1)
    quantizer.eval()(x)
    assert torch.equal(quantizer.range()[1], calibrated)
    quantizer.train()(x)
    assert (quantizer.range()[1] < 0.5 * calibrated).all()


@pytest.mark.parametrize("name", WITH_ACTIVATIONS)
def test_activations_become_plus_and_minus_one(name):
    x = normal(2, 6, 3, 3)
    assert torch.equal(build(name, ACTIVATION)(x), sign(x))


@pytest.mark.parametrize(
    ("name", "site", "way_out"),
    [(n, Site("weight", 2, True, 6), "use lsq or uniq") for n in SIGNS]
    + [(n, Site("activation", 1, False, 6), "lsq at 1 bit.*rprelu") for n in WITH_ACTIVATIONS]
    + [
        ("bwn", ACTIVATION, "weight"),
        ("wrpn", WEIGHT, "bwn"),
        ("wrpn", Site("activation", 4, True, 6), "lsq or uniq"),
    ],
)
def test_what_a_method_cannot_do_is_refused_with_the_way_out(name, site, way_out):
    with pytest.raises(ValueError, match=way_out):
        build(name, site)


@pytest.mark.parametrize(("axis", "shape"), [(1, (3, 6, 4, 4)), (1, (3, 6)), (-1, (3, 5, 6))])
def test_rsign_shifts_each_channel_and_learns_the_shift(axis, shape):
    quantizer = build("reactnet", Site("activation", 1, True, 6, axis))
    bias = normal(6, seed=1)
    quantizer.bias.data.copy_(bias)
    x = normal(*shape).requires_grad_()
    upstream = normal(*shape, seed=2)
    y = quantizer(x)
    y.backward(upstream)
    channels_last = x.detach().movedim(axis, -1)
    assert torch.equal(y.movedim(axis, -1), sign(channels_last + bias))
    slope = (2 - 2 * (channels_last + bias).abs()).clamp(min=0)
    want = slope * upstream.movedim(axis, -1)
    torch.testing.assert_close(x.grad.movedim(axis, -1), want)
    torch.testing.assert_close(quantizer.bias.grad, want.flatten(0, -2).sum(0))


def test_rsign_starts_as_the_plain_sign():
    x = normal(3, 6, 4, 4)
    quantizer = build("reactnet", ACTIVATION)
    quantizer.calibrate(x.flatten())
    assert torch.equal(quantizer(x), sign(x))


def test_the_xnor_gradient_is_that_of_a_clipped_sign_times_the_scale():
    """By autograd of mean|c| * clamp(c), which has the value s * c and its derivative at sgn(c)."""
    x = (0.3 * normal(6, 4, 3, 3)).double()
    upstream = normal(*x.shape, seed=1).double()
    quantizer = build("xnor", WEIGHT)
    mine = x.clone().requires_grad_()
    quantizer(mine).backward(upstream)
    latent = quantizer.latent(x).requires_grad_()
    scale = latent.abs().mean((1, 2, 3), keepdim=True)
    path = latent.clamp(-1, 1)
    (scale * (sign(latent).detach() + path - path.detach())).backward(upstream)
    torch.testing.assert_close(mine.grad, latent.grad * (1 - 1 / 4))


def test_the_count_factor_multiplies_by_the_weights_of_a_filter():
    x, upstream = normal(6, 4, 3, 3), normal(6, 4, 3, 3, seed=1)
    grads = []
    for count_factor in (False, True):
        latent = x.clone().requires_grad_()
        build("xnor", WEIGHT, count_factor=count_factor)(latent).backward(upstream)
        grads.append(latent.grad)
    torch.testing.assert_close(grads[1], grads[0] * 36)


def test_after_a_step_the_stored_xnor_weight_is_centred_and_clamped():
    quantizer = build("xnor", WEIGHT)
    weight = torch.nn.Parameter(normal(6, 4, 3, 3))
    before = quantizer(weight).detach()
    want = (weight - weight.mean(1, keepdim=True)).detach().clamp(-1, 1)
    quantizer.after_step(weight)
    torch.testing.assert_close(weight.detach(), want)
    assert weight.abs().max() == 1  # something was clamped
    # elsewhere nothing changes for the network
    inner = weight.detach().abs().amax((1, 2, 3)) < 1
    torch.testing.assert_close(quantizer(weight)[inner], before[inner])


def test_small_xnor_weights_are_the_same_to_the_network_before_and_after_the_stored_step():
    quantizer = build("xnor", WEIGHT)
    weight = 0.1 * normal(6, 4, 3, 3)
    before = quantizer(weight)
    quantizer.after_step(weight)
    torch.testing.assert_close(quantizer(weight), before)
    torch.testing.assert_close(weight.mean(1), torch.zeros(6, 3, 3))


def test_depthwise_xnor_weights_are_not_centred_away():
    quantizer = build("xnor", WEIGHT)
    x = normal(6, 1, 3, 3).requires_grad_()
    y = quantizer(x)
    y.sum().backward()
    assert torch.equal(y > 0, x > 0)
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_wrpn_keeps_the_small_weights_of_a_trained_network(bits):
    x = 0.05 * normal(32, 16, 3, 3)

    def error(**options: bool) -> float:
        quantizer = build("wrpn", Site("weight", bits, True, 32), **options)
        quantizer.calibrate(x)
        return ((quantizer(x) - x).square().mean() / x.square().mean()).item()

    assert error() < {2: 0.2, 3: 0.05, 4: 0.02, 8: 1e-3}[bits]
    assert error() <= error(unit_range=True)
    if bits == 2:
        assert error(unit_range=True) == 1  # all zero


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_wrpn_activations_are_clipped_to_a_range_fitted_once(bits):
    quantizer = build("wrpn", Site("activation", bits, False, 6))
    quantizer.calibrate((3 * normal(4000)).relu())
    low, high = quantizer.range()
    assert low == 0
    assert high > 2
    x = torch.stack([torch.tensor(-1.0), 0.5 * high, high, 1.5 * high]).requires_grad_()
    quantizer.train()(x).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 0]
    assert quantizer.range()[1] == high


def test_wrpn_has_the_levels_of_the_paper_and_no_more():
    x = 0.7 * normal(5000)
    for bits in (2, 3, 4):
        quantizer = build("wrpn", Site("weight", bits, True, 1), unit_range=True)
        k = 2 ** (bits - 1) - 1
        torch.testing.assert_close(quantizer(x), (k * x.clamp(-1, 1)).round() / k)
        assert len(quantizer(x).unique()) == 2**bits - 1

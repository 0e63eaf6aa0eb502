"""Weights normalized before they are rounded."""

from __future__ import annotations

import pytest
import torch
from bitladder.quant import QUANTIZERS, Quantizer, Site
from bitladder.quant.weight_norm import normalize
from torch import Tensor

METHODS = ["lcq", "apot", "pot", "apot_uniform"]


def weight(name: str, bits: int = 4, **options: object) -> Quantizer:
    return QUANTIZERS[name].factory(Site("weight", bits, True, 6), **options)


def sample(seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(seed)) + 0.03


def test_normalized_weights_have_mean_zero_and_deviation_one():
    z, deviation = normalize(sample())
    assert z.mean().item() == pytest.approx(0, abs=1e-6)
    assert z.std().item() == pytest.approx(1)
    assert deviation.item() == pytest.approx(sample().std().item())


@pytest.mark.parametrize(
    "x", [torch.tensor([0.7]), torch.full((4, 3), 0.3), torch.zeros(5), torch.full((2,), 1e-30)]
)
def test_weights_without_a_spread_stay_as_they_are(x):
    leaf = x.clone().requires_grad_()
    z, deviation = normalize(leaf)
    assert torch.equal(z, x)
    assert deviation == 1
    (z * deviation).sum().backward()
    assert leaf.grad.isfinite().all()


def test_detached_statistics_carry_no_gradient():
    for detach in (True, False):
        x = sample().requires_grad_()
        z, deviation = normalize(x, detach=detach)
        grad = sample(seed=1)
        (z * grad).sum().backward()
        plain = torch.allclose(x.grad, grad / deviation.detach())
        assert plain == detach
        assert deviation.requires_grad != detach


@pytest.mark.parametrize("name", [*METHODS, "weight_norm"])
def test_a_restored_quantizer_follows_the_scale_of_the_weights_and_drops_their_mean(name):
    quantizer = weight(name)
    quantizer.calibrate(sample())
    y = quantizer(sample())
    assert torch.equal(quantizer(4 * sample()), 4 * y)
    torch.testing.assert_close(quantizer(sample() + 0.5), y, rtol=1e-4, atol=1e-6)
    assert (y - (sample() - sample().mean())).square().mean() < 0.1 * sample().var()


@pytest.mark.parametrize("name", METHODS)
def test_a_normalized_quantizer_ignores_the_scale_of_the_weights(name):
    quantizer = weight(name, weight_norm="normalized")
    quantizer.calibrate(sample())
    y = quantizer(sample())
    assert torch.equal(quantizer(4 * sample()), y)
    assert y.std().item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(("name", "options"), [("lcq", {}), ("apot", {"form": "imagenet"})])
def test_the_wrapper_gives_what_the_option_of_a_method_gives(name, options):
    own = weight(name, weight_norm="restored", **options)
    wrapped = weight("weight_norm", method=name, options={"weight_norm": "none", **options})
    results = []
    for quantizer in (own, wrapped):
        quantizer.calibrate(sample())
        x = sample().requires_grad_()
        y = quantizer(x)
        y.backward(sample(seed=1))
        results.append([y, x.grad, *quantizer.range(), *(p.grad for p in quantizer.parameters())])
    for mine, other in zip(*results, strict=True):
        assert torch.equal(mine, other)


def test_without_restoring_the_wrapper_gives_what_the_method_gives_for_normalized_weights():
    wrapped = weight("weight_norm", restore=False)
    plain = weight("lsq")
    wrapped.calibrate(sample())
    z = normalize(sample())[0]
    plain.calibrate(z)
    assert torch.equal(wrapped(sample()), plain(z))
    assert torch.equal(wrapped.range()[1], plain.range()[1])


@pytest.mark.parametrize("name", ["lcq", "apot", "weight_norm"])
def test_the_range_follows_training_steps_and_stands_still_in_evaluation(name):
    quantizer = weight(name)
    quantizer.calibrate(sample())
    before = quantizer.range()[1].clone()
    quantizer.eval()(2 * sample())
    assert torch.equal(quantizer.range()[1], before)
    quantizer.train()(2 * sample())
    assert torch.equal(quantizer.range()[1], 2 * before)


@pytest.mark.parametrize("name", ["lcq", "apot", "weight_norm"])
def test_a_kept_range_is_in_units_of_the_weights(name):
    other = weight("lsq", 8)
    other.calibrate(sample())
    kept = tuple(end.sign() * 0.29 for end in other.range())
    quantizer = weight(name)
    quantizer.calibrate(sample(), keep=kept)
    plain = weight(name)
    plain.calibrate(sample())
    centered = sample() - sample().mean()

    def error(q):
        return (q(sample()) - centered).square().mean()

    assert error(quantizer) <= error(plain)
    assert 0.15 < quantizer.range()[1].item() < 0.5


def test_the_wrapper_takes_a_scale_per_channel_and_the_hooks_of_its_method():
    quantizer = weight("weight_norm", options={"per_channel": True})
    quantizer.calibrate(sample())
    q = quantizer.encode(sample())
    assert q.scale.shape == (6, 1, 1, 1)
    assert q.channel_axis == quantizer.channel_axis == 0
    assert quantizer.range()[0].shape == (6,)
    assert torch.allclose(quantizer.learned_scale(sample()), q.scale)
    assert torch.equal(quantizer(sample()), q.dequantize())


def test_the_width_is_refused_by_the_method_inside():
    with pytest.raises(ValueError, match="use uniq"):
        weight("weight_norm", 1)
    quantizer = weight("weight_norm", 1, method="uniq")
    quantizer.calibrate(sample())
    assert len(quantizer(sample()).unique()) == 2


def test_a_wrong_method_or_option_is_named():
    with pytest.raises(ValueError, match="unknown quantizer 'lsg'; did you mean 'lsq'"):
        weight("weight_norm", method="lsg")
    with pytest.raises(ValueError, match="did you mean 'per_channel'"):
        weight("weight_norm", options={"per_chanel": True})


def test_a_method_that_mends_the_stored_weights_is_not_wrapped():
    with pytest.raises(ValueError, match="use xnor alone"):
        QUANTIZERS["weight_norm"].factory(Site("weight", 1, True, 4), method="xnor")

"""Quantizers whose range is a learned clip: PACT, LCQ, and fixed sets of levels."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from bitladder.quant import QUANTIZERS, Quantizer, Site, bin_regularization
from bitladder.quant.compander import INTERVALS, companded
from bitladder.quant.level_sets import APOT_TERMS, apot_levels, pot_levels
from torch import Tensor

NAMES = ["pact", "lcq", "pot", "apot", "apot_uniform"]
NONE = {"weight_norm": "none"}


def activation(name: str, bits: int, **options: object) -> Quantizer:
    return QUANTIZERS[name].factory(Site("activation", bits, False, 4), **options)


def weight(name: str, bits: int, **options: object) -> Quantizer:
    return QUANTIZERS[name].factory(Site("weight", bits, True, 4), **options)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NAMES)
def test_a_clip_below_zero_is_bounded_and_can_come_back(name):
    quantizer = activation(name, 4)
    x = normal(500).relu()
    quantizer.calibrate(x)
    start = quantizer.clip.item()
    quantizer.clip.data.fill_(-0.5 * start)
    y = quantizer(x)
    assert quantizer.range()[1].item() == pytest.approx(1e-4 * start)
    assert y.max() <= 1.01e-4 * start
    (y - x).square().sum().backward()
    assert quantizer.clip.grad < 0  # descent raises the clip


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_a_number_stays_so_and_disturbs_nothing_else(name):
    quantizer = activation(name, 4)
    x = normal(4, 4).relu()
    quantizer.calibrate(x)
    broken = x.clone()
    broken[1, 2] = torch.nan
    y, want = quantizer(broken), quantizer(x)
    assert y[1, 2].isnan()
    y[1, 2] = want[1, 2]
    assert torch.equal(y, want)


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_in_another_memory_format_is_the_same_gradient(name):
    x, grad = normal(2, 4, 3, 5).relu(), normal(2, 4, 3, 5, seed=1)
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        quantizer = activation(name, 4)
        quantizer.calibrate(x)
        leaf = x.clone(memory_format=layout).requires_grad_()
        quantizer(leaf).backward(grad)
        results.append([leaf.grad, *(p.grad for p in quantizer.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bits", [2, 4])
def test_a_kept_range_is_used_only_where_it_fits_better(name, bits):
    x = torch.rand(4000, generator=torch.Generator().manual_seed(0))  # not a rectified Gaussian

    def error(keep):
        quantizer = activation(name, bits)
        quantizer.calibrate(x, keep=keep)
        return (quantizer(x) - x).square().mean().item(), quantizer.clip.item()

    plain, start = error(None)
    good, kept = error((torch.tensor(0.0), torch.tensor(1.0)))
    bad, same = error((torch.tensor(0.0), torch.tensor(1e3)))
    assert good <= plain
    assert kept in (pytest.approx(1.0), start)
    assert bad <= plain
    if name != "pot":  # whose levels reach from any clip down to any size
        assert same == start


@pytest.mark.parametrize("name", NAMES)
def test_a_constant_start_is_that_of_public_code(name):
    quantizer = activation(name, 3, init="constant")
    quantizer.calibrate(normal(100).relu())
    assert quantizer.clip.item() == pytest.approx(8.0)
    if name != "pact":
        quantizer = weight(name, 3, init="constant")
        quantizer.calibrate(0.1 * normal(100))
        assert quantizer.clip.item() == pytest.approx(3.0)


@pytest.mark.parametrize("name", ["lcq", "pot", "apot", "apot_uniform"])
def test_the_factor_on_the_clips_gradient_counts_weights_or_channels(name):
    for build, x, factor in (
        (weight, normal(4, 3, 3, 3), (3 / 108) ** 0.5),
        (activation, normal(4, 4, 5, 5).relu(), (7 / 4) ** 0.5),
    ):
        gradients = []
        for grad_scale in ("none", "lsq", 0.05):
            quantizer = build(name, 3, grad_scale=grad_scale)
            quantizer.calibrate(x)
            quantizer(x).backward(normal(*x.shape, seed=1))
            gradients.append(quantizer.clip.grad.item())
        assert gradients[1] == pytest.approx(factor * gradients[0], rel=1e-4)
        assert gradients[2] == pytest.approx(0.05 * gradients[0], rel=1e-4)


def test_only_values_at_or_above_the_clip_move_it_in_pact():
    quantizer = activation("pact", 2)
    quantizer.clip.data.fill_(3.0)
    x = torch.tensor([-1.0, 0.0, 0.5, 1.0, 1.5, 3.0, 4.0], requires_grad=True)
    grad = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0])
    y = quantizer(x)
    y.backward(grad)
    assert y.tolist() == [0, 0, 0, 1, 2, 3, 3]
    assert x.grad.tolist() == [0, 0, 4, 8, 16, 0, 0]
    assert quantizer.clip.grad.item() == 96


def reference_lcq(v: Tensor, theta: Tensor, top: int, *, inside: Tensor) -> tuple[Tensor, Tensor]:
    """LCQ's level for sizes 0 .. 1 with autograd, and how far each is from a threshold."""
    share = torch.softmax(theta, 0)
    slope, start = INTERVALS * share, share.cumsum(0) - share
    i = (v * INTERVALS).long().clamp(max=INTERVALS - 1)
    compressed = slope[i] * (v - i / INTERVALS) + start[i]
    q = compressed + ((top * compressed).round() / top - compressed).detach()
    j = (torch.searchsorted(start.detach(), q.detach(), right=True) - 1).clamp(0, INTERVALS - 1)
    level = (q - start[j]) / slope[j] + j / INTERVALS
    level = torch.where(inside, level, level.round().detach())
    return level, ((top * compressed) % 1 - 0.5).abs()


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("top", [1, 3, 7, 15, 255])
def test_the_compander_learns_by_autograd_through_it_with_rounding_the_identity(top, signed):
    clip = 2.1
    x, grad = 1.5 * normal(4000), normal(4000, seed=2)
    theta = (0.7 * normal(INTERVALS, seed=1)).double().requires_grad_()
    size = (x.double().abs() if signed else x.double().clamp(min=0)) / clip
    inside = (x.abs() if signed else x) < clip
    level, margin = reference_lcq(size.clamp(max=1), theta, top, inside=inside)
    want = (x.sign() if signed else 1) * clip * level
    grad = grad * (margin > 1e-4)  # on a threshold it may go either way in another precision
    (want * grad).sum().backward()

    leaves = [x, torch.tensor(clip), theta.detach().float()]
    leaves = [t.requires_grad_() for t in leaves]
    y = companded(*leaves, floor=torch.tensor(1e-4), top=top, signed=signed)
    y.backward(grad)
    kept = grad != 0
    torch.testing.assert_close(y[kept], want.float()[kept], rtol=1e-5, atol=1e-5)
    passed = inside & (signed | (x >= 0))
    assert torch.equal(x.grad, grad * passed)
    by_clip = (grad * (want - x * passed)).sum() / clip
    assert leaves[1].grad.item() == pytest.approx(by_clip.item(), rel=1e-3, abs=1e-3)
    bound = 1e-4 * theta.grad.abs().max().item()
    torch.testing.assert_close(leaves[2].grad.double(), theta.grad, rtol=1e-3, atol=bound)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_lcq_starts_as_an_even_grid(bits):
    x = normal(1000).relu()
    lcq, pact = activation("lcq", bits), activation("pact", bits)
    for quantizer in (lcq, pact):
        quantizer.calibrate(x)
    torch.testing.assert_close(lcq(x), pact(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [3, 8])
def test_a_lopsided_compander_stays_finite_and_in_order(bits, signed):
    quantizer = QUANTIZERS["lcq"].factory(Site("activation", bits, signed, 4))
    for place in (0, 7, 15):
        quantizer.theta.data.zero_()[place] = 60.0
        x = torch.linspace(-1.2, 1.2, 3001).requires_grad_()
        y = quantizer(x)
        y.square().sum().backward()
        q = quantizer.encode(x)
        assert torch.equal(y, q.dequantize())
        assert (y.diff() >= 0).all()
        assert (q.codebook.diff() >= 0).all()
        for tensor in (y, x.grad, quantizer.theta.grad, quantizer.clip.grad):
            assert tensor.isfinite().all()


def test_two_bit_lcq_weights_are_ternary_and_learn_no_map():
    quantizer = weight("lcq", 2, **NONE)
    assert [name for name, _ in quantizer.named_parameters()] == ["clip"]
    x = torch.tensor([-0.6, -0.4, 0.0, 0.4, 0.6, 3.0])
    assert quantizer(x).tolist() == [-1, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("bits", sorted(APOT_TERMS))
def test_additive_powers_of_two_are_all_sums_of_their_terms(bits):
    sums = {
        sum(terms) for terms in product(*[(0.0, *(2.0**-i for i in s)) for s in APOT_TERMS[bits]])
    }
    levels = apot_levels(bits)
    assert len(levels) == 2**bits
    assert [level / levels[-1] for level in levels] == pytest.approx(
        [s / max(sums) for s in sorted(sums)]
    )


def test_powers_of_two_halve_down_to_zero():
    assert [level / 4 for level in pot_levels(2)] == [0, 0.25, 0.5, 1]
    assert pot_levels(1) == (0, 1)
    assert len(pot_levels(4)) == 16


@pytest.mark.parametrize(
    ("name", "bits"), [("pot", 4), ("apot", 2), ("apot", 4), ("apot", 6), ("apot_uniform", 8)]
)
def test_values_go_to_the_nearest_level_and_from_a_tie_to_the_lower(name, bits):
    quantizer = activation(name, bits)
    quantizer.clip.data.fill_(2.0)
    levels = quantizer.encode(torch.zeros(1)).levels()[0].double()
    x = 3 * torch.rand(5000, generator=torch.Generator().manual_seed(0))
    nearest = levels[(x.double().clamp(max=2)[:, None] - levels).abs().argmin(1)]
    assert (quantizer(x) == nearest).float().mean() > 0.9999
    if name == "apot" and bits == 2:
        assert quantizer(torch.tensor([0.25, 0.75, 1.5])).tolist() == [0.0, 0.5, 1.0]


def test_negative_values_pass_their_gradient_only_in_the_cifar_form():
    x = torch.tensor([-2.0, 0.3, 1.0, 1.2])
    for form, want in (("cifar", [1, 1, 1, 0]), ("imagenet", [0, 1, 1, 0])):
        quantizer = activation("apot", 3, form=form)
        quantizer.clip.data.fill_(1.0)
        leaf = x.clone().requires_grad_()
        y = quantizer(leaf)
        y.sum().backward()
        assert y[0] == 0
        assert leaf.grad.tolist() == want


@pytest.mark.parametrize(
    ("form", "bits", "passes"), [("cifar", 4, 1.0), ("imagenet", 4, 0.0), ("imagenet", 2, 1.0)]
)
def test_clipped_weights_get_a_gradient_where_the_form_says(form, bits, passes):
    quantizer = weight("apot", bits, form=form, **NONE)
    x = torch.tensor([-3.0, 0.4, 2.0], requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad.tolist() == [passes, 1.0, passes]


@pytest.mark.parametrize(
    ("name", "site", "way_out"),
    [
        ("pact", Site("activation", 4, True, 1), "lsq or uniq"),
        ("pact", Site("weight", 4, True, 1), "activation"),
        ("lcq", Site("weight", 1, True, 1), "uniq"),
        ("lcq", Site("activation", 16, False, 1), "lsq"),
        ("apot", Site("weight", 8, True, 1), "lsq"),
        ("apot", Site("activation", 7, False, 1), "lsq"),
        ("apot", Site("activation", 1, False, 1), "uniq"),
        ("pot", Site("weight", 6, True, 1), "apot or lsq"),
        ("pot", Site("weight", 1, True, 1), "uniq"),
        ("apot_uniform", Site("activation", 1, True, 1), "uniq"),
    ],
)
def test_widths_that_a_method_is_not_defined_for_are_refused(name, site, way_out):
    with pytest.raises(ValueError, match=way_out):
        QUANTIZERS[name].factory(site)


@pytest.mark.parametrize(
    ("name", "target"),
    [*product(NAMES, ["activation"]), *product(NAMES[1:], ["weight"])],  # pact has no weights
)
def test_bin_regularization_pulls_the_clip_of_any_level_set(name, target):
    x = 0.1 * normal(4, 5, 3, 3) + 0.02
    x = x if target == "weight" else x.relu()
    quantizer = (weight if target == "weight" else activation)(name, 4)
    quantizer.calibrate(x)
    values, q = quantizer.latent(x).detach(), quantizer.encode(x)
    scale = quantizer.learned_scale(x, gradient=1.0)
    assert torch.allclose(scale, q.scale)
    loss = bin_regularization(values, q, scale=scale)
    loss.backward()
    change = 1e-3
    moved = [
        bin_regularization(values, replace(q, scale=q.scale * (1 + sign * change)))
        for sign in (1, -1)
    ]
    slope = (moved[0] - moved[1]) / (2 * change * quantizer.clip.item())
    assert quantizer.clip.grad.item() == pytest.approx(slope.item(), rel=1e-2)
    assert bin_regularization(q.dequantize(), q).item() == 0

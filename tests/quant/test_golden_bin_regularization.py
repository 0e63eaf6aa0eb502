"""Bin regularization against the public repositories, and what follows from its definition."""

from __future__ import annotations

import pytest
import torch
from bitladder.quant import QUANTIZERS, QTensor, Site, bin_regularization
from golden_cases import Case, cases


def encoded(case: Case, x: torch.Tensor, alpha: torch.Tensor) -> tuple[QTensor, torch.Tensor]:
    """The values encoded at the case's step, and that step with a gradient to `alpha`."""
    weight = case.signed
    binary = weight and case.bits == 1  # alpha is the size of both levels, half a step apart
    site = Site("weight" if weight else "activation", case.bits, weight, 1)
    quantizer = QUANTIZERS["uniq" if binary else "lsq"].factory(site)
    quantizer.scale.data = alpha.detach().squeeze() * (2 if binary else 1)
    return quantizer.encode(x), alpha.squeeze() * (2 if binary else 1)


@cases("bin_regularization", "", "target", "variant")
def test_loss_and_gradients_agree_with_the_original(case):
    attached = case.has("grad_alpha0")
    losses, values, alphas = [], [], []
    for layer in range(case.config["layers"]):
        x = case.tensor(f"w{layer}").float().requires_grad_()
        alpha = case.tensor(f"alpha{layer}").float().requires_grad_()
        q, scale = encoded(case, x, alpha)
        losses.append(bin_regularization(x, q, scale=scale if attached else None))
        values.append(x)
        alphas.append(alpha)
    sum(losses).backward()
    case.close(sum(losses), "loss")
    for layer, (x, alpha) in enumerate(zip(values, alphas, strict=True)):
        case.close(x.grad, f"grad_w{layer}")
        if attached:
            case.close(alpha.grad, f"grad_alpha{layer}")
        else:
            assert alpha.grad is None


@cases("bin_regularization", "br_weight_w1", "known-bug")
def test_positive_weights_are_not_pulled_to_zero_at_one_bit(case):
    x, alpha = case.tensor("w0"), case.tensor("alpha0")
    q, _ = encoded(case, x, alpha)
    assert torch.equal(q.dequantize().sign(), torch.where(x >= 0, 1.0, -1.0))
    assert not torch.isclose(bin_regularization(x, q), case.tensor("loss"), rtol=1e-2)


def test_values_on_their_levels_cost_nothing():
    quantizer = QUANTIZERS["lsq"].factory(Site("weight", 3, True, 4))
    x = quantizer(torch.randn(4, 50, generator=torch.Generator().manual_seed(0))).detach()
    assert bin_regularization(x, quantizer.encode(x)) == 0


def test_a_scale_per_channel_gives_the_mean_over_the_channels():
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    quantizer = QUANTIZERS["lsq"].factory(Site("weight", 2, True, 3), per_channel=True)
    quantizer.calibrate(x)
    total = 0.0
    for row, step in zip(x, quantizer.scale.detach(), strict=True):
        single = QUANTIZERS["lsq"].factory(Site("weight", 2, True, 1))
        single.scale.data = step
        total += bin_regularization(row, single.encode(row))
    torch.testing.assert_close(bin_regularization(x, quantizer.encode(x)), total / 3)


@pytest.mark.parametrize("per_channel", [False, True])
def test_both_gradients_are_those_of_the_definition(per_channel):
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    quantizer = QUANTIZERS["lsq"].factory(Site("weight", 2, True, 3), per_channel=per_channel)
    quantizer.calibrate(x)
    q = quantizer.encode(x)

    def loss_of_each_bin(values, scale):
        total = 0.0
        groups = range(3) if per_channel else [slice(None)]
        for group in groups:
            v, codes = values[group].flatten(), q.codes[group].flatten()
            step = scale[group].squeeze() if per_channel else scale
            for code in codes.unique():
                members = v[codes == code]
                level = step * (code - q.zero_point)
                spread = members.var(unbiased=False) if len(members) > 1 else 0.0
                total = total + (members.mean() - level) ** 2 + spread
        return total / len(groups)

    a = x.clone().requires_grad_(), q.scale.clone().requires_grad_()
    b = x.clone().requires_grad_(), q.scale.double().requires_grad_()
    ours, want = bin_regularization(a[0], q, scale=a[1]), loss_of_each_bin(*b)
    torch.testing.assert_close(ours, want)
    for got, expected in zip(
        torch.autograd.grad(ours, a), torch.autograd.grad(want, b), strict=True
    ):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-7)


def test_the_memory_format_changes_no_number():
    x = torch.randn(4, 6, 3, 5, generator=torch.Generator().manual_seed(1))
    quantizer = QUANTIZERS["lsq"].factory(Site("weight", 3, True, 4), per_channel=True)
    quantizer.calibrate(x)
    grads = []
    for layout in (torch.contiguous_format, torch.channels_last):
        v = x.clone(memory_format=layout).requires_grad_()
        bin_regularization(v, quantizer.encode(v)).backward()
        assert v.grad.is_contiguous(memory_format=layout)
        grads.append(v.grad)
    sliced = x.repeat_interleave(2, dim=3)[..., ::2].requires_grad_()
    bin_regularization(sliced, quantizer.encode(sliced)).backward()
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], sliced.grad)


def test_shapes_that_differ_are_refused():
    quantizer = QUANTIZERS["lsq"].factory(Site("weight", 3, True, 4))
    with pytest.raises(ValueError, match="values are"):
        bin_regularization(torch.zeros(4), quantizer.encode(torch.zeros(4, 2)))

"""Bin regularization: what follows from its definition."""

from __future__ import annotations

import pytest
import torch
from bitladder.quant import QUANTIZERS, Site, bin_regularization
from bitladder.quant.byte_pairs import FEWEST


def test_one_bit_weights_are_pulled_to_the_level_of_their_sign():
    x = torch.tensor([-1.0, -0.2, 0.0, 0.3, 2.0], requires_grad=True)
    quantizer = QUANTIZERS["uniq"].factory(Site("weight", 1, True, 1))
    quantizer.scale.data.fill_(1.0)  # levels -0.5 and 0.5
    bin_regularization(x, quantizer.encode(x)).backward()
    assert torch.equal(x.grad.sign(), torch.tensor([-1.0, 1.0, -1.0, -1.0, 1.0]))


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


@pytest.mark.parametrize("bits", [1, 4, 7, 8])
@pytest.mark.parametrize("images", [FEWEST // 512, FEWEST // 512 + 1, 1])
def test_many_values_are_counted_as_few_are(bits, images):
    generator = torch.Generator().manual_seed(bits)
    x = torch.rand(images, 8, 8, 8 if images > 1 else 7, generator=generator)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    quantizer = QUANTIZERS["lsq"].factory(Site("activation", bits, False, 8))
    quantizer.calibrate(x.detach())
    q = quantizer.encode(x.detach())
    bin_regularization(x, q).backward()
    members = torch.bincount(q.codes.flatten().long(), minlength=2**bits)[q.codes.long()]
    pull = 2 * (x.detach() - q.dequantize()) / members
    torch.testing.assert_close(x.grad, pull)

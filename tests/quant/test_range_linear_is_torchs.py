"""Range-based linear quantization is torch's own affine quantization, on the range it chose.

Torch multiplies by 1 / scale where we divide, so a value on the border of two codes may go either
way: such values, within a ten-thousandth of a step, are left out.
"""

from __future__ import annotations

import pytest
import torch
from bitladder.quant import QUANTIZERS, Site
from torch import Tensor

MODES = pytest.mark.parametrize("mode", ["restricted", "symmetric", "asymmetric"])
WIDTHS = pytest.mark.parametrize("bits", [3, 4, 8])
CHANNELS = 6


def torchs(x: Tensor, scale: Tensor, zero_point: Tensor | float, top: int) -> Tensor:
    """What torch makes of `x` on the codes 0 .. top, per tensor or per slice of axis 0."""
    scale = scale.flatten()
    zero = torch.as_tensor(zero_point).float().flatten().expand_as(scale).int()
    if len(scale) == 1:
        return torch.fake_quantize_per_tensor_affine(x, float(scale), int(zero), 0, top)
    return torch.fake_quantize_per_channel_affine(x, scale, zero, 0, 0, top)


def clear_of_ties(x: Tensor, scale: Tensor) -> Tensor:
    return ((x / scale).frac().abs() - 0.5).abs() > 1e-4


@MODES
@WIDTHS
@pytest.mark.parametrize("per_channel", [False, True])
@torch.no_grad()
def test_weights_are_torchs_fake_quantized_weights(mode, bits, per_channel):
    site = Site("weight", bits, True, CHANNELS)
    quantizer = QUANTIZERS["range_linear"].factory(site, mode=mode, per_channel=per_channel)
    x = torch.randn(CHANNELS, 5, 3, 3, generator=torch.Generator().manual_seed(bits)) + 0.1
    q = quantizer.encode(x)
    want = torchs(x, q.scale, q.zero_point, q.num_levels - 1)
    clear = clear_of_ties(x, q.scale)
    # the end of the symmetric range is a tie by construction, one value in each group
    assert (~clear).sum() <= (CHANNELS if per_channel else 1)
    assert torch.equal(quantizer(x)[clear], want[clear])


@MODES
@WIDTHS
@pytest.mark.parametrize("signed", [False, True])
def test_activations_and_their_gradient_are_torchs(mode, bits, signed):
    generator = torch.Generator().manual_seed(bits)
    quantizer = QUANTIZERS["range_linear"].factory(
        Site("activation", bits, signed, CHANNELS), mode=mode
    )
    sample = torch.randn(2, CHANNELS, 8, 8, generator=generator) + 0.1
    quantizer.calibrate(sample if signed else sample.relu())
    quantizer.eval()
    # beyond the calibrated range as well
    x = 2 * torch.randn(2, CHANNELS, 8, 8, generator=generator)
    x = (x if signed else x.relu()).requires_grad_()
    grad = torch.randn(x.shape, generator=generator)
    y = quantizer(x)
    y.backward(grad)
    q = quantizer.encode(x.detach())
    other = x.detach().clone().requires_grad_()
    want = torchs(other, q.scale, q.zero_point, q.num_levels - 1)
    want.backward(grad)
    clear = clear_of_ties(x, q.scale)
    assert clear.float().mean() > 0.99
    assert torch.equal(y[clear], want[clear])
    # ours stops at the tracked range, torch's half a step beyond the outer levels
    low, high = quantizer.range()
    inside = (x >= quantizer.low + q.scale) & (x <= quantizer.high - q.scale)
    far = (x < low - q.scale) | (x > high + q.scale)
    assert inside.any()
    assert far.any()
    assert torch.equal(x.grad[inside | far], other.grad[inside | far])

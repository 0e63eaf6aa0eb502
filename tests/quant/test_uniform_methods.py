"""DoReFa, LSQ and range-linear where the originals fail or leave the choice to us."""

from __future__ import annotations

import pytest
import torch
from bitladder.quant import QUANTIZERS, Site
from bitladder.quant.initializers import lsq_step, nmse_step, rows_of


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_one_bit_activations_have_their_threshold_at_one_half():
    quantizer = QUANTIZERS["dorefa"].factory(Site("activation", 1, False, 1))
    x = torch.tensor([-0.3, 0.0, 0.1, 0.49, 0.5, 0.51, 0.9, 1.0, 3.0])
    assert torch.equal(quantizer(x), (x > 0.5).float())


@pytest.mark.parametrize("unit_range", [False, True])
def test_a_zero_weight_makes_no_third_level(unit_range):
    quantizer = QUANTIZERS["dorefa"].factory(Site("weight", 1, True, 1), unit_range=unit_range)
    x = torch.tensor([[-1.0, 0.0, 3.0, -0.0]])
    assert torch.equal(quantizer(x), torch.tensor([[-1.0, 1.0, 1.0, 1.0]]))


def test_lsq_names_uniq_for_one_bit_weights():
    site = Site("weight", 1, True, 1)
    with pytest.raises(ValueError, match="use uniq"):
        QUANTIZERS["lsq"].factory(site)
    quantizer = QUANTIZERS["uniq"].factory(site)
    x = normal(4, 30)
    quantizer.calibrate(x)
    assert len(quantizer(x).unique()) == 2


@pytest.mark.parametrize("sign", [1, -1])
def test_eight_bit_weights_span_the_largest_size_not_the_largest_value(sign):
    x = normal(8, 4, 3, 3)
    x[0, 0, 0, 0] = sign * 9.0
    quantizer = QUANTIZERS["range_linear"].factory(Site("weight", 8, True, 8))
    y = quantizer(x)
    assert y[0, 0, 0, 0] == sign * 9.0
    assert (y - x).abs().max() <= 9.0 / 127 / 2 * 1.0001


@pytest.mark.parametrize("init", ["nmse", "lsq"])
@pytest.mark.parametrize("target", ["weight", "activation"])
def test_calibration_starts_where_the_option_says(init, target):
    weight = target == "weight"
    x = normal(8, 4, 3, 3) if weight else normal(8, 4, 3, 3).relu()
    quantizer = QUANTIZERS["lsq"].factory(Site(target, 4, weight, 8), init=init)
    quantizer.calibrate(x)
    rows = rows_of(x, channel_axis=None)
    want = {
        "nmse": nmse_step(rows, bits=4, signed=weight),
        "lsq": lsq_step(rows, qmax=7 if weight else 15),
    }
    torch.testing.assert_close(quantizer.scale.detach(), want[init].squeeze())

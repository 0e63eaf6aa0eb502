import pytest
import torch
from bitladder.quant import QUANTIZERS, Site
from bitladder.quant.export.thresholds import staircase


def every_input_quantizer():
    for name in QUANTIZERS:
        for signed in (False, True):
            for bits in (1, 2, 3, 8):
                site = Site("activation", bits, signed, 3)
                if "activation" not in QUANTIZERS[name].factory.targets:
                    continue
                try:
                    QUANTIZERS[name].factory(site)
                except (ValueError, TypeError):  # no such width; a wrapper, which wants a method
                    continue
                yield name, site


@pytest.mark.parametrize(("name", "site"), list(every_input_quantizer()), ids=str)
def test_the_codes_are_counts_of_thresholds_reached(name, site):
    torch.manual_seed(0)
    quantizer = QUANTIZERS[name].factory(site)
    x = torch.randn(8, 3, 5, 5) if site.signed else torch.randn(8, 3, 5, 5).relu()
    quantizer.calibrate(x)
    quantizer.eval()
    if name == "reactnet":
        torch.nn.init.normal_(quantizer.bias)
    stairs = staircase(quantizer)
    known = stairs.thresholds[torch.isfinite(stairs.thresholds)]
    before = known.nextafter(torch.full_like(known, -torch.inf))
    values = torch.cat([x.flatten(), known, before, torch.tensor([0.0, -0.0, 1e30, -1e30])])
    x = values.repeat_interleave(3).view(-1, 3, 1, 1)  # every value in every channel
    codes = (x.view(-1, 3, 1) >= stairs.thresholds.expand(3, -1)).sum(-1)
    assert torch.equal(codes, quantizer.encode(x).codes.long().view(-1, 3))
    assert torch.equal(stairs.levels[codes].view_as(x), quantizer(x))
    assert len(stairs.thresholds) == (3 if name == "reactnet" else 1)

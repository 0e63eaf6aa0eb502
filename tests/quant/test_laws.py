"""What holds for every registered quantizer at every width; a new one is tested by being there."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, get_args

import pytest
import torch
from bitladder.quant import QUANTIZERS, WIDTHS, QTensor, Quantizer, Site
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

CHANNELS = 4
SIDES = (("weight", True), ("activation", True), ("activation", False))
VARIANT_WIDTHS = (1, 4)  # of options; the defaults are tested at every width


@dataclass(frozen=True)
class Setup:
    name: str
    site: Site
    options: dict[str, Any] = field(default_factory=dict)

    def build(self) -> Quantizer:
        return QUANTIZERS[self.name].factory(self.site, **self.options)

    def declares(self, law: str) -> bool:
        return law in self.build().declares

    def __str__(self) -> str:
        sign = "signed" if self.site.signed else "unsigned"
        options = "-".join(f"{k}={v}" for k, v in self.options.items())
        return f"{self.name}-{self.site.target}-{sign}-{self.site.bits}-{options}"


def every_setup() -> list[Setup]:
    """Each method at each width and side that it admits; each value of its options at a few."""
    setups = []
    for name in QUANTIZERS:
        for target, signed in SIDES:
            for bits in sorted(WIDTHS):
                site = Site(target, bits, signed, CHANNELS)
                variants = variants_of(name) if bits in VARIANT_WIDTHS else []
                setups += [Setup(name, site, o) for o in ({}, *variants) if admits(name, site, o)]
    return setups


def variants_of(name: str) -> list[dict[str, Any]]:
    """Every value but the default of every option that has a few, one option at a time.

    `per_channel` is tried with each of them as well.
    """
    variants: list[dict[str, Any]] = []
    for option, parameter in QUANTIZERS[name].options().items():
        choices = [True, False] if parameter.annotation is bool else get_args(parameter.annotation)
        variants += [{option: value} for value in choices if value != parameter.default]
    variants = [v for v in variants if all(isinstance(x, str | bool) for x in v.values())]
    if {"per_channel": True} in variants:
        both = [{**v, "per_channel": True} for v in variants if "per_channel" not in v]
        variants += [v for v in both if "grad_scale" not in v]
    return variants


def admits(name: str, site: Site, options: dict[str, Any]) -> bool:
    factory = QUANTIZERS[name].factory
    if site.target not in factory.targets:
        return False
    try:
        factory(site, **options)
    except ValueError:
        return False
    return True


SETUPS = every_setup()
Law = Callable[..., None]


def in_every(setups: list[Setup]) -> Callable[[Law], Law]:
    """Makes of a law about one `setup` a test a method, whose failure names the setup.

    A test each would be 13,000, which take longer to be told of than to run.
    """

    def decorate(law: Law) -> Law:
        @wraps(law, updated=())
        def in_each(method: str, **others: Any) -> None:
            for setup in (s for s in setups if s.name == method):
                try:
                    law(setup=setup, **others)
                except BaseException as error:
                    error.add_note(f"setup: {setup}")
                    raise

        signature = inspect.signature(law)
        arguments = [
            p.replace(name="method") if p.name == "setup" else p
            for p in signature.parameters.values()
        ]
        in_each.__signature__ = signature.replace(parameters=arguments)
        in_each.pytestmark = list(getattr(law, "pytestmark", []))
        return pytest.mark.parametrize("method", dict.fromkeys(s.name for s in setups))(in_each)

    return decorate


every_quantizer = in_every(SETUPS)


def those_that_declare(law: str, setups: list[Setup] = SETUPS) -> Callable[[Law], Law]:
    return in_every([s for s in setups if s.declares(law)])


def sample(setup: Setup, seed: int = 0) -> Tensor:
    x = torch.randn(CHANNELS, CHANNELS, 3, 5, generator=torch.Generator().manual_seed(seed))
    return x if setup.site.signed else x.relu()


def calibrated(setup: Setup) -> Quantizer:
    quantizer = setup.build()
    quantizer.calibrate(sample(setup))
    return quantizer


def rows(x: Tensor, q: QTensor) -> Tensor:
    return x.reshape(1, -1) if q.channel_axis is None else x.movedim(q.channel_axis, 0).flatten(1)


@dataclass(frozen=True)
class Values:
    """A drawn tensor (CHANNELS, CHANNELS, 2), with channels of quite different kinds."""

    tensor: Tensor

    def at_site(self, setup: Setup) -> Tensor:
        return self.tensor.clone() if setup.site.signed else self.tensor.relu()


@st.composite
def channels(draw: st.DrawFn) -> Values:
    kinds = st.sampled_from(["normal", "empty", "constant", "outlier", "denormal", "any"])
    return Values(torch.stack([channel(draw, draw(kinds)) for _ in range(CHANNELS)]))


def channel(draw: st.DrawFn, kind: str) -> Tensor:
    shape = (CHANNELS, 2)
    if kind == "empty":
        return torch.zeros(shape)
    if kind == "constant":
        return torch.full(shape, draw(st.floats(-100, 100, width=32)))
    if kind == "any":
        values = st.floats(-1e4, 1e4, width=32)
        return torch.tensor(draw(st.lists(values, min_size=8, max_size=8))).view(shape)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    values = torch.randn(shape, generator=generator)
    if kind == "outlier":
        values[0, 0] *= 1e6
    return values * 1e-40 if kind == "denormal" else values


def test_all_methods_and_widths_are_here():
    assert {s.name for s in SETUPS} == set(QUANTIZERS) >= {"lsq", "uniq", "dorefa", "range_linear"}
    assert {s.site.bits for s in SETUPS} == set(WIDTHS)
    assert {"per_channel": True} in variants_of("lsq")
    assert {"init": "mse", "per_channel": True} in variants_of("lsq")


def test_a_law_is_asked_of_every_setup_of_a_method_and_a_failure_names_the_setup():
    asked = []

    @in_every(SETUPS)
    def law(setup):
        asked.append(setup)
        assert setup.site.bits != 4, "broken"

    own = [s for s in SETUPS if s.name == "lsq"]
    broken = next(s for s in own if s.site.bits == 4)
    with pytest.raises(AssertionError, match="broken") as failure:
        law(method="lsq")
    assert failure.value.__notes__ == [f"setup: {broken}"]
    assert asked == own[: own.index(broken) + 1]
    (mark,) = law.pytestmark
    assert set(mark.args[1]) == set(QUANTIZERS)


@every_quantizer
@pytest.mark.parametrize("training", [True, False])
def test_training_sees_what_export_stores(setup, training):
    quantizer = calibrated(setup).train(training)
    for x in (sample(setup), 3 * sample(setup, seed=1)):
        y = quantizer(x)
        assert torch.equal(y, quantizer.encode(x).dequantize())


@every_quantizer
def test_codes_are_few_and_stored_narrow(setup):
    q = calibrated(setup).encode(2 * sample(setup, seed=1))
    assert q.bits == setup.site.bits
    assert q.num_levels <= 2**q.bits
    assert q.codes.dtype == (torch.uint8 if q.bits <= 8 else torch.int32)
    assert int(q.codes.min()) >= 0
    assert int(q.codes.max()) < q.num_levels
    assert q.scale.dtype == torch.float32
    assert (q.scale > 0).all()
    assert q.scale.numel() == (CHANNELS if q.channel_axis is not None else 1)


@every_quantizer
def test_the_levels_are_what_the_codes_decode_to(setup):
    q = calibrated(setup).encode(sample(setup))
    for row, codes, values in zip(
        q.levels(), rows(q.codes, q), rows(q.dequantize(), q), strict=True
    ):
        assert torch.equal(row[codes.long()], values)


@every_quantizer
@pytest.mark.parametrize("kind", ["zeros", "constant", "outlier", "tiny"])
def test_odd_tensors_stay_finite(setup, kind):
    x = {
        "zeros": torch.zeros(CHANNELS, CHANNELS, 3, 5),
        "constant": torch.full((CHANNELS, CHANNELS, 3, 5), 0.3),
        "outlier": sample(setup).index_put((torch.tensor(0),) * 4, torch.tensor(1e6)),
        "tiny": 1e-30 * sample(setup),
    }[kind]
    quantizer = setup.build()
    quantizer.calibrate(x)
    x.requires_grad_()
    y = quantizer(x)
    y.sum().backward()
    q = quantizer.encode(x)
    steps = [p.grad for p in quantizer.parameters()]
    for tensor in (y, x.grad, q.scale, *quantizer.range(), *steps):
        assert tensor.isfinite().all()
    assert (q.scale > 0).all()
    fitted = setup.declares("nearest") and setup.options.get("init", "nmse") in ("nmse", "mse")
    if kind == "constant" and setup.site.bits > 1 and fitted:
        assert (y - x).abs().max() < 0.2  # a level lies near, though the deviation is 0


@every_quantizer
def test_every_parameter_and_the_input_get_a_gradient(setup):
    quantizer = calibrated(setup)
    x = (4 * sample(setup, seed=2)).requires_grad_()  # beyond a clip at 8 too
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    (quantizer(x) * weight).sum().backward()
    assert x.grad.abs().sum() > 0
    for parameter in quantizer.parameters():
        assert parameter.grad.shape == parameter.shape
        assert parameter.grad.isfinite().all()
        assert (parameter.grad != 0).any()


@every_quantizer
def test_a_state_dict_loads_strictly_and_gives_the_same_values(setup):
    quantizer, fresh = calibrated(setup).eval(), setup.build().eval()
    fresh.load_state_dict(quantizer.state_dict(), strict=True)
    x = sample(setup, seed=4)
    assert torch.equal(fresh(x), quantizer(x))
    for mine, other in zip(fresh.range(), quantizer.range(), strict=True):
        assert torch.equal(mine, other)


@every_quantizer
def test_a_copy_is_the_same_and_its_own(setup):
    quantizer = calibrated(setup)
    x = sample(setup, seed=4).requires_grad_()
    quantizer(x).sum().backward()  # a copy is taken of networks in training too
    copied = deepcopy(quantizer)
    assert torch.equal(copied(x), quantizer(x))
    before = {k: v.clone() for k, v in quantizer.state_dict().items()}
    copied.calibrate(7 * sample(setup, seed=5))
    assert all(torch.equal(v, before[k]) for k, v in quantizer.state_dict().items())


@every_quantizer
@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_any_values_are_encoded_exactly_and_finitely(setup, data):
    quantizer = setup.build()
    quantizer.calibrate(data.draw(channels(), label="calibration").at_site(setup))
    x = data.draw(channels(), label="input").at_site(setup).requires_grad_()
    y = quantizer(x)
    q = quantizer.encode(x)
    assert y.isfinite().all()
    assert torch.equal(y, q.dequantize())
    assert int(q.codes.max()) < q.num_levels <= 2**setup.site.bits
    y.sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in quantizer.parameters())


# one width a method, side and grouping: a second each
EXPORTED = list(
    {
        (s.name, s.site.target, str(s.options.get("per_channel"))): s
        for s in SETUPS
        if set(s.options) <= {"per_channel"} and s.site.bits <= 4
    }.values()
)


@in_every(EXPORTED)
def test_torch_export_takes_it(setup):
    quantizer = calibrated(setup).eval()
    x = sample(setup)
    program = torch.export.export(quantizer, (x,))
    assert torch.equal(program.module()(x), quantizer(x))


@in_every([s for s in SETUPS if s.site.target == "activation"])
def test_an_empty_batch_stays_empty(setup):
    quantizer = calibrated(setup).eval()
    assert quantizer(sample(setup)[:0]).shape == (0, CHANNELS, 3, 5)


@every_quantizer
def test_memory_format_and_dtype_stay(setup):
    quantizer = calibrated(setup)
    x = sample(setup).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    y = quantizer(x)
    y.backward(torch.ones_like(y))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert x.grad.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, quantizer.encode(x).dequantize())


@every_quantizer
def test_half_precision_gives_the_dequantized_value_rounded(setup):
    quantizer = calibrated(setup).eval()
    x = sample(setup).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = quantizer(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, quantizer.encode(x).dequantize().bfloat16())
    y.sum().backward()
    assert x.grad.dtype == torch.bfloat16
    for parameter in quantizer.parameters():
        assert parameter.grad.dtype == torch.float32


@every_quantizer
def test_the_range_is_that_of_the_levels(setup):
    quantizer = calibrated(setup)
    levels = quantizer.encode(sample(setup)).levels()
    for end, want in zip(quantizer.range(), (levels[:, 0], levels[:, -1]), strict=True):
        assert end.dtype == torch.float32
        assert end.dim() == (1 if quantizer.channel_axis is not None else 0)
        torch.testing.assert_close(end.reshape(-1), want, rtol=1e-5, atol=1e-7)


# at 16 bits the table of distances would hold 65,536 levels a value
@those_that_declare("nearest", [s for s in SETUPS if s.site.bits <= 8])
def test_values_in_range_go_to_the_nearest_level(setup):
    quantizer = calibrated(setup).eval()
    x = sample(setup)
    q = quantizer.encode(x)
    levels = q.levels()
    if len(levels) == 1:
        x = x.clamp(levels.min(), levels.max())
        q = quantizer.encode(x) if setup.site.target == "activation" else q
    distance = (rows(x, q)[..., None] - levels[:, None]).abs().amin(-1)
    got = (rows(q.dequantize(), q) - rows(x, q)).abs()
    assert (got <= distance + 1e-5 * levels.abs().max()).all()


@those_that_declare("idempotent")
def test_a_second_pass_changes_nothing(setup):
    quantizer = calibrated(setup).eval()
    once = quantizer(sample(setup))
    # statistics of the quantized tensor can differ from the first by a rounding error
    torch.testing.assert_close(quantizer(once), once, rtol=1e-6, atol=1e-7)


@those_that_declare("monotone")
def test_order_is_kept(setup):
    quantizer = calibrated(setup).eval()
    x = sample(setup).flatten(1).sort(dim=1).values
    assert (quantizer(x).diff(dim=1) >= 0).all()


@every_quantizer
def test_evaluation_changes_no_state(setup):
    quantizer = calibrated(setup).eval()
    before = {k: v.clone() for k, v in quantizer.state_dict().items()}
    quantizer(5 * sample(setup, seed=6))
    quantizer.encode(5 * sample(setup, seed=6))
    assert all(torch.equal(v, before[k]) for k, v in quantizer.state_dict().items())


@every_quantizer
def test_the_latent_values_are_what_rounding_sees(setup):
    quantizer = calibrated(setup)
    x = sample(setup)
    latent = quantizer.latent(x)
    q = quantizer.encode(x)
    levels = q.levels()
    inside = (rows(latent, q) >= levels[:, :1]) & (rows(latent, q) <= levels[:, -1:])
    gap = levels.diff(dim=1).amax(1, keepdim=True)
    error = (rows(latent, q) - rows(q.dequantize(), q)).abs()
    assert inside.any()
    assert (error <= 0.501 * gap)[inside].all()


@pytest.mark.parametrize("name", ["lsq", "uniq"])
@settings(max_examples=60)
@given(
    bits=st.sampled_from(sorted(WIDTHS - {1})),
    values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=30),
    step=st.floats(1e-3, 1e3),
)
def test_learned_steps_are_exact_on_any_values(name, bits, values, step):
    quantizer = QUANTIZERS[name].factory(Site("weight", bits, True, 1))
    quantizer.scale.data.fill_(step)
    x = torch.tensor(values)
    y = quantizer(x)
    q = quantizer.encode(x)
    assert torch.equal(y, q.dequantize())
    assert int(q.codes.max()) < q.num_levels
    low, high = quantizer.range()
    assert ((y >= low) & (y <= high)).all()


@pytest.mark.parametrize("name", ["lsq", "uniq"])
def test_a_step_below_zero_is_bounded_and_can_come_back(name):
    quantizer = QUANTIZERS[name].factory(Site("weight", 4, True, CHANNELS))
    x = torch.randn(64, generator=torch.Generator().manual_seed(0))
    quantizer.calibrate(x)
    start = quantizer.scale.item()
    quantizer.scale.data.fill_(-0.5 * start)
    y = quantizer(x)
    assert y.isfinite().all()
    assert (quantizer.encode(x).scale > 0).all()
    (y - x).square().sum().backward()
    assert quantizer.scale.grad < 0  # descent raises the step


@pytest.mark.parametrize("name", ["lsq", "uniq"])
@pytest.mark.parametrize("signed", [True, False])
def test_the_step_gradient_is_accurate_at_eight_bits(name, signed):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2**20, generator=generator)
    x = x if signed else x.relu()
    grad = torch.randn(2**20, generator=generator)
    site = Site("activation", 8, signed, 1)
    quantizer = QUANTIZERS[name].factory(site, grad_scale="none")
    quantizer.calibrate(x)
    quantizer(x).backward(grad)
    u = x.double() / quantizer.scale.item()
    level = quantizer(x).detach().double() / quantizer.scale.item()
    inside = (u >= quantizer.low) & (u <= quantizer.high)
    want = (grad.double() * (level - u * inside)).sum()
    assert abs(quantizer.scale.grad - want) <= 1e-4 * abs(want)


@pytest.mark.parametrize("bits", sorted(WIDTHS - {1}))
@pytest.mark.parametrize("name", ["lsq", "uniq"])
def test_a_kept_range_is_used_only_where_it_fits_better(name, bits):
    x = torch.rand(4000, generator=torch.Generator().manual_seed(0)) * 2 - 1  # not a Gaussian

    def error(keep):
        quantizer = QUANTIZERS[name].factory(Site("weight", bits, True, 1))
        quantizer.calibrate(x, keep=keep)
        return (quantizer(x) - x).square().mean().item(), quantizer.scale.item()

    plain, _ = error(None)
    good, step = error((torch.tensor(-1.0), torch.tensor(1.0)))
    bad, _ = error((torch.tensor(-1e3), torch.tensor(1e3)))
    assert good <= plain
    assert bad <= plain * 1.0001
    if bits in (3, 4, 8):
        assert step == pytest.approx(1 / (2 ** (bits - 1) - (1 if name == "lsq" else 0.5)))


def test_a_step_is_never_reused_unchanged_on_another_width():
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    wide = QUANTIZERS["lsq"].factory(Site("weight", 8, True, 1))
    wide.calibrate(x)
    narrow = QUANTIZERS["lsq"].factory(Site("weight", 4, True, 1))
    narrow.calibrate(x, keep=wide.range())
    ratio = (narrow.scale / wide.scale).item()
    assert ratio > 2
    covering = (wide.scale * 127 / 7).item()
    kept = narrow.scale.item()
    nmse = x.std().item() * 0.335201
    assert kept == pytest.approx(covering) or kept == pytest.approx(nmse)


def test_the_range_of_any_method_starts_any_other():
    x = torch.randn(8, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    sources = [s for s in SETUPS if s.site.target == "weight" and s.site.bits in (4, 8)]
    for source in sources:
        first = QUANTIZERS[source.name].factory(
            Site("weight", source.site.bits, True, 8), **source.options
        )
        first.calibrate(x)
        for name, options in (("lsq", {}), ("uniq", {"per_channel": True})):
            second = QUANTIZERS[name].factory(Site("weight", 2, True, 8), **options)
            second.calibrate(x, keep=first.range())
            assert (second(x) - x).square().mean() < x.square().mean()


@pytest.mark.parametrize(
    ("name", "site", "way_out"),
    [
        ("lsq", Site("weight", 1, True, 1), "uniq"),
        ("dorefa", Site("activation", 4, True, 1), "lsq"),
        ("range_linear", Site("weight", 2, True, 1), "uniq"),
        ("uniq", Site("weight", 9, True, 1), "16"),
        ("lsq", Site("weight", 32, True, 1), "16"),
    ],
)
def test_what_a_method_cannot_do_is_refused_with_the_way_out(name, site, way_out):
    with pytest.raises(ValueError, match=way_out):
        QUANTIZERS[name].factory(site)


def test_an_activation_has_no_scale_per_channel():
    with pytest.raises(ValueError, match="per_channel is for weights"):
        QUANTIZERS["lsq"].factory(Site("activation", 4, False, 4), per_channel=True)


def test_one_bit_uniq_starts_at_the_mean_size_of_gaussian_weights():
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0)) * 0.05
    quantizer = QUANTIZERS["uniq"].factory(Site("weight", 1, True, 1))
    quantizer.calibrate(x)
    assert quantizer(x).abs().max().item() == pytest.approx(x.abs().mean().item(), rel=0.01)
    assert (quantizer(torch.zeros(1)) > 0).all()


@pytest.mark.parametrize("name", sorted(QUANTIZERS))
def test_ranges_stay_float32_when_the_model_changes_its_dtype(name):
    setup = next(s for s in SETUPS if s.name == name)
    quantizer = calibrated(setup).to(torch.bfloat16)
    floating = [t for t in quantizer.state_dict().values() if t.is_floating_point()]
    assert all(t.dtype == torch.float32 for t in floating)
    assert quantizer(sample(setup).bfloat16()).dtype == torch.bfloat16

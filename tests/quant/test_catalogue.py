"""The table of quantizers says what building them shows."""

from typing import Literal

import pytest
import torch
from bitladder.quant import QUANTIZERS, WIDTHS, QTensor, Quantizer, Site
from bitladder.quant.catalogue import (
    PLACES,
    Learned,
    catalogue,
    quantizer_facts,
    type_text,
    widths_text,
)
from torch import nn


class Sample(Quantizer):
    """Learns an offset for each channel and a step for each code.

    Does nothing else.

    Options:
        init, other: the start,
            in two lines.

    Source: Somebody, 2020, section 1. Differs from it in: everything.
    """

    declares = frozenset({"nearest", "monotone"})

    def __init__(self, site: Site, *, init: str = "quick", other: int | None = None) -> None:
        super().__init__(site)
        self.offset = nn.Parameter(torch.full((1, site.channels, 1), 0.25))
        self.steps = nn.Parameter(torch.ones(2**site.bits - 1))
        if site.bits == 3:
            self.declares = frozenset({"monotone"})

    @classmethod
    def check(cls, site: Site) -> None:
        if site.bits not in (2, 3):
            raise ValueError(f"{site.bits} bits are too few or too many; use lsq")

    def calibrate(self, x, *, keep=None) -> None:
        self.steps.data.fill_(x.abs().max())

    def forward(self, x):
        return x

    def encode(self, x) -> QTensor:
        raise NotImplementedError

    def range(self):
        raise NotImplementedError


@pytest.fixture
def facts():
    QUANTIZERS.register("sample")(Sample)
    yield quantizer_facts("sample")
    del QUANTIZERS._entries["sample"]


def test_widths_are_those_that_can_be_built():
    for facts in catalogue():
        factory = QUANTIZERS[facts.name].factory
        for place in facts.places:
            target, signed = PLACES[place.name]
            refused = {bits for widths in place.refused.values() for bits in widths}
            if target in factory.targets:
                assert set(place.widths) | refused == WIDTHS
                assert not set(place.widths) & refused
            for bits in WIDTHS:
                site = Site(target, bits, signed, 4)
                if bits in place.widths:
                    factory(site)
                else:
                    with pytest.raises(ValueError, match=r".+"):
                        factory(site)


def test_every_quantizer_takes_some_width_and_names_its_source():
    for facts in catalogue():
        assert any(place.widths for place in facts.places), facts.name
        assert facts.summary, facts.name
        assert facts.paper, facts.name


def test_every_option_is_explained():
    silent = [(f.name, o.name) for f in catalogue() for o in f.options if not o.meaning]
    assert silent == []


def test_shapes_and_starts_are_read_off_the_parameters(facts):
    weights = facts.places[0]
    assert weights.widths == (2, 3)
    assert weights.shown_bits == 3
    assert weights.learns == (
        Learned("offset", (1, "C", 1), "0.25"),
        Learned("steps", (7,), "quick"),
    )
    assert str(weights.learns[0]) == "offset (1, C, 1)"
    assert facts.start == "quick"


def test_a_law_that_holds_at_some_widths_is_declared_in_part(facts):
    assert facts.declares("monotone") == "everywhere"
    assert facts.declares("nearest") == "in part"
    assert facts.declares("idempotent") == "no"
    assert facts.places[1].laws["nearest"] == (2,)


def test_a_reason_that_differs_in_its_numbers_alone_is_given_once(facts):
    reason = "1 bits are too few or too many; use lsq"
    assert facts.places[0].refused == {reason: (1, 4, 5, 6, 7, 8, 16)}


def test_the_docstring_gives_notes_meanings_and_the_paper(facts):
    assert facts.notes == ("Does nothing else.",)
    assert [(o.name, o.default, o.meaning) for o in facts.options] == [
        ("init", "quick", "the start, in two lines."),
        ("other", "None", "the start, in two lines."),
    ]
    assert facts.paper == "Somebody, 2020, section 1"


@pytest.mark.parametrize(
    ("widths", "text"),
    [((), ""), ((4,), "4"), ((1, 2), "1-2"), ((8, 1, 2, 3, 16), "1-3, 8, 16")],
)
def test_widths_are_written_as_ranges(widths, text):
    assert widths_text(widths) == text


def test_choices_are_written_as_yaml_says_them():
    option = QUANTIZERS["lsq"].options()["grad_scale"]
    assert type_text(option.annotation).split(" | ")[0] == "numel"
    assert type_text(bool) == "bool"
    assert type_text(dict[str, int] | None) == "dict | None"
    assert type_text(Literal["a", "b"] | float) == "a | b | float"

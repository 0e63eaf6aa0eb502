"""What every method can do, found by building it, so that no text about it can go stale."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import torch
from torch import Tensor

from .core import QUANTIZERS, WIDTHS, Quantizer, Site, Target
from .registry import Entry

PLACES: Mapping[str, tuple[Target, bool]] = MappingProxyType(
    {
        "weights": ("weight", True),
        "unsigned activations": ("activation", False),
        "signed activations": ("activation", True),
    }
)
LAWS = ("nearest", "idempotent", "monotone")
USUAL_BITS = 4  # at which shapes are shown
CHANNELS = (6, 10)  # an axis that differs between the two is the channels'


@dataclass(frozen=True)
class Learned:
    """One parameter of a quantizer.

    Attributes:
        shape: its axes; "C" stands for the number of channels.
        start: what calibration sets it to: a number, the default `init` if it follows the data,
            or "data" where there is no such option.
    """

    name: str
    shape: tuple[int | str, ...]
    start: str

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(map(str, self.shape))})"


@dataclass(frozen=True)
class Place:
    """What a method does with weights, or with unsigned or signed activations.

    Attributes:
        name: one of `PLACES`.
        widths: bits that it takes, ascending.
        shown_bits: the width that `learns` is of, 4 or the nearest; None where it takes none.
        learns: parameters, with the default options.
        laws: the widths at which each declared law holds.
        refused: the widths that it refuses, by reason; empty where it is not meant for the place.
    """

    name: str
    widths: tuple[int, ...]
    shown_bits: int | None
    learns: tuple[Learned, ...]
    laws: Mapping[str, tuple[int, ...]]
    refused: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Option:
    """What YAML may set, as text; `meaning` is what the docstring says of it."""

    name: str
    type: str
    default: str  # empty where one is required
    meaning: str


@dataclass(frozen=True)
class QuantizerFacts:
    """One registered method, as a row of the table or as a page."""

    name: str
    summary: str
    notes: tuple[str, ...]
    places: tuple[Place, ...]
    options: tuple[Option, ...]
    source: str

    @property
    def learns(self) -> tuple[Learned, ...]:
        """The parameters of all places, each once."""
        return tuple(dict.fromkeys(p for place in self.places for p in place.learns))

    @property
    def start(self) -> str:
        """The default `init`, or what the parameters start from; empty without parameters."""
        init = next((option.default for option in self.options if option.name == "init"), None)
        return init or ", ".join(dict.fromkeys(p.start for p in self.learns))

    @property
    def paper(self) -> str:
        """The source without what differs from it."""
        return re.split(r"\.? Differs? ", self.source)[0].rstrip(".")

    def declares(self, law: str) -> Literal["everywhere", "in part", "no"]:
        """Whether the law is declared at every width of every place that the method has."""
        places = [each for each in self.places if each.widths]
        if all(each.laws.get(law) == each.widths for each in places):
            return "everywhere"
        return "in part" if any(law in each.laws for each in places) else "no"


def quantizer_facts(name: str) -> QuantizerFacts:
    """What a registered method can do."""
    entry = QUANTIZERS[name]
    notes, meanings = _docstring_parts(entry)
    return QuantizerFacts(
        name=name,
        summary=entry.summary,
        notes=notes,
        places=tuple(_place(entry, place) for place in PLACES),
        options=tuple(
            Option(
                option,
                type_text(parameter.annotation),
                default_text(parameter.default),
                meanings.get(option, ""),
            )
            for option, parameter in entry.options().items()
        ),
        source=entry.source,
    )


def catalogue() -> list[QuantizerFacts]:
    """All registered methods by name."""
    return [quantizer_facts(name) for name in QUANTIZERS]


def widths_text(widths: Iterable[int]) -> str:
    """Widths as people write them: `1-8, 16`; empty for none."""
    runs: list[list[int]] = []
    for bits in sorted(widths):
        if runs and bits == runs[-1][-1] + 1:
            runs[-1].append(bits)
        else:
            runs.append([bits])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def type_text(annotation: Any) -> str:
    """An annotation as YAML sees it: the words of a Literal, the name of a type."""
    kind, choices = get_origin(annotation), get_args(annotation)
    if kind is Literal:
        return " | ".join(map(str, choices))
    if kind in (Union, UnionType):
        return " | ".join(map(type_text, choices))
    name = (kind or annotation).__name__
    return "None" if name == "NoneType" else name


def default_text(default: Any) -> str:
    """A default as YAML sees it; empty where there is none."""
    if default is inspect.Parameter.empty:
        return ""
    return default if isinstance(default, str) else str(default)


def _place(entry: Entry[type[Quantizer]], place: str) -> Place:
    target, signed = PLACES[place]
    built: dict[int, Quantizer] = {}
    refused: dict[str, list[int]] = {}
    if target in entry.factory.targets:
        for bits in sorted(WIDTHS):
            try:
                built[bits] = entry.factory(Site(target, bits, signed, CHANNELS[0]))
            except ValueError as error:
                refused.setdefault(_same_reason(str(error), refused), []).append(bits)
    declared = {law: tuple(b for b, q in built.items() if law in q.declares) for law in LAWS}
    shown = min(built, key=lambda bits: (abs(bits - USUAL_BITS), bits), default=None)
    return Place(
        name=place,
        widths=tuple(built),
        shown_bits=shown,
        learns=() if shown is None else _learned(entry, target, shown, signed),
        laws={law: widths for law, widths in declared.items() if widths},
        refused={reason: tuple(widths) for reason, widths in refused.items()},
    )


def _same_reason(reason: str, known: Iterable[str]) -> str:
    """A known reason that differs from this one in its numbers alone, or this one."""
    bare = re.sub(r"\d+", "", reason)
    return next((other for other in known if re.sub(r"\d+", "", other) == bare), reason)


def _learned(
    entry: Entry[type[Quantizer]], target: Target, bits: int, signed: bool
) -> tuple[Learned, ...]:
    sites = [Site(target, bits, signed, channels) for channels in CHANNELS]
    few, many, wider = (entry.factory(site) for site in (*sites, sites[0]))
    few.calibrate(_sample(sites[0]))
    wider.calibrate(3 * _sample(sites[0]))
    options = entry.options()
    init = str(options["init"].default) if "init" in options else "data"
    others, again = dict(many.named_parameters()), dict(wider.named_parameters())
    return tuple(
        Learned(
            name,
            tuple(
                size if size == other else "C"
                for size, other in zip(value.shape, others[name].shape, strict=True)
            ),
            _start(value.detach(), again[name].detach(), init),
        )
        for name, value in few.named_parameters()
    )


def _start(value: Tensor, other: Tensor, init: str) -> str:
    if not torch.equal(value, other):
        return init
    first = value.flatten()[0]
    return f"{first.item():g}" if bool((value == first).all()) else "constants"


def _sample(site: Site) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if site.target == "weight":
        return torch.randn(site.channels, 8, 3, 3, generator=generator)
    x = torch.randn(4096, generator=generator)
    return x if site.signed else x.relu()


def _docstring_parts(entry: Entry[Any]) -> tuple[tuple[str, ...], dict[str, str]]:
    """Paragraphs between the summary and `Options:`, and what is said of each option."""
    doc = inspect.getdoc(entry.factory) or ""
    body = doc.partition("\n")[2].partition("Source:")[0]
    text, _, block = body.partition("Options:")
    heads = list(re.finditer(r"^ {4}([\w, ]+): ", block, flags=re.MULTILINE))
    notes = tuple(" ".join(part.split()) for part in text.split("\n\n") if part.strip())
    ends = [*(b.start() for _, b in pairwise(heads)), len(block)]
    meanings = {
        name.strip(): " ".join(block[head.end() : end].split())
        for head, end in zip(heads, ends, strict=bool(heads))
        for name in head[1].split(",")
    }
    if reference := re.match(r" see `(\w+)`", block):
        others = (QUANTIZERS[name] for name in QUANTIZERS)
        meanings |= next(
            _docstring_parts(other)[1] for other in others if other.factory.__name__ == reference[1]
        )
    return notes, meanings

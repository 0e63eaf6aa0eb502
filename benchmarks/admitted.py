"""Which method can stand where at which width: found by asking, never listed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from bitladder.pipeline.config import Component
from bitladder.pipeline.policy import choose_quantizer
from bitladder.quant import QUANTIZERS, QuantizerChoice, Site
from bitladder.quant.core import Target

CHANNELS = 16  # of the site that a method is asked about; none refuses by channels
CONTROLS = ("lsq", "uniq")  # also run on the network with signed inputs that others need


@dataclass(frozen=True)
class Row:
    """A method at one width, on both sides of a layer where it can stand on both.

    Attributes:
        quantizer: the method that the row is about.
        bits: of weights and of activations.
        weight, activation: the methods of the two sides. Where `quantizer` refuses one, that side
            has what `auto` means at the width: LSQ; UniQ at 1 bit, min-max at 16.
        signed: whether the row stands in a network whose layers see values below zero.
    """

    quantizer: str
    bits: int
    weight: str
    activation: str
    signed: bool

    @property
    def label(self) -> str:
        """For the names of runs: `lsq-w2a2`."""
        return f"{self.quantizer}-w{self.bits}a{self.bits}{'-signed' if self.signed else ''}"

    def methods(self) -> str:
        """`lsq` for both sides, else `W lsq, A pact`."""
        if self.weight == self.activation:
            return self.weight
        return f"W {self.weight}, A {self.activation}"


@dataclass(frozen=True)
class Refusal:
    """A width that a method takes on neither side, in its own words."""

    quantizer: str
    bits: int
    reason: str


def admitted(
    names: Iterable[str], widths: Iterable[int], *, controls: bool = True
) -> tuple[list[Row], list[Refusal]]:
    """What each method can do at each width, and what it refuses.

    A method that refuses unsigned activations and takes signed ones gets a row with signed inputs;
    at the widths of such rows the `CONTROLS` among `names` get a second row there, to compare.
    """
    names, widths = list(names), list(widths)
    rows, refusals = [], []
    for name in names:
        for bits in widths:
            weight, unsigned, signed = (
                refusal(name, "weight", bits, signed=True),
                refusal(name, "activation", bits, signed=False),
                refusal(name, "activation", bits, signed=True),
            )
            if weight and unsigned and signed:
                # a target that the method never takes says nothing about the width
                usual = QUANTIZERS[name].factory.targets
                said = [weight] if "weight" in usual else []
                said += [unsigned] if "activation" in usual else []
                refusals.append(Refusal(name, bits, "; ".join(dict.fromkeys(said))))
            else:
                needs_signed = unsigned is not None and signed is None
                rows.append(_row(name, bits, weight, signed and unsigned, needs_signed))
    if controls:
        for bits in sorted({row.bits for row in rows if row.signed}):
            for name in (n for n in CONTROLS if n in names):
                weight = refusal(name, "weight", bits, signed=True)
                activation = refusal(name, "activation", bits, signed=True)
                if weight is None and activation is None:
                    rows.append(_row(name, bits, None, None, True))
    return rows, refusals


def refusal(name: str, target: Target, bits: int, *, signed: bool) -> str | None:
    """Why a method does not take a site; None if it does."""
    try:
        QuantizerChoice(name).build(Site(target, bits, signed, CHANNELS))
    except ValueError as error:
        return str(error)
    return None


def _row(name: str, bits: int, weight: str | None, activation: str | None, signed: bool) -> Row:
    """The row of a method that refuses a side or not."""
    other = choose_quantizer(Component(name="auto"), bits).name
    return Row(
        quantizer=name,
        bits=bits,
        weight=name if weight is None else other,
        activation=name if activation is None else other,
        signed=signed,
    )

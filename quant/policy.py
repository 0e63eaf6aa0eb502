"""Which layer is quantized how: a policy, resolved against a probe into one plan a layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

from .core import QUANTIZERS, WIDTHS, Quantizer, Site, Target
from .probing import LayerFacts, Probe

FLOAT_BITS = 32
SHORTCUT_NAMES = ("shortcut", "downsample")


@dataclass(frozen=True)
class QuantizerChoice:
    """A registered method with its options."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def build(self, site: Site) -> Quantizer:
        """The quantizer for `site`.

        Raises:
            ValueError: no such method, option, or width there; the message names the way out.
        """
        entry = QUANTIZERS[self.name]
        if wrong := sorted(set(self.options) - set(entry.options())):
            known = ", ".join(entry.options()) or "none"
            raise ValueError(f"{self.name} has no option {', '.join(wrong)}; known: {known}")
        return entry.factory(site, **self.options)


@dataclass(frozen=True)
class Rule:
    """What differs for the layers whose name fits the glob `match`; None leaves it as it is."""

    match: str
    weight_bits: int | None = None
    activation_bits: int | None = None
    weight: QuantizerChoice | None = None
    activation: QuantizerChoice | None = None


@dataclass(frozen=True)
class LayerPlan:
    """How one layer is quantized: method and site for its weight and its input; None is float."""

    weight: tuple[QuantizerChoice, Site] | None = None
    activation: tuple[QuantizerChoice, Site] | None = None

    @property
    def weight_bits(self) -> int:
        """Width of the weight, 32 in float."""
        return self.weight[1].bits if self.weight else FLOAT_BITS

    @property
    def activation_bits(self) -> int:
        """Width of the input, 32 in float."""
        return self.activation[1].bits if self.activation else FLOAT_BITS

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"weight": _record(self.weight), "activation": _record(self.activation)}


@dataclass(frozen=True)
class QuantPolicy:
    """Widths and methods of a whole network.

    Attributes:
        weight_bits, activation_bits: of the inner layers; 32 leaves them in float. With both at
            32 the network stays as it is, first and last layer included.
        weight, activation: methods of the inner layers.
        first_last_bits: weights and inputs of the first and last layer in order of execution.
            The input of the first is signed, whatever the probe saw.
        first_last_weight, first_last_activation: methods there.
        shortcut: width of shortcut convolutions (1x1, "shortcut" or "downsample" in the name).
            "same" follows the inner layers, but takes 8 bits at W1A1.
        rules: per-layer exceptions; of those that match a layer's name the last one wins. A rule
            that sets a width and no method takes the method of the inner layers.
    """

    weight_bits: int
    activation_bits: int
    weight: QuantizerChoice = QuantizerChoice("lsq")
    activation: QuantizerChoice = QuantizerChoice("lsq")
    first_last_bits: int = 8
    first_last_weight: QuantizerChoice = QuantizerChoice("range_linear")
    first_last_activation: QuantizerChoice = QuantizerChoice("lsq")
    shortcut: Literal["same"] | int = "same"
    rules: tuple[Rule, ...] = ()

    def resolve(self, probe: Probe) -> dict[str, LayerPlan]:
        """The plan of every layer that the probe saw, in order of execution.

        Raises:
            ValueError: all layers whose method cannot do what is asked, each with the way out.
        """
        names = list(probe.layers)
        plans, errors = {}, []
        for name, facts in probe.layers.items():
            try:
                plans[name] = self.for_layer(facts, first=name == names[0], last=name == names[-1])
            except ValueError as error:
                errors.append(f"layer {name!r}: {error}")
        if errors:
            raise ValueError("; ".join(errors))
        return plans

    def for_layer(self, facts: LayerFacts, *, first: bool, last: bool) -> LayerPlan:
        """The plan of one layer."""
        bits = {"weight": self.weight_bits, "activation": self.activation_bits}
        choice = {"weight": self.weight, "activation": self.activation}
        quantized = min(bits.values()) < FLOAT_BITS
        if quantized and (first or last):
            bits = dict.fromkeys(bits, self.first_last_bits)
            choice = {"weight": self.first_last_weight, "activation": self.first_last_activation}
        elif quantized and _is_shortcut(facts):
            if self.shortcut != "same":
                bits = dict.fromkeys(bits, self.shortcut)
            elif max(bits.values()) == 1:
                bits = dict.fromkeys(bits, 8)
        if matching := [r for r in self.rules if fnmatchcase(facts.name, r.match)]:
            rule = matching[-1]
            for side, width, method, inner in (
                ("weight", rule.weight_bits, rule.weight, self.weight),
                ("activation", rule.activation_bits, rule.activation, self.activation),
            ):
                if width is not None:
                    bits[side], choice[side] = width, inner
                choice[side] = method or choice[side]
        return LayerPlan(
            weight=_place(choice["weight"], "weight", bits["weight"], True, facts.out_channels),
            activation=_place(
                choice["activation"],
                "activation",
                bits["activation"],
                first or facts.signed_input,
                facts.in_channels,
            ),
        )


def plan_from_dict(data: Mapping[str, Mapping[str, Any]]) -> dict[str, LayerPlan]:
    """The plan that `{name: plan.as_dict()}` recorded."""
    return {
        name: LayerPlan(
            weight=_restore("weight", record["weight"]),
            activation=_restore("activation", record["activation"]),
        )
        for name, record in data.items()
    }


def plan_as_dict(plan: Mapping[str, LayerPlan]) -> dict[str, dict[str, Any]]:
    """Plain values for JSON, layer by layer."""
    return {name: layer.as_dict() for name, layer in plan.items()}


def _place(
    choice: QuantizerChoice, target: Target, bits: int, signed: bool, channels: int
) -> tuple[QuantizerChoice, Site] | None:
    if bits == FLOAT_BITS:
        return None
    if bits not in WIDTHS:
        known = ", ".join(map(str, sorted(WIDTHS | {FLOAT_BITS})))
        raise ValueError(f"no width of {bits} bits; known: {known}")
    site = Site(target, bits, signed, channels)
    choice.build(site)  # every refusal comes now, not when the model is half swapped
    return choice, site


def _is_shortcut(facts: LayerFacts) -> bool:
    pointwise = bool(facts.kernel) and set(facts.kernel) == {1}
    return pointwise and any(word in facts.name for word in SHORTCUT_NAMES)


def _record(placed: tuple[QuantizerChoice, Site] | None) -> dict[str, Any] | None:
    if placed is None:
        return None
    choice, site = placed
    return {
        "quantizer": choice.name,
        "options": dict(choice.options),
        "bits": site.bits,
        "signed": site.signed,
        "channels": site.channels,
        "axis": site.axis,
    }


def _restore(
    target: Target, record: Mapping[str, Any] | None
) -> tuple[QuantizerChoice, Site] | None:
    if record is None:
        return None
    site = Site(target, record["bits"], record["signed"], record["channels"], record.get("axis", 1))
    return QuantizerChoice(record["quantizer"], dict(record["options"])), site

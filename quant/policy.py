"""Which layer is quantized how: a policy, resolved against a probe into one plan a layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

from .core import QUANTIZERS, WIDTHS, Quantizer, Site, Target
from .probing import KINDS, LayerFacts, Probe
from .registry import unknown

FLOAT_BITS = 32


@dataclass(frozen=True)
class QuantizerChoice:
    """A registered method with its options."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def methods(self) -> tuple[str, ...]:
        """The registered names that its numbers depend on: its own, and that which it wraps."""
        inner = QUANTIZERS[self.name].factory.wraps(self.options)
        return (self.name, *(QuantizerChoice(*inner).methods if inner is not None else ()))

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
    """What differs for the layers that fit; None leaves it as it is.

    Attributes:
        match: glob over the layer's name, or any of its names.
        kind: one of `KINDS`: `Linear`, `depthwise`, ...; None for all.
    """

    match: str = "*"
    weight_bits: int | None = None
    activation_bits: int | None = None
    weight: QuantizerChoice | None = None
    activation: QuantizerChoice | None = None
    kind: str | None = None

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in KINDS:
            raise ValueError(unknown("kind of layer", self.kind, KINDS))

    def fits(self, facts: LayerFacts) -> bool:
        """Whether the rule is for this layer."""
        named = any(fnmatchcase(name, self.match) for name in (facts.name, *facts.aliases))
        return named and (self.kind is None or self.kind in facts.kinds)


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
        first_last_bits: weights and inputs of the first and last layer in order of execution; 32
            leaves them in float. The input of the first is signed, whatever the probe saw.
        first_last_weight_bits, first_last_activation_bits: the same for one of the two.
        first_last_weight, first_last_activation: methods there.
        shortcut: width of shortcut convolutions (1x1, "shortcut" or "downsample" in the name).
            "same" follows the inner layers, but takes 8 bits at W1A1. Where the methods of the
            inner layers do not have the shortcut's width, those of first and last layer serve.
        rules: exceptions by name and kind; of those that fit a layer the last one wins. A rule
            that sets a width and no method takes the method of the inner layers.
    """

    weight_bits: int
    activation_bits: int
    weight: QuantizerChoice = QuantizerChoice("lsq")
    activation: QuantizerChoice = QuantizerChoice("lsq")
    first_last_bits: int = 8
    first_last_weight_bits: int | None = None
    first_last_activation_bits: int | None = None
    first_last_weight: QuantizerChoice = QuantizerChoice("range_linear")
    first_last_activation: QuantizerChoice = QuantizerChoice("lsq")
    shortcut: Literal["same"] | int = "same"
    rules: tuple[Rule, ...] = ()

    @property
    def full_precision(self) -> bool:
        """Whether the network stays as it is, but for what rules say."""
        return min(self.weight_bits, self.activation_bits) >= FLOAT_BITS

    def resolve(self, probe: Probe) -> dict[str, LayerPlan]:
        """The plan of every layer that the probe saw, in order of execution.

        Raises:
            ValueError: there is no such layer; or all layers whose method cannot do what is
                asked, each with the way out.
        """
        names = list(probe.layers)
        if not names and not self.full_precision:
            raise ValueError(_nothing_there(probe))
        plans, errors = {}, []
        for name, facts in probe.layers.items():
            try:
                plans[name] = self.for_layer(facts, first=name == names[0], last=name == names[-1])
            except ValueError as error:
                errors.append(f"layer {name!r}: {error}")
        if errors:
            raise ValueError("; ".join(errors))
        return plans

    def unused_rules(self, probe: Probe) -> list[int]:
        """Positions of the rules that fit no layer: mistyped, or for another network."""
        layers = probe.layers.values()
        return [i for i, rule in enumerate(self.rules) if not any(map(rule.fits, layers))]

    def for_layer(self, facts: LayerFacts, *, first: bool, last: bool) -> LayerPlan:
        """The plan of one layer."""
        rule = next((r for r in reversed(self.rules) if r.fits(facts)), Rule())
        edge = first or last
        bits, methods = self._half("weight", facts, edge, rule.weight_bits, rule.weight)
        weight = _place(methods, Site("weight", bits, True, facts.weight_channels))
        bits, methods = self._half("activation", facts, edge, rule.activation_bits, rule.activation)
        signed = first or facts.signed_input
        site = Site("activation", bits, signed, facts.in_channels, facts.input_axis)
        return LayerPlan(weight, _place(methods, site))

    def _half(
        self,
        target: Target,
        facts: LayerFacts,
        edge: bool,
        rule_bits: int | None,
        rule_method: QuantizerChoice | None,
    ) -> tuple[int, list[QuantizerChoice]]:
        """Width of a layer's weight or input, and its method; a further one stands in for it."""
        bits, inner = self.weight_bits, self.weight
        edge_bits, edge_method = self.first_last_weight_bits, self.first_last_weight
        if target == "activation":
            bits, inner = self.activation_bits, self.activation
            edge_bits, edge_method = self.first_last_activation_bits, self.first_last_activation
        methods = [inner]
        if edge and not self.full_precision:
            bits = self.first_last_bits if edge_bits is None else edge_bits
            methods = [edge_method]
        elif "shortcut" in facts.kinds and not self.full_precision:
            wide = 8 if self.weight_bits == self.activation_bits == 1 else bits
            wide = wide if self.shortcut == "same" else self.shortcut
            methods = [inner] if wide == bits else [inner, edge_method]
            bits = wide
        if rule_bits is not None:
            bits, methods = rule_bits, [inner]
        if rule_method is not None:
            methods = [rule_method]
        return bits, methods


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


def _place(methods: Sequence[QuantizerChoice], site: Site) -> tuple[QuantizerChoice, Site] | None:
    """The first of the methods that can do what the site asks; None for 32 bits.

    Raises:
        ValueError: none of them can; what the first one says.
    """
    if site.bits == FLOAT_BITS:
        return None
    if site.bits not in WIDTHS:
        known = ", ".join(map(str, sorted(WIDTHS | {FLOAT_BITS})))
        raise ValueError(f"no width of {site.bits} bits; known: {known}")
    first, *others = methods
    try:
        first.build(site)  # every refusal comes now, not when the model is half swapped
    except ValueError:
        if not others:
            raise
        return _place(others, site)
    return first, site


def _nothing_there(probe: Probe) -> str:
    """Why there is nothing to quantize, and what the model has instead."""
    has = "; ".join(f"{name or 'the model itself'} ({why})" for name, why in probe.skipped.items())
    return (
        "nothing to quantize: the model runs no convolution (plain or transposed, 1 to 3 "
        f"dimensions) and no linear layer; it has {has or 'no weights'}"
    )


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

"""A rung's settings as the quantization policy that they mean."""

from __future__ import annotations

from ..quant.core import Target
from ..quant.policy import QuantizerChoice, QuantPolicy, Rule
from .config import PolicyConfig, StageConfig
from .config_section import Component


def choose_quantizer(choice: Component, bits: int) -> Component:
    """`auto` made definite: LSQ, but UniQ at one bit, which is what LSQ would be there.

    At 16 bits it is the range itself: LSQ's step has a gradient of 1 / sqrt(32767), too small to
    follow weights that grow from a fresh start.
    """
    if choice.name != "auto":
        return choice
    return Component(name={1: "uniq", 16: "range_linear"}.get(bits, "lsq"))


def policy_of(stage: StageConfig) -> QuantPolicy:
    """A stage's settings as the quantization policy that they mean."""
    rules = tuple(
        Rule(
            match=rule.match or "*",
            kind=rule.kind,
            weight_bits=rule.weight_bits,
            activation_bits=rule.activation_bits,
            weight=_of_rule(
                rule.weight, rule.weight_bits, stage.quantizer.weight, stage.weight_bits
            ),
            activation=_of_rule(
                rule.activation,
                rule.activation_bits,
                stage.quantizer.activation,
                stage.activation_bits,
            ),
        )
        for rule in stage.policy.rules
    )
    weight = _choice(stage.quantizer.weight, stage.weight_bits)
    activation = _choice(stage.quantizer.activation, stage.activation_bits)
    edges = first_last_bits(stage.policy)
    return QuantPolicy(
        weight_bits=stage.weight_bits,
        activation_bits=stage.activation_bits,
        weight=weight,
        activation=activation,
        first_last_weight_bits=edges["weight"],
        first_last_activation_bits=edges["activation"],
        first_last_weight=_choice(stage.policy.first_last_weight, edges["weight"]),
        first_last_activation=_choice(stage.policy.first_last_activation, edges["activation"]),
        shortcut=stage.policy.shortcut,
        rules=rules,
    )


def first_last_bits(policy: PolicyConfig) -> dict[Target, int]:
    """Widths of the first and last layer's weights and inputs."""
    own: dict[Target, int | None] = {
        "weight": policy.first_last_weight_bits,
        "activation": policy.first_last_activation_bits,
    }
    return {half: policy.first_last_bits if b is None else b for half, b in own.items()}


def _of_rule(
    own: Component | None, bits: int | None, inner: Component, inner_bits: int
) -> QuantizerChoice | None:
    """A rule's method; one that sets a width alone takes the inner method at that width."""
    if own is None and bits is None:
        return None
    return _choice(own or inner, bits or inner_bits)


def _choice(component: Component, bits: int) -> QuantizerChoice:
    chosen = choose_quantizer(component, bits)
    return QuantizerChoice(chosen.name, chosen.options)

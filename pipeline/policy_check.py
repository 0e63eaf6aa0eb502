"""What the rungs ask for, held against the layers that the network has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from ..quant.policy import LayerPlan, Rule
from ..quant.probing import Probe
from .config import RunConfig
from .errors import ConfigError
from .policy import policy_of


def check_policies(config: RunConfig, networks: Sequence[Probe]) -> None:
    """Refuses what no layer of a network can have, before the first rung is trained.

    Args:
        networks: what is known of each rung's network, in ladder order.

    Raises:
        ConfigError: rules that fit nothing, and methods that a layer cannot have.
    """
    errors: list[str] = []
    learned: set[str] = set()
    for index, (stage, facts) in enumerate(zip(config.ladder, networks, strict=True)):
        policy = policy_of(stage)
        errors += [
            f"ladder.{index}.policy.rules.{number}{_no_layer(policy.rules[number], facts)}"
            for number in policy.unused_rules(facts)
        ]
        try:
            learned |= _learned_names(policy.resolve(facts))
        except ValueError as error:
            errors.append(f"ladder.{index}: {error}")
    if not errors:
        errors = _unused_parameter_rules(config, learned)
    if errors:
        raise ConfigError(errors)


def _learned_names(plan: Mapping[str, LayerPlan]) -> set[str]:
    """What the quantizers of a plan learn, with names in the model."""
    names = set()
    for layer, halves in plan.items():
        for part, placed in (
            ("weight_quantizer", halves.weight),
            ("input_quantizer", halves.activation),
        ):
            if placed is not None:
                learned = placed[0].build(placed[1]).named_parameters()
                names |= {".".join(filter(None, (layer, part, name))) for name, _ in learned}
    return names


def _unused_parameter_rules(config: RunConfig, learned: Iterable[str]) -> list[str]:
    """Rules for quantizer parameters that fit none in any rung; a rung may well have none."""
    rules = {
        rule.match
        for stage in config.ladder
        if not stage.full_precision
        for rule in stage.train.quantizer_parameters.rules
    }
    names = sorted(learned)
    kinds = sorted({name.rsplit(".", 1)[-1] for name in names})
    return [
        f"train.quantizer_parameters.rules: no rung has a quantizer parameter named {match!r}; "
        f"there are {', '.join(kinds) or 'none'}, such as {names[0] if names else '-'}"
        for match in sorted(rules)
        if not any(fnmatchcase(name, match) for name in names)
    ]


def _no_layer(rule: Rule, facts: Probe) -> str:
    if rule.kind is None:
        return f".match: no layer is named {rule.match!r}; layers: {', '.join(facts.layers)}"
    kinds = sorted(set().union(*(layer.kinds for layer in facts.layers.values())))
    named = "" if rule.match == "*" else f" is named {rule.match!r} and"
    return f".kind: no layer{named} is {rule.kind}; there are: {', '.join(kinds)}"

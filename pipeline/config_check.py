"""Whether a config's parts exist and fit together: names, options, widths, teachers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..models import MODELS, source_hash
from ..quant.core import Site, Target
from ..quant.policy import QuantizerChoice
from ..quant.probing import KINDS
from ..quant.quantizers import QUANTIZERS
from ..quant.registry import unknown
from .config import Component, RuleConfig, RunConfig, StageConfig
from .config_options import Mistake, check_options
from .data import DATASETS
from .losses import LOSSES
from .policy import first_last_bits
from .yaml_reader import path_text


def check_parts(run: RunConfig) -> list[str]:
    """Every mistake that can be seen without touching data, as `path: message` lines."""
    errors = _at(("data",), check_options(DATASETS, run.data.name, run.data.options))
    errors += _check_model(run)
    for index, stage in enumerate(run.ladder):
        where = ("ladder", index)
        errors += _check_quantizers(stage, where)
        errors += _check_parents(run, index, stage, where)
        if stage.distill.teacher != "none":
            found = _check_loss(stage)
            errors += _at((*where, "distill"), found)
    return errors


def _check_model(run: RunConfig) -> list[str]:
    errors = []
    if run.model.name in MODELS:
        errors += _at(("model",), check_options(MODELS, run.model.name, run.model.options))
    else:
        try:  # torchvision's names and `package.module:factory`
            source_hash(run.model.name)
        except (ValueError, OSError) as error:
            errors.append(f"model: {error}")
    if run.model.weights is not None and not Path(run.model.weights).is_file():
        errors.append(f"model.weights: no such file: {run.model.weights}")
    first = run.ladder[0] if run.ladder else None
    if first and first.train.epochs == 0 and first.full_precision and run.model.weights is None:
        errors.append(
            "ladder.0.epochs: 0 imports a trained network, and model.weights names none; "
            "give model.weights: FILE, or train for some epochs"
        )
    return errors


def _check_quantizers(stage: StageConfig, where: tuple[Any, ...]) -> list[str]:
    errors = []
    halves: list[tuple[Target, int, Component]] = [
        ("weight", stage.weight_bits, stage.quantizer.weight),
        ("activation", stage.activation_bits, stage.quantizer.activation),
    ]
    for target, bits, choice in halves:
        errors += _at((*where, "quantizer", target), _check_choice(target, bits, choice))
    for number, rule in enumerate(stage.policy.rules):
        at = (*where, "policy", "rules", number)
        errors += _check_rule(rule, halves, at)
    return errors + _check_first_last(stage, where)


def _check_rule(
    rule: RuleConfig, inner: list[tuple[Target, int, Component]], at: tuple[Any, ...]
) -> list[str]:
    errors = []
    if rule.kind is not None and rule.kind not in KINDS:
        errors += _at((*at, "kind"), [("", unknown("kind of layer", rule.kind, KINDS))])
    for target, _, inner_method in inner:
        bits: int | None = getattr(rule, f"{target}_bits")
        own: Component | None = getattr(rule, target)
        if own is not None:  # without a width, the layer's own counts, which the network decides
            errors += _at((*at, target), _check_choice(target, bits or 32, own))
        elif bits is not None and not _check_choice(target, 32, inner_method):
            found = _check_choice(target, bits, inner_method)
            errors += _at((*at, f"{target}_bits"), found)
    return errors


def _check_first_last(stage: StageConfig, where: tuple[Any, ...]) -> list[str]:
    if stage.full_precision:
        return []
    errors = []
    methods: dict[Target, Component] = {
        "weight": stage.policy.first_last_weight,
        "activation": stage.policy.first_last_activation,
    }
    for target, bits in first_last_bits(stage.policy).items():
        # the first layer's input is signed whatever the network
        found = _check_choice(target, bits, methods[target], signed=True)
        errors += _at((*where, "policy", f"first_last_{target}"), found)
    return errors


def _check_choice(
    target: Target, bits: int, choice: Component, *, signed: bool | None = None
) -> list[Mistake]:
    if choice.name == "auto":
        return [(key, "'auto' takes no options; name a quantizer") for key in choice.options]
    errors = _check_method(choice.name, choice.options)
    return errors or _check_width(target, bits, choice, signed=signed)


def _check_method(name: str, options: Mapping[str, Any]) -> list[Mistake]:
    """Of a method, and of that which it wraps."""
    if errors := check_options(QUANTIZERS, name, options):
        return errors
    inner = QUANTIZERS[name].factory.wraps(options)
    if inner is None:
        return []
    found = _check_method(*inner)
    return [(f"options.{key}" if key else "method", text) for key, text in found]


def _check_width(
    target: Target, bits: int, choice: Component, *, signed: bool | None = None
) -> list[Mistake]:
    if bits == 32:
        return []
    # an activation after a ReLU is unsigned, another one signed; the probe tells layer by layer
    signs = [target == "weight", True] if signed is None else [signed]
    chosen = QuantizerChoice(choice.name, choice.options)
    if target not in QUANTIZERS[choice.name].factory.targets:
        targets = " and ".join(sorted(QUANTIZERS[choice.name].factory.targets))
        return [("", f"{choice.name} quantizes {targets} only")]
    errors: list[Mistake] = []
    for sign in signs:
        try:
            chosen.build(Site(target, bits=bits, signed=sign, channels=1))
        except ValueError as error:
            errors.append(("", str(error)))
        else:
            return []
    return errors[:1]


def _check_loss(stage: StageConfig) -> list[Mistake]:
    name, options = stage.distill.loss, stage.distill.options
    if found := check_options(LOSSES, name, options):
        return found
    try:
        LOSSES[name].factory(**options)
    except ValueError as error:
        return [("", str(error))]
    return []


def _check_parents(
    run: RunConfig, index: int, stage: StageConfig, where: tuple[Any, ...]
) -> list[str]:
    errors = []
    has_fp32 = any(s.full_precision for s in run.ladder[:index])
    uses = {"init": stage.init, "distill.teacher": stage.distill.teacher}
    for key, value in uses.items():
        if value == "fp32" and not has_fp32 and not stage.full_precision:
            errors.append(
                f"{path_text(where)}.{key}: 'fp32' needs a rung above it with weight_bits: 32 and "
                "activation_bits: 32"
            )
    return errors


def _at(where: tuple[Any, ...], mistakes: list[Mistake]) -> list[str]:
    return [f"{path_text((*where, key) if key else where)}: {text}" for key, text in mistakes]

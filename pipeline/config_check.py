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
from .config import ModelConfig, RuleConfig, RunConfig, StageConfig
from .config_options import Mistake, check_options
from .config_section import Component
from .data import DATASETS
from .distill_check import distill_mistakes
from .parents import parent_mistakes, parents_of
from .policy import first_last_bits
from .yaml_reader import path_text


def check_parts(run: RunConfig) -> list[str]:
    """Every mistake that can be seen without touching data, as `path: message` lines."""
    errors = _at(("data",), check_options(DATASETS, run.data.name, run.data.options))
    errors += _check_model(run.model, ("model",))
    for index, stage in enumerate(run.ladder):
        where = ("ladder", index)
        errors += _check_quantizers(stage, where)
        if stage.model is not None:
            errors += _check_model(stage.model, (*where, "model"))
        errors += _check_import(run, index, where)
        errors += _check_devices(run, index, where)
        errors += _at(where, parent_mistakes(run, index))
        errors += _at(where, distill_mistakes(run, index))
    return errors


def _check_model(model: ModelConfig, where: tuple[Any, ...]) -> list[str]:
    mistakes: list[Mistake] = []
    if model.name in MODELS:
        mistakes += check_options(MODELS, model.name, model.options)
    else:
        try:  # torchvision's names and `package.module:factory`
            source_hash(model.name)
        except (ValueError, OSError) as error:
            mistakes.append(("", str(error)))
    if model.weights is not None and not Path(model.weights).is_file():
        mistakes.append(("weights", f"no such file: {model.weights}"))
    return _at(where, mistakes)


def _check_import(run: RunConfig, index: int, where: tuple[Any, ...]) -> list[str]:
    """A full-precision rung that is neither trained nor begun from anything is a mistake."""
    stage = run.ladder[index]
    if stage.train.epochs or not stage.full_precision:
        return []
    try:
        starts = parents_of(run, index).init is not None
    except ValueError:
        return []  # said with the parents
    if starts or (run.model_of(stage).weights is not None and stage.init != "scratch"):
        return []
    at = "model" if stage.model is None else path_text((*where, "model"))
    text = f"0 imports a trained network, and {at}.weights names none; give {at}.weights: FILE"
    if stage.init == "scratch":
        text = "0 leaves the fresh weights of init: scratch untrained; take init out"
    return [f"{path_text(where)}.epochs: {text}, or train for some epochs"]


def _check_devices(run: RunConfig, index: int, where: tuple[Any, ...]) -> list[str]:
    devices, batch_size = run.ladder[index].train.devices, run.data.batch_size
    if devices == 1 or batch_size >= 2 * devices:
        return []
    text = f"{devices} of them need a data.batch_size of at least {2 * devices}, 2 images each"
    return [f"{path_text((*where, 'train', 'devices'))}: {text}; it is {batch_size}"]


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


def _at(where: tuple[Any, ...], mistakes: list[Mistake]) -> list[str]:
    return [f"{path_text((*where, key) if key else where)}: {text}" for key, text in mistakes]

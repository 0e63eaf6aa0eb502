"""From a config to its stages: what each one is, what it stands on, and its key.

Pure: nothing runs and nothing is written. A key is the hash of everything that determines a
stage's result, so finished work is found again and a change reruns only what follows from it.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from ..models import source_hash
from ..quant.quantizers import QUANTIZERS
from .config import ModelConfig, PolicyConfig, RunConfig, StageConfig, TrainConfig
from .config_distill import DistillConfig, constant
from .config_section import Component, is_set
from .data import DATASETS
from .data.fingerprint import fingerprint
from .errors import ConfigError
from .losses import FEATURE_LOSSES, LOSSES
from .parents import Parents, parents_of
from .policy import choose_quantizer, first_last_bits, policy_of
from .spec import Plan, PlannedStage, StageSpec

# Raised when the numbers that the training recipe gives change: batch order, schedules,
# calibration, hand-over, re-estimation.
RECIPE_VERSION = 4


def make_plan(config: RunConfig) -> Plan:
    """The stages of a ladder with all keys known; of an automatic one see `plan_so_far`.

    Raises:
        ConfigError: the data set is not there, or a file that a key depends on cannot be read.
    """
    data = _data(config)
    hashed = cache(_file_hash)
    planned: list[PlannedStage] = []
    for position, stage in enumerate(config.ladder):
        model, parents = config.model_of(stage), parents_of(config, position)
        teachers = len(parents.teachers)
        begins_from_file = parents.init is None and stage.init != "scratch"
        spec = StageSpec(
            kind="train",
            options={
                "recipe": RECIPE_VERSION,
                "seed": config.seed,
                "data": data,
                "model": _model(model),
                "weights": hashed(model.weights) if begins_from_file else None,
                "key_map": model.key_map,
                "stage": _determining(stage, teachers=1 if parents.chooses else teachers),
                "versions": _versions(stage, distilled=teachers > 0),
            },
            parents={role: planned[above].key for role, above in parents.roles().items()},
        )
        planned.append(
            PlannedStage(
                name=stage.name,
                position=position,
                spec=spec,
                teacher=_teacher_names(config, parents),
                parent=None if parents.init is None else config.ladder[parents.init].name,
            )
        )
    return Plan(config.name, tuple(planned), config)


def _teacher_names(config: RunConfig, parents: Parents) -> str | None:
    names = ", ".join(config.ladder[position].name for position in parents.teachers)
    return f"best of {names}" if parents.chooses else names or None


def _determining(stage: StageConfig, *, teachers: int) -> dict[str, Any]:
    """A stage's settings without those that have no effect on it."""
    values = stage.model_dump(mode="json", exclude={"name", "init", "model"})
    values.pop("distill")
    if teachers:
        values["distill"] = _distillation(stage.distill, teachers)
    bins = stage.bin_regularization
    used = (
        bins.weight or bins.activation or bins.freeze_weight_scale or bins.freeze_activation_scale
    )
    if stage.full_precision or not used:
        values.pop("bin_regularization")
    values["oscillation"] = _oscillation(stage)
    values["train"].pop("compile")  # decided when the stage begins, as the machine has it
    if stage.train.devices == 1 or stage.train.epochs == 0:
        values["train"].pop("devices")  # with several, batch norm counts parts of a batch
    if not is_set(stage.train, "precision"):
        values["train"].pop("precision")
    averaging = _averaging(stage.train)
    values["train"].pop("averaging")
    values["train"] |= {"averaging": averaging} if averaging else {}
    if stage.full_precision:
        values.pop("quantizer")
        values.pop("policy")
        values["train"].pop("quantizer_parameters")
        values["train"].pop("calibration_batches")
    else:
        values["quantizer"] = {
            "weight": _chosen(stage.quantizer.weight, stage.weight_bits),
            "activation": _chosen(stage.quantizer.activation, stage.activation_bits),
        }
        values["policy"] = _policy(stage.policy)
        if stage.train.quantizer_parameters.optimizer == stage.train.optimizer.name:
            values["train"]["quantizer_parameters"]["optimizer"] = None
    return values


def _distillation(distill: DistillConfig, teachers: int) -> dict[str, Any]:
    """The losses between teachers and student; who the teachers are is said by the parents."""
    values = distill.model_dump(mode="json", exclude={"teacher"})
    values["drop"] = min(distill.drop, teachers - 1)  # one is always kept
    if values["drop"] == 0:
        values.pop("drop")
    for cost in ("teacher_precision", "fold_batch_norm", "cache_teacher"):
        if not is_set(distill, cost):
            values.pop(cost)
    if (weight := constant(distill.weight)) is not None:
        values["weight"] = weight
    if not distill.follows_logits:
        values = {k: v for k, v in values.items() if k not in ("loss", *distill.options)}
    features = distill.features
    if features is None or not distill.follows_features:
        values.pop("features")
    else:
        values["features"]["teacher_layers"] = list(features.teacher_layers or features.layers)
        if (weight := constant(features.weight)) is not None:
            values["features"]["weight"] = weight
    return values


def _policy(policy: PolicyConfig) -> dict[str, Any]:
    """A policy with the widths and methods of first and last layer as they come out."""
    edges = {
        half: {"bits": bits, **_chosen(getattr(policy, f"first_last_{half}"), bits)}
        for half, bits in first_last_bits(policy).items()
    }
    rest = policy.model_dump(mode="json", include={"shortcut", "rules"})
    return {"first_last": edges, **rest}


def _oscillation(stage: StageConfig) -> dict[str, Any]:
    """What of oscillation control is on; tracking needs weights that are narrow enough."""
    own, policy = stage.oscillation, stage.policy
    if stage.full_precision:
        return {}
    widths: list[Any] = [stage.weight_bits, first_last_bits(policy)["weight"], policy.shortcut]
    widths += [rule.weight_bits for rule in policy.rules]
    tracks = own.tracks and any(isinstance(b, int) and b <= own.max_bits for b in widths)
    used = {"max_bits", "momentum"} if tracks else set()
    used |= {"freezing"} if tracks and own.freezes else set()
    used |= {"dampening"} if own.dampens else set()
    return own.model_dump(mode="json", include=used)


def _averaging(train: TrainConfig) -> dict[str, Any]:
    """The average of the weights with the settings that its kind has."""
    if train.averaging.name == "none" or train.epochs == 0:
        return {}
    own = {"ema": "decay", "tail": "start"}[train.averaging.name]
    return train.averaging.model_dump(mode="json", include={"name", own})


def _chosen(choice: Component, bits: int) -> dict[str, Any]:
    return choose_quantizer(choice, bits).model_dump(mode="json")


def _versions(stage: StageConfig, *, distilled: bool) -> dict[str, int]:
    versions = {"loss cross_entropy": LOSSES["cross_entropy"].version}
    if distilled:
        if stage.distill.follows_logits:
            versions[f"loss {stage.distill.loss}"] = LOSSES[stage.distill.loss].version
        if stage.distill.features is not None and stage.distill.follows_features:
            name = stage.distill.features.name
            versions[f"feature loss {name}"] = FEATURE_LOSSES[name].version
    if not stage.full_precision:
        policy = policy_of(stage)
        first_last = (policy.first_last_weight, policy.first_last_activation)
        by_rule = (choice for rule in policy.rules for choice in (rule.weight, rule.activation))
        for choice in (policy.weight, policy.activation, *first_last, *by_rule):
            for name in choice.methods if choice is not None else ():
                versions[f"quantizer {name}"] = QUANTIZERS[name].version
    return versions


def _data(config: RunConfig) -> dict[str, Any]:
    data = config.data
    try:  # of the content and of every option that changes a number
        content = fingerprint(data.name, data.options)
    except (ValueError, OSError) as error:
        raise ConfigError([f"data: {error}"]) from None
    return {
        "name": data.name,
        "version": DATASETS[data.name].version,
        "batch_size": data.batch_size,
        "fingerprint": content,
    }


def _model(model: ModelConfig) -> dict[str, Any]:
    return {"name": model.name, "options": model.options, "source": source_hash(model.name)}


def _file_hash(path: str | None) -> str | None:
    if path is None:
        return None
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

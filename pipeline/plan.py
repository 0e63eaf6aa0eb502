"""From a config to its stages: what each one is, what it stands on, and its key.

Pure: nothing runs and nothing is written. A key is the hash of everything that determines a
stage's result, so finished work is found again and a change reruns only what follows from it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from ..models import source_hash
from ..quant.quantizers import QUANTIZERS
from .config import Component, PolicyConfig, RunConfig, StageConfig
from .data import DATASETS
from .data.fingerprint import fingerprint
from .errors import ConfigError
from .losses import LOSSES
from .policy import choose_quantizer, first_last_bits, policy_of
from .spec import Plan, PlannedStage, StageSpec

# Raised when the numbers that the training recipe gives change: batch order, schedules,
# calibration, hand-over, re-estimation.
RECIPE_VERSION = 1


def make_plan(config: RunConfig) -> Plan:
    """The stages of a ladder with all keys known.

    Raises:
        ConfigError: the data set is not there, or a file that a key depends on cannot be read.
    """
    data = _data(config)
    model = _model(config)
    weights = _file_hash(config.model.weights)
    planned: list[PlannedStage] = []
    for position, stage in enumerate(config.ladder):
        previous = planned[-1] if planned else None
        fp32 = next((p for p in planned if config.ladder[p.position].full_precision), None)
        rungs = {"previous": previous, "fp32": fp32}
        init = rungs.get(stage.init)
        teacher = rungs.get(stage.distill.teacher)
        if stage.train.epochs == 0 or stage.distill.weight == 0:
            teacher = None  # it would change nothing
        spec = StageSpec(
            kind="train",
            options={
                "recipe": RECIPE_VERSION,
                "seed": config.seed,
                "data": data,
                "model": model,
                "weights": weights if init is None and stage.init != "scratch" else None,
                "key_map": config.model.key_map,
                "stage": _determining(stage, distilled=teacher is not None),
                "versions": _versions(stage, distilled=teacher is not None),
            },
            parents={
                role: rung.key for role, rung in (("init", init), ("teacher", teacher)) if rung
            },
        )
        planned.append(
            PlannedStage(
                name=stage.name,
                position=position,
                spec=spec,
                teacher=teacher.name if teacher else None,
                parent=init.name if init else None,
            )
        )
    return Plan(config.name, tuple(planned), config)


def _determining(stage: StageConfig, *, distilled: bool) -> dict[str, Any]:
    """A stage's settings without those that have no effect on it."""
    values = stage.model_dump(mode="json", exclude={"name", "init"})
    values["distill"].pop("teacher")
    if not distilled:
        values.pop("distill")
    bins = stage.bin_regularization
    used = (
        bins.weight or bins.activation or bins.freeze_weight_scale or bins.freeze_activation_scale
    )
    if stage.full_precision or not used:
        values.pop("bin_regularization")
    values["oscillation"] = _oscillation(stage)
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


def _chosen(choice: Component, bits: int) -> dict[str, Any]:
    return choose_quantizer(choice, bits).model_dump(mode="json")


def _versions(stage: StageConfig, *, distilled: bool) -> dict[str, int]:
    versions = {"loss cross_entropy": LOSSES["cross_entropy"].version}
    if distilled:
        versions[f"loss {stage.distill.loss}"] = LOSSES[stage.distill.loss].version
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


def _model(config: RunConfig) -> dict[str, Any]:
    name = config.model.name
    return {"name": name, "options": config.model.options, "source": source_hash(name)}


def _file_hash(path: str | None) -> str | None:
    if path is None:
        return None
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

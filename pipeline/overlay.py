"""What a rung or an arm says, over what was said above it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .config import (
    AveragingConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
)
from .config_distill import DistillConfig

# what optimizers, schedules, distillation losses and feature losses have in common
_SHARED = (
    *("lr", "weight_decay", "warmup_epochs", "final", "teacher", "drop", "weight", "features"),
    *("layers", "teacher_layers", "teacher_precision", "fold_batch_norm", "cache_teacher"),
    "batch_size",
)
# the part that a section has where it names none
_NAMES = {
    "optimizer": OptimizerConfig.model_fields["name"].default,
    "schedule": ScheduleConfig.model_fields["name"].default,
    "averaging": AveragingConfig.model_fields["name"].default,
    "data": DataConfig.model_fields["name"].default,
    "model": ModelConfig.model_fields["name"].default,
    "distill": DistillConfig.model_fields["loss"].default,
    **dict.fromkeys(("weight", "activation"), "auto"),
}


def overlay(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """One mapping over another, key by key; a part with another name takes no old options."""
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        if not (isinstance(old, dict) and isinstance(value, dict)):
            merged[key] = value
        elif any(k in value and value[k] != old.get(k, _NAMES.get(key)) for k in ("name", "loss")):
            # another part: of the old one's settings only those that every such part has
            merged[key] = {k: v for k, v in old.items() if k in _SHARED} | value
        else:
            merged[key] = overlay(old, value)
    return merged

"""What a stage is given and what it gives back, and the registry of kinds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...quant.registry import Registry
from ..config import StageConfig
from ..data import DataBundle
from ..fit import Surroundings
from ..record import StageRecord
from ..spec import StageSpec
from ..store import Store


@dataclass(frozen=True)
class StageContext:
    """A stage's inputs, opened.

    Attributes:
        parents: role -> the committed stage that plays it.
        resume: the checkpoint of an interrupted run of the same stage, or None.
        weights: file of FP32 weights to start from, or None.
    """

    spec: StageSpec
    stage: StageConfig
    store: Store
    data: DataBundle
    parents: Mapping[str, StageRecord]
    device: torch.device
    around: Surroundings
    resume: dict[str, Any] | None
    weights: Path | None


@dataclass(frozen=True)
class StageOutput:
    """What the stage adds to its record; its files lie in the working folder."""

    files: tuple[str, ...]
    network: Mapping[str, Any]
    metrics: Mapping[str, Any]


STAGES: Registry[Callable[[StageContext], StageOutput]] = Registry("stage kind")

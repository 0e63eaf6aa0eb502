"""What a stage is, and its key; light to import, since every command needs it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import RunConfig

KEY_LENGTH = 20  # hex digits: 80 bits


@dataclass(frozen=True)
class StageSpec:
    """A unit of work: all that determines its result.

    Attributes:
        kind: name in the stage registry.
        options: JSON values.
        parents: role ("init", "teacher") -> key of the stage that plays it.
    """

    kind: str
    options: Mapping[str, Any]
    parents: Mapping[str, str]

    @cached_property
    def key(self) -> str:
        """Name of the stage's folder: the head of a sha256."""
        return digest({"kind": self.kind, "options": self.options, "parents": self.parents})

    def as_dict(self) -> dict[str, Any]:
        """The spec as JSON values."""
        return {"kind": self.kind, "options": dict(self.options), "parents": dict(self.parents)}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> StageSpec:
        """The inverse of `as_dict`."""
        return cls(raw["kind"], raw["options"], raw["parents"])


@dataclass(frozen=True)
class PlannedStage:
    """A stage's place in one ladder. Neither name nor position enters its key."""

    name: str
    position: int
    spec: StageSpec
    teacher: str | None  # names of other rungs, for people
    parent: str | None

    @property
    def key(self) -> str:
        """The spec's key."""
        return self.spec.key


@dataclass(frozen=True)
class Plan:
    """A ladder ready to run: its stages in order, parents before children."""

    name: str
    stages: tuple[PlannedStage, ...]
    config: RunConfig

    @property
    def run(self) -> str:
        """The run's id: its name and 8 hex digits of its plan."""
        stages = [[stage.name, stage.key] for stage in self.stages]
        return f"{self.name}-{digest(stages)[:8]}"


def digest(value: Any) -> str:
    """The head of the sha256 of a JSON value in canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]

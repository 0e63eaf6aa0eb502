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
        parents: role -> key of the stage that plays it. Roles are "init"; "teacher", or of several
            "teacher-0" and so on in ladder order; "candidate-0" and so on where the stage is to
            choose its teacher among them.
    """

    kind: str
    options: Mapping[str, Any]
    parents: Mapping[str, str]

    @cached_property
    def key(self) -> str:
        """Name of the stage's folder: the head of a sha256."""
        return digest({"kind": self.kind, "options": self.options, "parents": self.parents})

    @property
    def global_seed(self) -> int:
        """What the stage seeds torch's global generator with: foreign networks draw from it."""
        return int(self.key[:15], 16)

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
    teacher: str | None  # names of other rungs, for people: "fp32, w8a8", "best of fp32, w8a8"
    parent: str | None

    @property
    def key(self) -> str:
        """The spec's key."""
        return self.spec.key


@dataclass(frozen=True)
class Plan:
    """A ladder ready to run: its stages in order, parents before children.

    Attributes:
        identity: what the run's id is the digest of, where it is not the stages: those of an
            automatic ladder are not all known when it begins.
        complete: whether no stage will follow.
        notes: of an automatic ladder, for each stage why it is run and what came of it.
    """

    name: str
    stages: tuple[PlannedStage, ...]
    config: RunConfig
    identity: Any = None
    complete: bool = True
    notes: tuple[str, ...] = ()

    @property
    def run(self) -> str:
        """The run's id: its name and 8 hex digits of its plan."""
        stages = [[stage.name, stage.key] for stage in self.stages]
        return f"{self.name}-{digest(self.identity or stages)[:8]}"


def model_text(model: Mapping[str, Any]) -> str:
    """A network for people: its name, and its options where it has any."""
    options = ", ".join(f"{key}={value}" for key, value in model["options"].items())
    return f"{model['name']}({options})" if options else str(model["name"])


def digest(value: Any) -> str:
    """The head of the sha256 of a JSON value in canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]

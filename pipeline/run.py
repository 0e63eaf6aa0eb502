"""A registered ladder, as `run.json` holds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .derived import look_spec, pack_spec, teacher_keys
from .spec import Plan


@dataclass(frozen=True)
class Run:
    """A ladder that was begun.

    Attributes:
        run: its id.
        name: of its config.
        created: when it was first begun, UTC, ISO 8601.
        config: the whole config with its defaults, as JSON values.
        stages: in ladder order, each with name, key, spec, teacher and parent.
    """

    run: str
    name: str
    created: str
    config: Mapping[str, Any]
    stages: tuple[Mapping[str, Any], ...]

    @classmethod
    def of(cls, plan: Plan, *, created: str) -> Run:
        """The run of a plan."""
        stages = tuple(
            {
                "name": stage.name,
                "key": stage.key,
                "spec": stage.spec.as_dict(),
                "teacher": stage.teacher,
                "parent": stage.parent,
            }
            for stage in plan.stages
        )
        return cls(plan.run, plan.name, created, plan.config.model_dump(mode="json"), stages)

    @property
    def trained(self) -> list[str]:
        """The keys of its stages."""
        return [str(stage["key"]) for stage in self.stages]

    @property
    def packed(self) -> list[str]:
        """The keys of the stages that pack them."""
        return [pack_spec(key).key for key in self.trained]

    @property
    def looks(self) -> list[str]:
        """The keys of the stages that look inside them; not all need be there."""
        parents = [stage["spec"]["parents"] for stage in self.stages]
        pairs = zip(self.trained, parents, strict=True)
        return [look_spec(key, teacher_keys(above)).key for key, above in pairs]

    def named(self, key: str) -> str:
        """The name of the stage that has a key; the key itself where none has."""
        return next((str(s["name"]) for s in self.stages if s["key"] == key), key)

    def begins_with(self, other: Run) -> bool:
        """Whether the stages of another are the first ones of this."""
        pairs = zip(self.stages, other.stages, strict=False)
        alike = all(own["key"] == its["key"] for own, its in pairs)
        return alike and len(self.stages) >= len(other.stages)

    def as_dict(self) -> dict[str, Any]:
        """The run as JSON values."""
        return {**self.__dict__, "stages": [dict(stage) for stage in self.stages]}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Run:
        """The inverse of `as_dict`; keys that it does not know are left out.

        Raises:
            KeyError: something is missing.
        """
        fields = {name: raw[name] for name in cls.__dataclass_fields__}
        return cls(**fields | {"stages": tuple(dict(stage) for stage in raw["stages"])})

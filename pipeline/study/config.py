"""What a study's YAML file may say: a base, its changes, arms, families of comparisons."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from ..config_load import validated
from ..config_section import Section

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,30}$")]  # 31 letters at most
Control = Literal["equal_compute", "restarts"]


class Changes(Section):
    """What is changed in a ladder's config, in this order: `set`, `ladder`, `rungs`, `only`."""

    set_: dict[str, Any] = Field(default={}, alias="set")  # merged over what stands above the rungs
    ladder: list[str | dict[str, Any]] | None = None  # instead of the rungs; a name: one of them
    rungs: dict[str, dict[str, Any]] = Field(default={})  # by rung: merged over its own words
    only: tuple[str, ...] | None = Field(default=None, strict=False)  # the rungs that stay


class ArmConfig(Changes):
    """An arm: the base with changes, or a built-in control of another arm."""

    control: Control | None = None
    of: str | None = None  # the arm that it controls
    stage: str | None = None  # the rung of that arm that it stands for; the last by default


class ComparisonConfig(Section):
    """One arm against another, each at a stage."""

    arm: str
    against: str
    stage: str | None = None
    against_stage: str | None = None  # where the other arm's stage has another name


class ChoiceConfig(Section):
    """Arms of which one is chosen, on validation."""

    among: tuple[str, ...] = Field(strict=False)
    stage: str | None = None


class StudyConfig(Changes):
    """The study's own settings; what stands in `set` and the like is changed for every arm."""

    name: Name
    base: str | dict[str, Any]
    seeds: int | list[int] = 5  # so many from 0 on, or a list
    folds: Annotated[int, Field(ge=2)] | None = None
    arms: dict[Name, Any]
    stage: str | None = None  # that comparisons are about; the last rung of each arm by default
    families: dict[str, Any] = Field(default={})
    choose: Any = None


class Sections(NamedTuple):
    """A study's parts, each checked by itself."""

    study: StudyConfig
    arms: dict[str, ArmConfig]
    families: dict[str, list[ComparisonConfig]]
    choose: ChoiceConfig | None
    errors: list[str]


def read_sections(raw: Mapping[str, Any]) -> Sections:
    """The parts of a study, defaults in place of what is wrong in them, and all mistakes."""
    stand_ins = {"name": "unnamed", "base": {}, "arms": {}}
    study, errors = validated(StudyConfig, raw, (), stand_ins)
    arms: dict[str, ArmConfig] = {}
    for name, value in study.arms.items():
        words = {} if value is None else value  # `ladder:` with nothing behind it
        arms[name], found = _section(ArmConfig, words, ("arms", name), {})
        errors += found
    families: dict[str, list[ComparisonConfig]] = {}
    for family, listed in study.families.items():
        if not isinstance(listed, list) or not listed:
            errors.append(
                f"families.{family}: must be a list of comparisons, such as "
                "{arm: ladder, against: direct}"
            )
            continue
        for number, value in enumerate(listed):
            where = ("families", family, number)
            comparison, found = _section(ComparisonConfig, value, where, {"arm": "", "against": ""})
            errors += found
            if not found:
                families.setdefault(family, []).append(comparison)
    choose = None
    if study.choose is not None:
        choose, found = _section(ChoiceConfig, study.choose, ("choose",), {"among": ()})
        errors += found
    return Sections(study, arms, families, choose, errors)


def _section(kind: Any, value: Any, where: tuple[Any, ...], stand_ins: dict[str, Any]) -> Any:
    if not isinstance(value, dict):
        mistake = f"{'.'.join(map(str, where))}: must be a mapping (`key: value`), not {value!r}"
        return kind.model_validate(stand_ins), [mistake]
    return validated(kind, value, where, stand_ins)

"""What a study asks of its arms: families of comparisons, and a choice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...quant.registry import unknown
from ..config import RunConfig
from .config import ComparisonConfig, Sections


@dataclass(frozen=True)
class Comparison:
    """One arm's stage against another's."""

    family: str
    arm: str
    stage: str
    against: str
    against_stage: str


@dataclass(frozen=True)
class Candidates:
    """The stages, arm by arm, of which one is chosen on validation."""

    stages: Mapping[str, str]  # arm -> stage


def comparisons_of(
    sections: Sections, configs: Mapping[str, RunConfig]
) -> tuple[tuple[Comparison, ...], list[str]]:
    """The comparisons of all families in order, without those with mistakes; the mistakes."""
    found: dict[Comparison, None] = {}
    errors = []
    for family, listed in sections.families.items():
        for number, words in enumerate(listed):
            comparison, mistakes = _comparison(family, words, sections, configs)
            where = f"families.{family}.{number}"
            errors += [f"{where}.{mistake}" for mistake in mistakes]
            if comparison in found:
                errors.append(f"{where}: stands there twice")
            if comparison is not None:
                found[comparison] = None
    return tuple(found), errors


def _comparison(
    family: str, words: ComparisonConfig, sections: Sections, configs: Mapping[str, RunConfig]
) -> tuple[Comparison | None, list[str]]:
    stage = words.stage or sections.study.stage
    sides = {
        "arm": (words.arm, "stage", stage),
        "against": (words.against, "against_stage", words.against_stage or stage),
    }
    errors = [
        f"{key}: {unknown('arm', arm, sections.arms)}"
        for key, (arm, _, _) in sides.items()
        if arm not in sections.arms
    ]
    if words.arm == words.against:
        errors.append(f"against: {words.against!r} is compared with itself")
    stages = []
    for arm, key, wanted in sides.values():
        if arm in configs:
            stages.append(wanted or configs[arm].ladder[-1].name)
            errors += [f"{key}: {why}" for why in _no_stage(arm, configs[arm], stages[-1])]
    if errors or len(stages) < 2:
        return None, errors
    return Comparison(family, words.arm, stages[0], words.against, stages[1]), []


def candidates_of(
    sections: Sections, configs: Mapping[str, RunConfig]
) -> tuple[Candidates | None, list[str]]:
    """The arms of which one is chosen, if one is; and mistakes."""
    words = sections.choose
    if words is None:
        return None, []
    known = sections.arms
    errors = [
        f"choose.among: {unknown('arm', arm, known)}" for arm in words.among if arm not in known
    ]
    if len(set(words.among)) < max(len(words.among), 2):
        errors.append("choose.among: give at least two arms, each once")
    stages = {}
    for arm in words.among:
        if arm in configs:
            stages[arm] = words.stage or sections.study.stage or configs[arm].ladder[-1].name
            errors += [f"choose.stage: {why}" for why in _no_stage(arm, configs[arm], stages[arm])]
    return Candidates(stages), errors


def _no_stage(arm: str, config: RunConfig, stage: str) -> list[str]:
    names = [rung.name for rung in config.ladder]
    return [] if stage in names else [unknown(f"rung of {arm!r}", stage, names)]

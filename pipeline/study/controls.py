"""The built-in controls, without which no claim about a ladder stands.

A ladder of five rungs trains longer than one rung does, and each rung is a fresh start of the
learning rate. `equal_compute` gives one rung all those epochs; `restarts` gives it the fresh
starts too. Both start where the ladder does, from its full-precision network, have the settings
of the rung that they stand for (its learning rate and weight decay too), and have no teacher
unless one is set. Equal are the student's epochs; the passes of teachers are counted beside them.
"""

from __future__ import annotations

from itertools import takewhile
from typing import Any

from ...quant.registry import unknown
from ..config import RunConfig, StageConfig
from ..config_load import INHERITED, merge_rung
from ..errors import ConfigError
from .changes import change_rungs, long_forms, merge_top, misplaced, parse_named
from .config import ArmConfig
from .lineage import lineage, start


def control(of: RunConfig, arm: ArmConfig, where: str) -> RunConfig:
    """The control of a ladder.

    What `set` of the arm says goes to the control's own rungs, over the settings that they have
    from the rung they stand for; their epochs stay.

    Args:
        of: the ladder.
        where: the arm's YAML path.

    Raises:
        ConfigError: one line for each mistake, with its YAML path.
    """
    errors = [
        f"{where}.{key}: a control's rungs follow from the arm {arm.of!r}; leave it out"
        for key in ("only", "ladder")
        if getattr(arm, key) is not None
    ]
    errors += misplaced(arm, where) + _epochs_that_are_set(arm, where)
    names = [stage.name for stage in of.ladder]
    stage = arm.stage or names[-1]
    if stage not in names:
        raise ConfigError(
            [*errors, f"{where}.stage: {unknown(f'rung of {arm.of!r}', stage, names)}"]
        )
    position = names.index(stage)
    if of.ladder[position].full_precision:
        raise ConfigError(
            [
                *errors,
                f"{where}.stage: {stage!r} is full precision; a control is for a quantized rung",
            ]
        )
    above, steps = _parts(of, position)
    errors += _other_networks(of, steps, f"{where}.stage")
    own_words = long_forms({k: v for k, v in arm.set_.items() if k in INHERITED})
    own = [merge_rung(rung, own_words) for rung in _own(arm, of, steps)]
    own, found = change_rungs(own, arm.rungs, f"{where}.rungs")
    errors += found
    if errors:
        raise ConfigError(errors)
    top = of.model_dump(mode="json", include={"name", "data", "model", "runtime"})
    top = merge_top(top, {k: v for k, v in arm.set_.items() if k not in INHERITED})
    try:
        return parse_named({**top, "ladder": [*map(_spelled, above), *own]})[1]
    except ConfigError as error:
        raise ConfigError([f"{where}: {line}" for line in error.errors]) from None


def _parts(of: RunConfig, position: int) -> tuple[list[StageConfig], list[int]]:
    """What a control takes over: the full-precision rungs, and the steps that it stands for.

    Steps are those quantized rungs without which the one at `position` would be another one:
    where each width starts from FP32 without a teacher, that is this rung alone.
    """
    fp32, _ = start(of, position)
    kept = {n for n, _ in takewhile(lambda at: at[1].full_precision, enumerate(of.ladder))}
    kept |= set() if fp32 is None else set(lineage(of, fp32))
    steps = [n for n in lineage(of, position) if n not in kept and not of.ladder[n].full_precision]
    return [of.ladder[n] for n in sorted(kept)], steps


def _other_networks(of: RunConfig, steps: list[int], where: str) -> list[str]:
    target = of.model_of(of.ladder[steps[-1]])
    other = [of.ladder[n] for n in steps if not target.same_network(of.model_of(of.ladder[n]))]
    if not other:
        return []
    names = ", ".join(rung.name for rung in other)
    return [
        f"{where}: rests on quantized rungs of another network ({names}), whose epochs do not "
        "cost the same; write the control out as an arm of its own"
    ]


def _own(arm: ArmConfig, of: RunConfig, steps: list[int]) -> list[dict[str, Any]]:
    """The control's quantized rungs: the last of the steps, for as long as all of them."""
    target = of.ladder[steps[-1]]
    fp32, first = start(of, steps[-1])
    begin = of.ladder[first].init if fp32 is None else of.ladder[fp32].name
    trained = [of.ladder[n].train.epochs for n in steps]
    epochs = [count for count in trained if count] or [0]
    if arm.control == "equal_compute":
        epochs = [sum(epochs)]
    parts = [f"{target.name}-part-{n}" for n in range(1, len(epochs))] + [target.name]
    found = []
    for number, (name, count) in enumerate(zip(parts, epochs, strict=True)):
        rung = _spelled(target)
        rung |= {"name": name, "init": "previous" if number else begin}
        rung["train"] |= {"epochs": count}
        rung["distill"] |= {"teacher": "none", "drop": 0, "features": None}
        found.append(rung)
    return found


def _spelled(rung: StageConfig) -> dict[str, Any]:
    """A rung with all its settings as its own words."""
    return rung.model_dump(mode="json")


def _epochs_that_are_set(arm: ArmConfig, where: str) -> list[str]:
    why = "the epochs of a control are those of the arm that it controls; leave them out"
    places = {"set": arm.set_, **{f"rungs.{name}": rung for name, rung in arm.rungs.items()}}
    errors = []
    for place, words in places.items():
        train = words.get("train")
        if isinstance(train, dict) and "epochs" in train:
            errors.append(f"{where}.{place}.train.epochs: {why}")
        if place != "set" and "epochs" in words:
            errors.append(f"{where}.{place}.epochs: {why}")
    return errors

"""The built-in controls, without which no claim about a ladder stands.

A ladder of five rungs trains longer than one rung does, and each rung is a fresh start of the
learning rate. `equal_compute` gives one rung all those epochs; `restarts` gives it the fresh
starts too. Both start from the ladder's full-precision network and have no teacher unless set.
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
    rungs = of.ladder[: names.index(stage) + 1]
    if rungs[-1].full_precision:
        raise ConfigError(
            [
                *errors,
                f"{where}.stage: {stage!r} is full precision; a control is for a quantized rung",
            ]
        )
    own_words = long_forms({k: v for k, v in arm.set_.items() if k in INHERITED})
    above = [_spelled(rung) for rung in takewhile(lambda rung: rung.full_precision, rungs)]
    own = [merge_rung(rung, own_words) for rung in _own(arm, rungs, fp32=bool(above))]
    own, found = change_rungs(own, arm.rungs, f"{where}.rungs")
    errors += found
    if errors:
        raise ConfigError(errors)
    top = of.model_dump(mode="json", include={"name", "data", "model", "runtime"})
    top = merge_top(top, {k: v for k, v in arm.set_.items() if k not in INHERITED})
    try:
        return parse_named({**top, "ladder": [*above, *own]})[1]
    except ConfigError as error:
        raise ConfigError([f"{where}: {line}" for line in error.errors]) from None


def _own(arm: ArmConfig, rungs: tuple[StageConfig, ...], *, fp32: bool) -> list[dict[str, Any]]:
    """The control's quantized rungs: the last of `rungs`, for as long as all of them."""
    steps = [rung for rung in rungs if not rung.full_precision]
    target = steps[-1]
    epochs = [rung.train.epochs for rung in steps if rung.train.epochs] or [0]
    if arm.control == "equal_compute":
        epochs = [sum(epochs)]
    first = "fp32" if fp32 else steps[0].init
    parts = [f"{target.name}-part-{n}" for n in range(1, len(epochs))] + [target.name]
    found = []
    for number, (name, count) in enumerate(zip(parts, epochs, strict=True)):
        rung = _spelled(target)
        rung |= {"name": name, "init": "previous" if number else first}
        rung["train"] |= {"epochs": count}
        rung["distill"] |= {"teacher": "none", "drop": 0}
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

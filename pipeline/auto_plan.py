"""The plan of a ladder as far as it is known: an automatic one's depends on its records."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from .auto_ladder import FP32, Rung, course, label, way_down
from .config import AutoConfig, RunConfig, StageConfig
from .parents import named_teachers
from .plan import make_plan
from .record import StageRecord
from .spec import Plan


def plan_so_far(config: RunConfig, find: Callable[[str], StageRecord | None]) -> Plan:
    """All stages that have records and the one that comes next; of a list of rungs, all of them.

    Pure in the config and the records. The stages are those that the same rungs have in a list.

    Args:
        find: gives the record of a stage's key, if there is one.

    Raises:
        ConfigError: see `make_plan`.
    """
    if config.auto is None:
        return make_plan(config)
    val_top1: list[float] = []
    while True:
        found = course(config.auto, val_top1)
        stages = tuple(_stage(config.auto, rung) for rung in found.rungs)
        plan = make_plan(config.model_copy(update={"ladder": stages}))
        record = find(plan.stages[-1].key) if found.end is None else None
        if record is None:
            break
        val_top1.append(record.metrics["val_top1"])
    rules = config.auto.model_dump(mode="json", exclude={"rungs"}) | {"step": config.auto.step}
    possible = [[stage.name, stage.key] for stage in make_plan(every_rung(config)).stages]
    identity = {"rules": rules, "rungs": possible}
    return replace(plan, identity=identity, complete=found.end is not None, notes=found.notes)


def every_rung(config: RunConfig) -> RunConfig:
    """The config with every rung that its ladder may come to."""
    if config.auto is None:
        return config
    return config.model_copy(update={"ladder": tuple(config.auto.rungs.values())})


def teachers_that_may_be_missing(auto: AutoConfig, rungs: Sequence[StageConfig]) -> list[str]:
    """Mistakes in `ladder.N`: a teacher given by name that only comes where a step loses much.

    Args:
        rungs: all that the ladder may come to.
    """
    may, sure = {stage.name for stage in rungs}, [label(w) for w in (FP32, *way_down(auto))]
    return [
        f"ladder.{index}.distill.teacher: {name!r} may not come, for it is only put between where "
        f"a step loses too much; those that always come are {', '.join(sure)}"
        for index, stage in enumerate(rungs)
        for name in named_teachers(stage)
        if name in may and name not in sure
    ]


def said_of_rungs(errors: Sequence[str], names: Sequence[str]) -> list[str]:
    """Mistakes in `ladder.N` as those of `auto.rungs.NAME`; what several have is said once."""
    said: dict[str, str] = {}
    for error in errors:
        found = re.match(r"ladder\.(\d+)(.*)", error, flags=re.DOTALL)
        own = found[2] if found else f".{error}"
        said.setdefault(own, f"auto.rungs.{names[int(found[1])]}{own}" if found else error)
    return list(said.values())


def _stage(auto: AutoConfig, rung: Rung) -> StageConfig:
    """A rung's settings; its parents are rungs that were kept, but `best` is of all that ran."""
    stage = auto.rungs[label(rung.widths)]
    if not rung.kept:
        return stage
    wanted = stage.distill.teacher
    teacher: str | tuple[str, ...]
    if wanted == "dense":
        teacher = rung.kept
    elif isinstance(wanted, str):
        teacher = _of_kept(wanted, rung.kept)
    else:
        teacher = tuple(_of_kept(name, rung.kept) for name in wanted)
    distill = stage.distill.model_copy(update={"teacher": teacher})
    return stage.model_copy(update={"name": rung.name, "init": rung.kept[-1], "distill": distill})


def _of_kept(name: str, kept: Sequence[str]) -> str:
    """Which rung a teacher's name means: of several tries the one that was kept, `w2a2-2`."""
    if name == "previous":
        return kept[-1]
    return next((rung for rung in kept if rung.partition("-")[0] == name), name)

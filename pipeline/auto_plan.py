"""The plan of a ladder as far as it is known: an automatic one's depends on its records."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from .auto_ladder import Rung, course, label
from .config import AutoConfig, RunConfig, StageConfig
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


def said_of_rungs(errors: Sequence[str], names: Sequence[str]) -> list[str]:
    """Mistakes in `ladder.N` as those of `auto.rungs.NAME`; what several have is said once."""
    said: dict[str, str] = {}
    for error in errors:
        found = re.match(r"ladder\.(\d+)(.*)", error, flags=re.DOTALL)
        own = found[2] if found else f".{error}"
        said.setdefault(own, f"auto.rungs.{names[int(found[1])]}{own}" if found else error)
    return list(said.values())


def _stage(auto: AutoConfig, rung: Rung) -> StageConfig:
    """A rung's settings; what was tried above it and not kept is no parent of it."""
    stage = auto.rungs[label(rung.widths)]
    if not rung.kept:
        return stage
    above = rung.kept[-1]
    of_kept = {"previous": above, "dense": rung.kept if len(rung.kept) > 1 else above}
    wanted = stage.distill.teacher
    teacher = of_kept.get(wanted, wanted) if isinstance(wanted, str) else wanted
    distill = stage.distill.model_copy(update={"teacher": teacher})
    return stage.model_copy(update={"name": rung.name, "init": above, "distill": distill})

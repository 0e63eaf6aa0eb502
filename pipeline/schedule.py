"""What changes over a stage, as pure functions of the step: a resumed run needs no state for it."""

from __future__ import annotations

import math

from .config import ScheduleConfig
from .config_distill import ScheduledWeight


def lr_factor(schedule: ScheduleConfig, step: int, steps: int, steps_per_epoch: int) -> float:
    """What the base learning rate is multiplied by at a step.

    Args:
        step: 0-based optimizer step within the stage.
        steps: optimizer steps of the whole stage.
    """
    warmup = min(round(schedule.warmup_epochs * steps_per_epoch), steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(steps - warmup, 1)  # 0 at the first full step, below 1 at the last
    if schedule.name == "cosine":
        return schedule.final + (1 - schedule.final) * (1 + math.cos(math.pi * done)) / 2
    if schedule.name == "linear":
        return 1 - (1 - schedule.final) * done
    if schedule.name == "step":
        return schedule.gamma ** sum(step / max(steps, 1) >= m for m in schedule.milestones)
    return 1.0


def annealed(start: float, final: float, progress: float, *, warmup: float) -> float:
    """`start` until `warmup`, then along half a cosine to `final` at the end of the stage.

    Args:
        progress: fraction of the stage done, 0 .. 1.
        warmup: fraction of the stage at which it begins to move.
    """
    if progress < warmup or warmup >= 1:
        return start
    done = (progress - warmup) / (1 - warmup)
    return final + (start - final) * (1 + math.cos(math.pi * done)) / 2


def weight_at(weight: float | ScheduledWeight, progress: float) -> float:
    """A loss's weight, constant or moving, at a fraction of the stage done."""
    if isinstance(weight, ScheduledWeight):
        return annealed(weight.start, weight.final, progress, warmup=weight.warmup)
    return weight

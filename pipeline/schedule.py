"""The learning rate as a pure function of the step, so that a resumed run needs no state for it."""

from __future__ import annotations

import math

from .config import ScheduleConfig


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

"""Where the time of a training step goes, for any rung of any config; nothing is stored."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from .auto_plan import every_rung
from .config import RunConfig, StageConfig
from .errors import ConfigError
from .fresh_steps import endless_batches, fresh_steps
from .machine import choose_device, describe, keep_freed_memory
from .runner import check_ladder, data_of
from .stopwatch import PARTS, REST, Stopwatch, watched

WARM_UP = 3  # rounds that do not count
AT = 0.9  # of the stage: what has a warm-up is on by then


@dataclass(frozen=True)
class Profile:
    """What a training step of one stage costs. Times are in seconds, medians over the steps.

    Attributes:
        stage: the stage's settings.
        network: the name of its network.
        teachers: how many run in a step.
        batch_size: images a step.
        machine: as `machine.describe` gives it.
        steps: how many were timed.
        data: until the next batch is there.
        step: the whole training step after that, not compiled.
        slowest: the longest of these steps.
        parts: of `stopwatch.PARTS`; they add up to `step`.
        fp32: a step of the same network without quantizers, teachers, and what they bring.
        compiled: the whole step as it is trained, where it is compiled.
        notes: of what the stage would do and could not be done here.
    """

    stage: StageConfig
    network: str
    teachers: int
    batch_size: int
    machine: Mapping[str, Any]
    steps: int
    data: float
    step: float
    slowest: float
    parts: Mapping[str, float]
    fp32: float
    compiled: float | None
    notes: tuple[str, ...] = ()

    @property
    def images_per_second(self) -> float:
        """Of training: the wait for data is in it."""
        return self.batch_size / (self.data + (self.compiled or self.step))


def profile_stage(config: RunConfig, name: str | None = None, *, steps: int = 20) -> Profile:
    """Times the parts of a rung's training step, on its own data and networks.

    All networks have fresh weights, so nothing has to be trained before: quantized and calibrated
    they cost what trained ones cost. The step is one near the end of the stage, where all that
    begins later is on. Each round is one step that is watched, one that is not, one in FP32, and
    one compiled where the stage is; the watched ones give the shares of the parts, the others the
    times. Compiled code cannot be watched: of it there is the whole alone.

    Args:
        name: of a rung; None for the last.

    Raises:
        ConfigError: no such rung, one that is not trained, or data and networks do not fit.
    """
    position = _position(every_rung(config), name)
    check_ladder(config)
    config = every_rung(config)
    stage, device = config.ladder[position], _set_up(config)
    data = data_of(config.data)
    batches = endless_batches(config, stage, data, device)
    made = fresh_steps(config, position, data, device)
    own, number = made.own, int(AT * (made.own.steps - 1))
    watch, times = Stopwatch(device), _Times(device)
    parts = dict.fromkeys(PARTS, 0.0)
    for round_ in range(WARM_UP + steps):
        if round_ == WARM_UP:
            times.clear()
            parts = dict.fromkeys(PARTS, 0.0)
        with times.of("data"):
            x, targets = next(batches)
        with watched(watch, own):
            watch.begin(REST)
            own(x, targets, number)
            watch.end()
        parts = {part: parts[part] + seconds for part, seconds in watch.read().items()}
        with times.of("step"):
            own(x, targets, number)
        with times.of("fp32"):
            made.plain(x, targets, number)
        if made.compiled is not None:
            with made.compiled.in_use(), times.of("compiled"):
                own(x, targets, number)
    step, whole = median(times["step"]), sum(parts.values())
    return Profile(
        stage=stage,
        network=config.model_of(stage).name,
        teachers=len(own.teachers),
        batch_size=len(targets),
        machine=describe(device),
        steps=steps,
        data=median(times["data"]),
        step=step,
        slowest=max(times["step"]),
        parts={part: step * seconds / whole for part, seconds in parts.items()},
        fp32=median(times["fp32"]),
        compiled=median(times["compiled"]) if made.compiled is not None else None,
        notes=made.notes,
    )


class _Times(dict[str, list[float]]):
    """Seconds by what took them; the device has done all that it was given at both ends."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    @contextmanager
    def of(self, what: str) -> Iterator[None]:
        began = self._now()
        yield
        self.setdefault(what, []).append(self._now() - began)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def _position(config: RunConfig, name: str | None) -> int:
    names = [stage.name for stage in config.ladder]
    if name is not None and name not in names:
        raise ConfigError([f"no stage {name!r} in {config.name}; there are: {', '.join(names)}"])
    position = len(names) - 1 if name is None else names.index(name)
    if config.ladder[position].train.epochs == 0:
        text = f"{names[position]} has 0 epochs, so there is no training step to look at"
        raise ConfigError([f"{text}; give --stage another, or --set train.epochs=1"])
    return position


def _set_up(config: RunConfig) -> torch.device:
    """Device, threads and memory as for a stage."""
    if config.runtime.keep_freed_memory:
        keep_freed_memory()
    if config.runtime.threads:
        torch.set_num_threads(config.runtime.threads)
    return choose_device(config.runtime.device)

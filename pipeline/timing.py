"""Timing on a machine that others use too: in turns, guarded, and as ratios within a round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

WAITED, TRIES = 0.05, 3


@dataclass
class Case:
    """Something to be timed, and the seconds that it took, round by round."""

    name: str
    step: Callable[[], object]
    seconds: list[float] = field(default_factory=list)
    disturbed: int = 0  # rounds in which no try had its processors for itself

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    def ratio(self, base: Case) -> float:
        """The median over the rounds of how many times as long it took as another."""
        pairs = zip(self.seconds, base.seconds, strict=True)
        return statistics.median(own / other for own, other in pairs)


def in_turns(
    cases: Sequence[Case],
    *,
    rounds: int,
    warm_up: int,
    after_round: Callable[[int, int], None] = lambda done, all_: None,
) -> None:
    """Times each case once a round, so that a machine that slows down slows all.

    Every other round goes backwards, so that a drift within the rounds cancels. The first
    `warm_up` rounds do not count: compilers work and memory is taken in these.
    """
    for number in range(warm_up + rounds):
        for case in cases if number % 2 == 0 else reversed(cases):
            seconds, clean = undisturbed(case.step)
            if number >= warm_up:
                case.seconds.append(seconds)
                case.disturbed += not clean
        after_round(number + 1, warm_up + rounds)


def undisturbed(step: Callable[[], object]) -> tuple[float, bool]:
    """Seconds of a step that had its processors for itself, or of the last of a few tries.

    A step whose threads waited over 5 % of it for a processor that somebody else had is done
    again (Linux; elsewhere it counts as it is). The second value tells whether one was clean.
    """
    for _ in range(TRIES):
        _synchronize()
        waited, began = waiting_seconds(), time.perf_counter()
        step()
        _synchronize()
        seconds = time.perf_counter() - began
        clean = waiting_seconds() - waited < WAITED * seconds
        if clean:
            break
    return seconds, clean


def waiting_seconds() -> float:
    """How long the threads of this process were ready to run and did not, in all so far."""
    total = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        try:
            total += int(path.read_text().split()[1])
        except (OSError, IndexError):  # the thread has just ended
            continue
    return total / 1e9


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()

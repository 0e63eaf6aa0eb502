"""What the benchmarks share: timing in turns with a line of progress, and where and how."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from bitladder.pipeline import timing
from bitladder.pipeline.machine import describe
from bitladder.pipeline.timing import Case, undisturbed, waiting_seconds

__all__ = ["Case", "in_turns", "undisturbed", "waiting_seconds", "where_and_how"]


def in_turns(cases: Sequence[Case], *, rounds: int, warm_up: int) -> None:
    """As `bitladder.pipeline.timing.in_turns`, and says how far it is."""

    def say(done: int, all_: int) -> None:
        print(f"\rround {done} of {all_}", end="", file=sys.stderr, flush=True)

    timing.in_turns(cases, rounds=rounds, warm_up=warm_up, after_round=say)
    print(file=sys.stderr)


def where_and_how(device: torch.device | None = None) -> str:
    """Machine, versions and command, as one line of Markdown."""
    facts = describe(device or torch.device("cpu"))
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    return (
        f"{facts['device_name']}, {facts['threads']} threads; torch {facts['torch']}, Python "
        f"{facts['python']}, {facts['platform']}; `{command}`"
    )

"""Calls shared out among copies of this process, one for each core."""

from __future__ import annotations

import gc
import multiprocessing
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, TypeVar

from .cores import usable_cores

if TYPE_CHECKING:
    from multiprocessing.context import ForkProcess

T = TypeVar("T")
FEWEST = 4  # calls a process; a fork costs some 20 ms


def results_of(calls: Sequence[Callable[[], T]]) -> Iterator[T]:
    """What each call gives, in their order; the same as calling one after the other, but sooner.

    For calls that take a while, give back little, and change nothing: pages and figures. They run
    in forked processes, so they need not be pickled, only what they give. What a process owes that
    was killed, or that raised, is called here.
    """
    shares = min(usable_cores(), len(calls) // FEWEST) if _may_fork() else 1
    if shares < 2:
        yield from (call() for call in calls)
        return
    first, *others = calls
    yield first()  # here: what it imports, such as matplotlib, is there when the others begin
    begun = [_begin(others[place::shares]) for place in range(shares)]
    try:
        for place, call in enumerate(others):
            _, answers = begun[place % shares]
            try:
                result = answers.recv()
            except (EOFError, OSError):
                result = call()
            yield result
    finally:  # also where nobody wants the rest
        for process, answers in begun:
            answers.close()
            process.join()


def _may_fork() -> bool:
    """Other threads may hold locks that nobody would free in a copy; macOS forbids it."""
    return sys.platform.startswith("linux") and threading.active_count() == 1


def _begin(calls: Sequence[Callable[[], T]]) -> tuple[ForkProcess, Connection]:
    """A process, and where its answers come from, one by one."""
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe(duplex=False)
    process = fork.Process(target=_answer, args=(calls, there), daemon=True)
    with warnings.catch_warnings():
        # Python 3.12 and later warn of threads of torch and numpy too, which nothing here wakes
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    there.close()
    return process, here


def _answer(calls: Sequence[Callable[[], T]], there: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process stops, and that ends this one
    gc.disable()  # a sixth of the time, for garbage that goes with this process
    with closing(there):
        for call in calls:
            try:
                there.send(call())
            except Exception:
                return  # the first process calls it again, and raises what it raises

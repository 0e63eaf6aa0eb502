"""How Prefect behaves while we use it: silent, and without a SIGTERM handler of its own."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator


class SigtermHandler:
    """The SIGTERM handler of now, to be put back where Prefect has installed its own.

    Prefect turns SIGTERM into an exception wherever it strikes, in the middle of writing a
    checkpoint too; the caller's handler knows better when to stop.
    """

    def __init__(self) -> None:
        self._main = threading.current_thread() is threading.main_thread()
        self._handler = signal.getsignal(signal.SIGTERM)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Puts the handler back in place while the context lasts."""
        if not self._main or self._handler is None:  # None: not installed from Python
            yield
            return
        before = signal.signal(signal.SIGTERM, self._handler)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Sends what Prefect says about runs to its server only.

    On the terminal it would repeat our own lines, with a traceback for each error, across the
    progress bar.
    """
    loggers = [logging.getLogger(f"prefect.{runs}") for runs in ("flow_runs", "task_runs")]
    before = [(logger.propagate, logger.level) for logger in loggers]
    for logger in loggers:
        logger.propagate = False
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger, (propagate, level) in zip(loggers, before, strict=True):
            logger.propagate = propagate
            logger.setLevel(level)


@contextlib.contextmanager
def drained() -> Iterator[None]:
    """Waits at the end until states and logs have reached the server, which may stop then."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    try:
        yield
    finally:
        for worker in (EventsWorker, APILogWorker):
            with contextlib.suppress(Exception):
                worker.drain_all(timeout=5.0)

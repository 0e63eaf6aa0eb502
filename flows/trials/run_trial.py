"""One trial of a study: a ladder, run without Prefect, that comes to an outcome."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ...pipeline.events import Listener

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a trial ended; where it failed or diverged, why; and which process ran it."""

    state: Literal["done", "diverged", "failed", "interrupted"]
    cause: str = ""
    worker: str = ""


@dataclass(frozen=True)
class Request:
    """What a worker needs to run a trial, in any process.

    Attributes:
        name: of the trial, for people.
        config: its ladder as JSON values.
        threads: that each of its stages is trained with.
        store: folder of the store.
        database: SQLAlchemy URL of the index, if not SQLite in the store.
    """

    name: str
    config: Mapping[str, Any]
    threads: int
    store: str
    database: str | None


def run_trial(request: Request, listener: Listener, stop: Callable[[], int | None]) -> Outcome:
    """Runs what is not done of a trial; never raises, for the other trials go on.

    Args:
        stop: the number of the signal that asks for an end, or None.
    """
    from ...pipeline.errors import BitladderError, Diverged, Interrupted

    here = f"process {os.getpid()} on {platform.node()}"
    try:
        _run(request, listener, stop)
    except (Interrupted, KeyboardInterrupt):
        return Outcome("interrupted", worker=here)
    except Diverged as error:
        return Outcome("diverged", f"{error.stage}: {error.cause}", here)
    except BitladderError as error:
        return Outcome("failed", str(error), here)
    except Exception as error:
        log.exception("trial %s", request.name)
        return Outcome("failed", f"{type(error).__name__}: {error}", here)
    return Outcome("done", worker=here)


def _run(request: Request, listener: Listener, stop: Callable[[], int | None]) -> None:
    from ...pipeline.config_load import parse_config
    from ...pipeline.runner import open_ladder, run_ladder
    from ...pipeline.store import Store

    config = parse_config(request.config)
    runtime = config.runtime.model_copy(update={"threads": request.threads})
    config = config.model_copy(update={"runtime": runtime})
    store = Store(request.store, url=request.database)
    run_ladder(open_ladder(config, store, listener, of_study=True), stop)

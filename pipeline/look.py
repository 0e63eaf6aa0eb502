"""The looks inside a run's networks: read, and made where they are missing."""

from __future__ import annotations

import logging
from typing import Any

from .derived import look_spec, teacher_keys
from .errors import BitladderError, Interrupted
from .files import TornFileError, read_json
from .record import LOOK, StageRecord
from .run import Run
from .store import Store

log = logging.getLogger(__name__)


def read_look(store: Store, record: StageRecord) -> dict[str, Any] | None:
    """What the look at a trained stage has found (see `stages/look.py`); None if there is none."""
    key = look_spec(record.key, teacher_keys(record.spec.parents)).key
    if store.find(key) is None:
        return None
    try:
        return read_json(store.stages / key / LOOK)
    except (OSError, TornFileError):
        return None


def make_missing_looks(store: Store, run: Run) -> None:
    """Looks inside the finished stages of a run that were not looked into, if the data are there.

    What fails is said in the log, and the rest is done.

    Raises:
        Interrupted: a stop was asked for.
    """
    for stage, key in zip(run.stages, run.looks, strict=True):
        if store.find(key) is not None or store.find(str(stage["key"])) is None:
            continue
        from .derive import derive  # imports the whole of training, for nothing if none is missing

        spec = look_spec(str(stage["key"]), teacher_keys(stage["spec"]["parents"]))
        try:
            derive(run, str(stage["name"]), spec, store)
        except Interrupted:
            raise
        except BitladderError as error:
            log.warning("%s was not looked into: %s", stage["name"], error)

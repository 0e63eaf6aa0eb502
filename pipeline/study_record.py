"""A study that was begun, as `studies/<id>/study.json` in the store holds it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .errors import StoreError, store_problem
from .files import TornFileError, now, read_json, write_json
from .store import Store

FOLDER, FILE = "studies", "study.json"


@dataclass(frozen=True)
class StudyRecord:
    """What the store knows of a study; its trials are no runs of their own.

    Attributes:
        study: its id.
        created: when it was first begun, UTC, ISO 8601; empty until it is registered.
        command: what a user types to go on with it.
        trials: in order, each with name, arm, seed, fold and stages (name and key).
    """

    study: str
    command: str
    trials: tuple[Mapping[str, Any], ...]
    created: str = ""

    @property
    def keys(self) -> set[str]:
        """Those of all its stages."""
        return {str(stage["key"]) for trial in self.trials for stage in trial["stages"]}

    def as_dict(self) -> dict[str, Any]:
        """The record as JSON values."""
        return {**self.__dict__, "trials": [dict(trial) for trial in self.trials]}


def study_folder(store: Store, study: str) -> Path:
    """Where a study's own files are; its stages are among all others."""
    return store.root / FOLDER / study


def register_study(store: Store, study: StudyRecord) -> None:
    """Writes a study down before anything of it is trained, so that `clean` keeps its stages.

    Raises:
        StoreError: the store cannot be written.
    """
    folder = study_folder(store, study.study)
    known = _read(folder / FILE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        study = replace(study, created=known.created if known else now())
        write_json(folder / FILE, study.as_dict())
    except OSError as error:
        raise StoreError(store_problem(store.root, error)) from None


def study_records(store: Store) -> list[StudyRecord]:
    """All studies of a store, the oldest first."""
    found = [_read(path) for path in _files(store)]
    return sorted((one for one in found if one), key=lambda one: (one.created, one.study))


def damaged_studies(store: Store) -> list[Path]:
    """Files of studies that cannot be read: which stages they refer to is not known."""
    return [path for path in _files(store) if _read(path) is None]


def study_state(store: Store, study: StudyRecord) -> tuple[str, dict[str, int]]:
    """A study's state, and how many of its trials are in each: done, running, failed, ..."""
    stages = {key: _stage_state(store, key) for key in study.keys}
    counts: dict[str, int] = {}
    for trial in study.trials:
        state = _trial_state([stages[str(stage["key"])] for stage in trial["stages"]])
        counts[state] = counts.get(state, 0) + 1
    for state in ("running", "failed", "interrupted"):
        if state in counts:
            return state, counts
    return ("done" if set(counts) <= {"done", "diverged"} else "interrupted"), counts


def _stage_state(store: Store, key: str) -> str:
    state, _ = store.state(key)
    return "diverged" if state == "failed" and store.diverged(key) else state


def _trial_state(states: Sequence[str]) -> str:
    for state in ("running", "diverged", "failed", "interrupted"):
        if state in states:
            return state
    if set(states) == {"done"}:
        return "done"
    return "interrupted" if "done" in states else "to do"


def _files(store: Store) -> list[Path]:
    return sorted((store.root / FOLDER).glob(f"*/{FILE}"))


def _read(path: Path) -> StudyRecord | None:
    try:
        raw = read_json(path)
        fields = {name: raw[name] for name in StudyRecord.__dataclass_fields__}
        study = StudyRecord(**{**fields, "trials": tuple(raw["trials"])})
        _ = study.keys  # each trial has what is asked of it
    except (OSError, TornFileError, KeyError, TypeError):
        return None
    return study

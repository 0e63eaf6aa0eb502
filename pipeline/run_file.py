"""`run.json`: a run as the store keeps it, with the time when it was last begun."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .files import TornFileError, read_json
from .run import Run


def read_run_file(path: Path) -> dict[str, Any]:
    """What a `run.json` holds: all that `Run.from_dict` needs.

    Raises:
        TornFileError: it is damaged.
        OSError: it is not there.
    """
    raw = read_json(path)
    try:
        Run.from_dict(raw)
    except (KeyError, TypeError) as error:
        raise TornFileError(f"{path} lacks {error}") from None
    return raw


def last_begun(raw: Mapping[str, Any]) -> tuple[str, str]:
    """Sorts runs, the newest last; one that was restored from the index has its first time only."""
    return str(raw.get("touched") or raw["created"]), str(raw["run"])

"""How the training of a stage went, an epoch a line, as far as it has come."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from .record import METRICS
from .store import Store


def epochs_of(store: Store, key: str) -> list[dict[str, Any]]:
    """The epochs of a stage that is done or being trained; none where it has not begun."""
    for folder in (key, f"{key}.part"):
        try:
            text = (store.stages / folder / METRICS).read_text(encoding="utf-8")
        except OSError:
            continue
        return list(_whole(text.splitlines()))
    return []


def last_epoch(store: Store, key: str) -> dict[str, Any]:
    """The last of them; empty where there is none."""
    return next(reversed(epochs_of(store, key)), {})


def _whole(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The lines up to one that is torn."""
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            return

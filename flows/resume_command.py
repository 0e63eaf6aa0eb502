"""The command that goes on with a run, as the last line of a message about one that stopped."""

from __future__ import annotations

import shlex

from ..pipeline.store import DEFAULT_STORE, Store


def resume_command(store: Store, run: str) -> str:
    """What a user types to go on with a run, ready to be copied."""
    elsewhere = f" --store {shlex.quote(str(store.root))}" if store.root != DEFAULT_STORE else ""
    return f"bitladder resume {run}{elsewhere}"

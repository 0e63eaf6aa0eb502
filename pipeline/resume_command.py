"""The command that goes on with a run, as the last line of a message about one that stopped."""

from __future__ import annotations

import shlex

from .store import DEFAULT_STORE, Store


def resume_command(store: Store | None, run: str) -> str:
    """What a user types to go on with a run, to be copied; without a store in the default one."""
    command = f"bitladder resume {run}"
    if store is None or store.root == DEFAULT_STORE:
        return command
    return f"{command} --store {shlex.quote(str(store.root))}"

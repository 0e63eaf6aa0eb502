"""The work: config, plan, data, training, store, report. Nothing here knows Prefect."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config_load import load_config
    from .report import accuracy_report
    from .report_object import Report
    from .runner import open_ladder, run_ladder
    from .store import Store

_HOMES = {
    "Report": "report_object",
    "Store": "store",
    "accuracy_report": "report",
    "load_config": "config_load",
    "open_ladder": "runner",
    "run_ladder": "runner",
}
__all__ = ["Report", "Store", "accuracy_report", "load_config", "open_ladder", "run_ladder"]


def __getattr__(name: str) -> Any:
    """Imports the public names at their first use: `bitladder report` needs no torch."""
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)

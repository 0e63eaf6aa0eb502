"""`bitladder components`: every part that YAML can name."""

from __future__ import annotations

import inspect
from typing import Any

from rich.console import Console
from rich.table import Table

from ..models import MODELS
from ..pipeline.config_load import shipped_configs
from ..pipeline.data import DATASETS
from ..pipeline.errors import ConfigError
from ..pipeline.losses import LOSSES
from ..pipeline.stages import STAGES
from ..quant.quantizers import QUANTIZERS
from ..quant.registry import Entry, Registry, unknown

KINDS: dict[str, Registry[Any]] = {
    "quantizers": QUANTIZERS,
    "models": MODELS,
    "data": DATASETS,
    "losses": LOSSES,
    "stages": STAGES,
}


def show_components(kind: str | None, name: str | None) -> None:
    """Prints all parts, those of a kind, or one with its options.

    Raises:
        ConfigError: there is no such kind or name; the message lists those that are.
    """
    known = (*KINDS, "configs")
    if kind is not None and kind not in known:
        raise ConfigError([unknown("kind of part", kind, known)])
    console = Console()
    if kind == "configs" and name is None:
        _configs(console)
    elif kind is not None and name is not None:
        if kind == "configs" or name not in KINDS[kind]:
            raise ConfigError(
                [unknown(kind, name, shipped_configs() if kind == "configs" else KINDS[kind])]
            )
        _one(console, KINDS[kind][name])
    else:
        for each, registry in KINDS.items():
            if kind in (None, each):
                _table(console, each, registry)
        if kind is None:
            _configs(console)


def _table(console: Console, title: str, registry: Registry[Any]) -> None:
    table = Table(title=title, title_justify="left")
    for column in ("name", "what it is", "options", "source"):
        table.add_column(column, overflow="fold")
    for name in registry:
        entry = registry[name]
        table.add_row(name, entry.summary, ", ".join(entry.options()), entry.source)
    console.print(table)


def _one(console: Console, entry: Entry[Any]) -> None:
    console.print(f"[bold]{entry.name}[/bold]\n{inspect.getdoc(entry.factory)}", highlight=False)
    for name, parameter in entry.options().items():
        default = parameter.default
        shown = "required" if default is inspect.Parameter.empty else f"default {default!r}"
        annotation = inspect.formatannotation(parameter.annotation)
        console.print(f"  {name}: {annotation}  ({shown})", markup=False, highlight=False)


def _configs(console: Console) -> None:
    table = Table(title="configs", title_justify="left")
    table.add_column("name")
    table.add_column("what it is", overflow="fold")
    for name, path in shipped_configs().items():
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        table.add_row(name, first.lstrip("# "))
    console.print(table)

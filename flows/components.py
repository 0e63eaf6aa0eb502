"""`bitladder components`: every part that YAML can name."""

from __future__ import annotations

import inspect
from typing import Any

from rich.console import Console

from ..models import MODELS
from ..pipeline.config_load import shipped_configs
from ..pipeline.data import DATASETS
from ..pipeline.errors import ConfigError
from ..pipeline.losses import LOSSES
from ..pipeline.stages import STAGES
from ..quant.quantizers import QUANTIZERS
from ..quant.registry import Entry, Registry, unknown
from .tables import print_table, table_of

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
    if kind == "configs" and name is None:
        _configs()
    elif kind is not None and name is not None:
        if kind == "configs" or name not in KINDS[kind]:
            raise ConfigError(
                [unknown(kind, name, shipped_configs() if kind == "configs" else KINDS[kind])]
            )
        _one(KINDS[kind][name])
    else:
        for each, registry in KINDS.items():
            if kind in (None, each):
                _table(each, registry)
        if kind is None:
            _configs()


def _table(title: str, registry: Registry[Any]) -> None:
    table = table_of(("name", "what it is", "options", "source"), title=title)
    for name in registry:
        entry = registry[name]
        table.add_row(name, entry.summary, ", ".join(entry.options()), entry.source)
    print_table(table)


def _one(entry: Entry[Any]) -> None:
    Console().print(f"[bold]{entry.name}[/bold]", highlight=False)
    print(inspect.getdoc(entry.factory))
    for name, parameter in entry.options().items():
        default = parameter.default
        shown = "required" if default is inspect.Parameter.empty else f"default {default!r}"
        annotation = inspect.formatannotation(parameter.annotation)
        print(f"  {name}: {annotation}  ({shown})")


def _configs() -> None:
    table = table_of(("name", "what it is"), title="configs")
    for name, path in shipped_configs().items():
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        table.add_row(name, first.lstrip("# "))
    print_table(table)

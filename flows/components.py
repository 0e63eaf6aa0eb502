"""`bitladder components`: every part that YAML can name."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from rich.console import Console

from ..models import MODELS
from ..pipeline.config_load import shipped_configs
from ..pipeline.data import DATASETS
from ..pipeline.errors import ConfigError
from ..pipeline.losses import FEATURE_LOSSES, LOSSES
from ..pipeline.stages import STAGES
from ..quant.catalogue import USUAL_BITS, catalogue, default_text, quantizer_facts, type_text
from ..quant.quantizers import QUANTIZERS
from ..quant.registry import Entry, Registry, unknown
from .quantizer_pages import (
    OVERVIEW,
    PLACE_COLUMNS,
    overview_row,
    place_row,
    quantizer_page,
    quantizer_pages,
    refusals,
)
from .tables import markdown_table, print_table, table_of

# of each kind one registry or more, under the titles of their tables
KINDS: dict[str, dict[str, Registry[Any]]] = {
    "quantizers": {"quantizers": QUANTIZERS},
    "models": {"models": MODELS},
    "data": {"data": DATASETS},
    "losses": {
        "losses: on logits, distill.loss": LOSSES,
        "losses: on inner layers, distill.features": FEATURE_LOSSES,
    },
    "stages": {"stages": STAGES},
}
Form = Literal["table", "markdown"]


def show_components(kind: str | None, name: str | None, form: Form = "table") -> None:
    """Prints all parts, those of a kind, or one with its options.

    Raises:
        ConfigError: there is no such kind or name; the message lists those that are.
    """
    known = (*KINDS, "configs")
    if kind is not None and kind not in known:
        raise ConfigError([unknown("kind of part", kind, known)])
    if kind is not None and name is not None:
        names = list(shipped_configs())
        if kind != "configs":
            names = [known for registry in KINDS[kind].values() for known in registry]
        if name not in names:
            raise ConfigError([unknown(kind, name, names)])
        _one(kind, name, form)
        return
    if kind == "quantizers" and form == "markdown":
        print(quantizer_pages(), end="")
        return
    for each in known if kind is None else (kind,):
        if each == "quantizers" and form == "table":
            _quantizers()
        elif each == "configs":
            _print(each, *_configs(), form=form)
        else:
            for title, registry in KINDS[each].items():
                _print(title, *_parts(registry), form=form)


def _configs() -> tuple[Sequence[str], list[Sequence[str]]]:
    """Columns and rows, from the first line of each config.

    It is `# bitladder run NAME OPTIONS    WHAT IT IS`, with four spaces where the command ends.
    """
    rows: list[Sequence[str]] = []
    for name, path in shipped_configs().items():
        command, _, what = path.read_text(encoding="utf-8").partition("\n")[0].partition("    ")
        needs = command.removeprefix(f"# bitladder run {name}").lstrip("# ")
        rows.append((name, what.strip(), needs))
    return ("name", "what it is", "needs"), rows


def _parts(registry: Registry[Any]) -> tuple[Sequence[str], list[Sequence[str]]]:
    """Columns and rows of the parts of one registry."""
    entries = [registry[name] for name in registry]
    return ("name", "what it is", "options", "source"), [
        (entry.name, entry.summary, ", ".join(entry.options()), entry.source) for entry in entries
    ]


def _print(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, form: Form
) -> None:
    if form == "markdown":
        print(f"## {title}\n\n{markdown_table(columns, rows)}\n")
        return
    table = table_of(columns, title=title)
    for row in rows:
        table.add_row(*row)
    print_table(table)


def _quantizers() -> None:
    """Two tables, so that both can be read on a terminal of 80 columns."""
    facts = catalogue()
    _print("quantizers: bits they take", OVERVIEW, map(overview_row, facts), form="table")
    print("laws: n nearest, i idempotent, m monotone; (in parentheses: not everywhere)\n")
    columns = ("name", "what it is", "paper")
    rows = ((each.name, each.summary, each.paper) for each in facts)
    _print("quantizers: where they come from", columns, rows, form="table")


def _one(kind: str, name: str, form: Form) -> None:
    if kind == "configs":
        print(shipped_configs()[name].read_text(encoding="utf-8"), end="")
        return
    if kind == "quantizers" and form == "markdown":
        print(quantizer_page(quantizer_facts(name)), end="")
        return
    entry = next(registry[name] for registry in KINDS[kind].values() if name in registry)
    Console().print(f"[bold]{entry.name}[/bold]", highlight=False)
    print(inspect.getdoc(entry.factory))
    if kind == "quantizers":
        print()
        _places(name)
    _options(entry)


def _places(name: str) -> None:
    """Where the method works: widths, what is learned there, and what is refused."""
    facts = quantizer_facts(name)
    table = table_of(PLACE_COLUMNS)
    for place in facts.places:
        table.add_row(*place_row(place))
    print_table(table)
    if facts.learns:
        print(f"shapes at {USUAL_BITS} bits, where it takes them; C: the number of channels")
    for line in refusals(facts):
        print(line)


def _options(entry: Entry[Any]) -> None:
    print()
    for name, parameter in entry.options().items():
        default = default_text(parameter.default)
        shown = f"default {default}" if default else "required"
        print(f"  {name}: {type_text(parameter.annotation)}  ({shown})")

"""Options and arguments that several commands share."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from ..pipeline.store import Store

StoreOption = Annotated[
    Path,
    typer.Option("--store", envvar="BITLADDER_STORE", help="Folder of all results.", metavar="DIR"),
]
DatabaseOption = Annotated[
    str | None,
    typer.Option(
        "--database",
        envvar="BITLADDER_DATABASE",
        help="SQLAlchemy URL of the results tables, if not SQLite in the store.",
        metavar="URL",
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a value, such as ladder.2.epochs=5.", metavar="KEY=VALUE"),
]
RunnerOption = Annotated[
    Literal["prefect", "plain"],
    typer.Option(help="Prefect shows and logs the flow; plain runs the same ladder without it."),
]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Say more on stderr.")]
ConfigArgument = Annotated[str, typer.Argument(help="A shipped config by name, or a YAML file.")]
RunArgument = Annotated[
    str | None, typer.Argument(help="A run's id, a prefix of it, or its name; default: newest.")
]
TrustOption = Annotated[
    list[str] | None,
    typer.Option(
        "--trust",
        help="An import path whose code the file may have run.",
        metavar="PACKAGE:FACTORY",
    ),
]
DEFAULT_STORE = Path("artifacts")  # as in pipeline.store, which `--help` need not import


def open_store(root: Path, database: str | None, verbose: bool) -> Store:
    """The store that the options name."""
    from ..pipeline.store import Store

    quiet(verbose)
    return Store(root, url=database)


def quiet(verbose: bool) -> None:
    """Warnings of ours go to stderr; with --verbose everything of ours does."""
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(message)s", level=logging.WARNING)
    logging.getLogger("bitladder").setLevel(logging.DEBUG if verbose else logging.WARNING)

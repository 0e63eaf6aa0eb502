"""A study told to people: the tables as text, and its files in the store."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

from ..errors import StoreError, store_problem
from ..figures.style import FORMS, save
from ..files import write_atomic
from ..page import study_page
from ..store import Store
from ..study_record import study_folder
from .figure import study_figures
from .people import choice_text, comparison_table, notes, stage_tables
from .results import results
from .tables import Tables, tables
from .trials import Study

if TYPE_CHECKING:
    import pandas as pd

WIDTH = 100  # letters of a line of the terminal; tables take what they need
FILES = ("values.csv", "summary.csv", "comparisons.csv", "study.md", "report.html")
CAPTIONS = {
    "differences": "Arm minus against over the seeds that both have. Bars: 95 % t-intervals, not "
    "adjusted for other comparisons; the verdict is by p-values adjusted over the family (Holm).",
    "study": "Every value, and the mean with its interval, by arm and stage.",
}


def study_tables(study: Study, store: Store) -> Tables:
    """What is told, as far as the study has come."""
    return tables(study, results(study, store))


def write_study(study: Study, store: Store, found: Tables) -> list[Path]:
    """Writes tables and figure; each file is whole or not there.

    Raises:
        StoreError: the store cannot be written.
    """
    figures = study_figures(study, found)
    files = {f"{name}.{form}": save(figures[name], form) for name in figures for form in FORMS}
    svgs = {name: files[f"{name}.svg"].decode() for name in figures}
    contents = {
        "values.csv": _csv(found.rows),
        "summary.csv": _csv(found.summary),
        "comparisons.csv": _csv(found.comparisons),
        "study.md": _markdown(study, store, found, figures).encode(),
        "report.html": _page(study, store, found, svgs).encode(),
        **files,
    }
    folder = study_folder(store, study.id)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            write_atomic(folder / name, content)
    except OSError as error:
        raise StoreError(store_problem(store.root, error)) from None
    return [folder / name for name in contents]


def text(study: Study, store: Store, found: Tables) -> str:
    """The tables for a terminal, and what one must know to read them."""
    parts = [study.id, "\n".join(fill(note, WIDTH) for note in notes(study, store, found))]
    for title, table in _titled(study, found):
        parts.append(f"{title}\n{table.to_string(index=False)}")
    if found.choice is not None:
        lines = choice_text(study, found.choice).splitlines()
        parts.append("\n".join(fill(line, WIDTH) for line in lines))
    return "\n\n".join(parts)


def _page(study: Study, store: Store, found: Tables, svgs: Mapping[str, str]) -> str:
    return study_page(
        study.id,
        notes=notes(study, store, found),
        tables=dict(_titled(study, found)),
        choice=choice_text(study, found.choice).splitlines() if found.choice is not None else [],
        figures={text: svgs[name] for name, text in CAPTIONS.items() if name in svgs},
        files={"Every value (CSV)": _csv(found.rows).decode()},
    )


def _markdown(study: Study, store: Store, found: Tables, figures: Collection[str]) -> str:
    parts = [f"# {study.id}", "\n".join(f"- {note}" for note in notes(study, store, found))]
    for title, table in _titled(study, found):
        body = table.to_markdown(index=False, disable_numparse=True)
        parts.append(f"## {title}\n\n{body}")
    if found.choice is not None:
        lines = choice_text(study, found.choice).splitlines()
        parts.append("## Choice\n\n" + "\n".join(f"- {line}" for line in lines))
    parts += [f"![{text}]({name}.svg)" for name, text in CAPTIONS.items() if name in figures]
    return "\n\n".join(parts) + "\n"


def _titled(study: Study, found: Tables) -> Iterator[tuple[str, pd.DataFrame]]:
    for stage, table in stage_tables(study, found).items():
        yield f"Stage {stage}: test top-1 in %", table
    for family in dict.fromkeys(c.family for c in study.comparisons):
        table = comparison_table(found.comparisons, family)
        yield f"Family {family}: paired differences of test top-1 in points", table


def _csv(frame: pd.DataFrame) -> bytes:
    return frame.to_csv(index=False, lineterminator="\n").encode()

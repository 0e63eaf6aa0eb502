"""The page of a study: its tables, and its paired differences as a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .render import inlined, render_page

if TYPE_CHECKING:
    import pandas as pd


def study_page(
    title: str,
    *,
    notes: Sequence[str],
    tables: Mapping[str, pd.DataFrame],
    choice: Sequence[str],
    figures: Mapping[str, str],
    files: Mapping[str, str],
) -> str:
    """The page as text.

    Args:
        notes: what one must know to read it.
        tables: by title, as text.
        choice: what was chosen and why; empty where nothing is to be chosen.
        figures: SVG files by caption.
        files: text to keep beside it, by name.
    """
    drawn = [
        {"name": "", "caption": caption, "drawing": inlined(svg, caption)}
        for caption, svg in figures.items()
    ]
    values = {
        "title": title,
        "notes": notes,
        "tables": tables,
        "choice": choice,
        "figures": drawn,
        "files": files,
    }
    return render_page("study.html", values)

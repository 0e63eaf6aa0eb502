"""The page of a study: its tables, and its paired differences as a figure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .render import inlined, render_page

if TYPE_CHECKING:
    import pandas as pd

LEAST, MOST = 0.85, 1.4  # pixels of a screen a point: figures are 8 points' letters, 6 inches wide


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
        {"name": "", "caption": caption, "drawing": _sized(svg, caption)}
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


def _sized(svg: str, caption: str) -> str:
    """A drawing whose letters are as large as the page's, or as small as a phone needs them."""
    from markupsafe import Markup

    found = re.search(r'<svg [^>]*?width="([\d.]+)pt"', svg)
    assert found is not None  # matplotlib writes it
    width = float(found[1])
    style = f"min-width: {LEAST * width:.0f}px; max-width: {MOST * width:.0f}px"
    return Markup(f'<div style="{style}">{inlined(svg, caption)}</div>')

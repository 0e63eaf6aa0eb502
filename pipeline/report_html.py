"""The report as one page that opens by double click and asks the network for nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

_TEMPLATE = Path(__file__).parent / "templates" / "report.html"


def html_page(
    frame: pd.DataFrame, shown: pd.DataFrame, notes: Sequence[str], speeds: pd.DataFrame
) -> str:
    """A self-contained page.

    Args:
        frame: the full report.
        shown: the columns for people, as text.
        notes: lines to stand below the table.
        speeds: of packed networks, as text; may be empty.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    errors = frame[frame["error"].notna()][["run", "stage", "error"]].to_dict("records")
    return template.render(
        runs=list(dict.fromkeys(frame["run"])),
        columns=list(shown.columns),
        rows=shown.to_numpy().tolist(),
        errors=errors,
        notes=notes,
        speed_columns=list(speeds.columns),
        speeds=speeds.to_numpy().tolist(),
        csv=frame.to_csv(index=False, lineterminator="\n"),
    )

"""The figures of ladders, drawn from the store alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from .ladder import Drawn, ladder_figures

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from ..run import Run
    from ..store import Store

__all__ = ["Drawn", "drawn", "figures", "ladder_figures", "rows_of"]


def figures(store: Store, runs: Sequence[Run]) -> dict[str, Figure]:
    """Every figure of some runs by its name, such as `accuracy-bytes` or `w2a2-weights`.

    What is not there yet, or was never measured, has no figure. Of several runs those of one run
    begin with its id.
    """
    return {each.name: each.draw() for each in drawn(store, runs)}


def drawn(store: Store, runs: Sequence[Run]) -> Iterator[Drawn]:
    """The same with what is said of them, each drawn when it is asked for."""
    from ..report import reports

    return ladder_figures(store, runs, rows_of(reports(store, runs)))


def rows_of(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a report; what is missing is None."""
    rows: Any = frame.astype(object).where(frame.notna(), None).to_dict("records")
    return list(rows)

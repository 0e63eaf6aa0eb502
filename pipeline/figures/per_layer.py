"""Numbers of every layer of a rung: use of the levels, clipping, error, effectiveness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .style import BLUE, HALVES, VERMILLION, WIDTH, layer_rows, new_figure, row_lines, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOOKS = {"weight": (BLUE, "s"), "activation": (VERMILLION, "o")}
FACTS = {"levels": "levels used, %", "clipped": "clipped, %"}
ERRORS = {"sqnr_db": "SQNR, dB", "effectiveness": "BR effectiveness"}


def facts_of(
    measured: Sequence[Mapping[str, Any]], looked: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """A row a layer, with `weight_levels` and so on; None where there is nothing to say.

    Args:
        measured: the layers of a stage's record.
        looked: the layers of its look, which add the effectiveness; may be empty.
    """
    views = {layer["layer"]: layer for layer in looked}
    found = []
    for layer in measured:
        row: dict[str, Any] = {"layer": layer["layer"]}
        for half in HALVES:
            used, bits = layer.get(f"{half}_levels"), layer.get(f"{half}_bits", 32)
            view = (views.get(layer["layer"]) or {}).get(half) or {}
            row[f"{half}_levels"] = 100 * used / 2**bits if used and bits < 32 else None
            clipped = layer.get(f"{half}_clipped")
            row[f"{half}_clipped"] = None if clipped is None else 100 * clipped
            row[f"{half}_sqnr_db"] = layer.get(f"{half}_sqnr_db")
            row[f"{half}_effectiveness"] = view.get("effectiveness")
        found.append(row)
    return found


def known(rows: Sequence[Mapping[str, Any]], panels: Mapping[str, str]) -> list[str]:
    """The facts that at least one layer has."""
    return [
        fact
        for fact in panels
        if any(row[f"{half}_{fact}"] is not None for row in rows for half in HALVES)
    ]


@styled
def level_use(stage: str, rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Which share of its levels every layer uses, and which share of its values is clipped."""
    return _dots(f"{stage}: use of the levels", rows, FACTS)


@styled
def quantization_error(stage: str, rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Signal to quantization noise of every layer, and how tightly bins hold their values."""
    return _dots(f"{stage}: quantization error", rows, ERRORS)


def _dots(title: str, rows: Sequence[Mapping[str, Any]], facts: Mapping[str, str]) -> Figure:
    shown = known(rows, facts)
    figure = new_figure(WIDTH, 1.35 + 0.2 * len(rows), title)
    panels = figure.subplots(1, len(shown), squeeze=False).flatten()
    for panel, fact in zip(panels, shown, strict=True):
        _panel(panel, rows, fact)
        panel.set_xlabel(facts[fact])
        layer_rows(panel, [row["layer"] for row in rows], named=panel is panels[0])
        row_lines(panel, len(rows))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _panel(panel: Axes, rows: Sequence[Mapping[str, Any]], fact: str) -> None:
    for half, (colour, marker) in LOOKS.items():
        shift = -0.13 if half == "weight" else 0.13  # equal values stay both in sight
        places = [i for i, row in enumerate(rows) if row[f"{half}_{fact}"] is not None]
        values = [rows[i][f"{half}_{fact}"] for i in places]
        heights = [place + shift for place in places]
        panel.scatter(
            values, heights, s=18, color=colour, marker=marker, label=HALVES[half], zorder=3
        )
    if fact in FACTS:
        panel.set_xlim(left=0)
    if fact == "levels":
        panel.set_xlim(0, 105)
    panel.locator_params(axis="x", nbins=4)
    panel.grid(axis="x")

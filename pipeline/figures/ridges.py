"""What quantization does to the values of every layer of a rung: a row a layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import sqrt
from typing import TYPE_CHECKING, Any, Literal

from .style import BLUE, HALVES, INK, SKY, VERMILLION, WIDTH, layer_rows, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Half = Literal["weight", "activation"]
View = Mapping[str, Any]  # a layer's weights or activations, see the stage kind `look`
HEIGHT = 0.8  # of a row's highest bar; a row is 1 high
FEW = 20  # levels; more are drawn as one outline
NO_BITS = 32


def can_draw(layers: Sequence[Mapping[str, Any]], half: Half) -> bool:
    """Whether there is anything of this half."""
    return any(layer[half] for layer in layers)


def is_quantized(layers: Sequence[Mapping[str, Any]], half: Half) -> bool:
    """Whether this half is on levels in any layer."""
    return any(layer[half] and layer[half]["bits"] != NO_BITS for layer in layers)


@styled
def ridges(stage: str, layers: Sequence[Mapping[str, Any]], half: Half) -> Figure:
    """Per layer the values before, the levels after, and the staircase between them.

    Layers of one width stand together: x is in units of the layer's step (of its standard
    deviation where nothing is quantized), and rows of one panel have one axis.

    Args:
        layers: as in look.json.
    """
    groups = _by_width(layers, half)
    rows = [len(group) for group in groups.values()]
    height = 0.75 + sum(0.3 * count + 0.5 for count in rows)
    quantized = is_quantized(layers, half)
    title = f"{stage}: {HALVES[half]}{' on their levels' if quantized else ''}"
    figure = new_figure(WIDTH, max(height, 2.2), title)
    panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=rows).flatten()
    for panel, (bits, group) in zip(panels, groups.items(), strict=True):
        _panel(panel, bits, group)
    _legend(figure, quantized=quantized)
    return figure


def _by_width(layers: Sequence[Mapping[str, Any]], half: Half) -> dict[int, list[tuple[str, View]]]:
    """(name, view) of the layers that have one, by their bits, the most layers first."""
    groups: dict[int, list[tuple[str, View]]] = {}
    for layer in layers:
        if layer[half]:
            groups.setdefault(layer[half]["bits"], []).append((layer["layer"], layer[half]))
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def _panel(panel: Axes, bits: int, group: Sequence[tuple[str, View]]) -> None:
    low, high = _limits([view for _, view in group])
    for place, (_, view) in enumerate(group):
        floor = place + 0.4
        _before(panel, view, floor)
        if view["levels"]:
            _after(panel, view, floor)
            _staircase(panel, view, floor)
    layer_rows(panel, [name for name, _ in group])
    panel.set_xlim(low, high)
    levels = sorted({round(level, 3) for _, view in group for level in view["levels"] or ()})
    if 0 < len(levels) <= FEW:
        for level in levels:
            panel.axvline(level, color=INK, linewidth=0.3, alpha=0.35, zorder=0)
    if bits == NO_BITS:
        panel.set_xlabel("value, in standard deviations of the layer")
    else:
        plural = "" if bits == 1 else "s"
        panel.set_xlabel(f"value, in steps of the layer's quantizer ({bits} bit{plural})")


def _limits(views: Sequence[View]) -> tuple[float, float]:
    """All values, but no more than once the levels' own width to both sides of them."""
    low = min(view["span"][0] for view in views)
    high = max(view["span"][1] for view in views)
    levels = [level for view in views for level in view["levels"] or ()]
    if levels:
        least, most = min(levels), max(levels)
        reach = max(0.75 * (most - least), 1.5)
        low, high = max(low, least - reach), min(high, most + reach)
        if len(set(levels)) <= FEW:  # of 8 bits most may lie where no value is
            low, high = min(low, least), max(high, most)
    margin = 0.02 * (high - low) or 1.0
    return low - margin, high + margin


def _before(panel: Axes, view: View, floor: float) -> None:
    from matplotlib.patches import Polygon

    counts = view["before"]
    low, high = view["span"]
    width = (high - low) / len(counts)
    edges = [low + width * i for i in range(len(counts) + 1)]
    top = max(counts) or 1  # of areas: zeros of a ReLU would leave nothing of the rest in sight
    xs = [x for pair in pairwise(edges) for x in pair]
    ys = [floor - HEIGHT * sqrt(count / top) for count in counts for _ in (0, 1)]
    outline = _corners([(low, floor), *zip(xs, ys, strict=True), (high, floor)])
    panel.add_artist(Polygon(outline, color=SKY, alpha=0.55, linewidth=0, zorder=1))


def _after(panel: Axes, view: View, floor: float) -> None:
    top = max(view["after"]) or 1
    bars = [(x, floor - HEIGHT * sqrt(share / top)) for x, share in _sorted(view) if share > 0]
    if len(view["levels"]) <= FEW:
        panel.vlines(
            [x for x, _ in bars], floor, [y for _, y in bars], color=BLUE, linewidth=1.8, zorder=2
        )
    else:
        xs, ys = zip(*bars, strict=True) if bars else ((), ())
        panel.plot(xs, ys, color=BLUE, linewidth=0.7, zorder=2)


def _sorted(view: View) -> list[tuple[float, float]]:
    return sorted(zip(view["levels"], view["after"], strict=True))


def _staircase(panel: Axes, view: View, floor: float) -> None:
    """The quantizer's function; its lowest value on the row's floor, its highest on top.

    What lies beyond the axis is clipped in drawing: a plateau goes on to the edge.
    """
    xs, ys = view["stairs"]
    least, most = min(ys), max(ys)
    scale = HEIGHT / (most - least or 1.0)
    seen = [(x, floor - scale * (y - least)) for x, y in zip(xs, ys, strict=True)]
    seen = _corners(seen)
    panel.plot(
        [x for x, _ in seen], [y for _, y in seen], color=VERMILLION, linewidth=0.8, zorder=3
    )


def _corners(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points of a staircase without those in the middle of a step."""
    return [
        point
        for i, point in enumerate(points)
        if not 0 < i < len(points) - 1 or len({points[i + d][1] for d in (-1, 0, 1)}) > 1
    ]


def _legend(figure: Figure, *, quantized: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(color=SKY, alpha=0.55, label="before")]
    if quantized:
        handles.append(Line2D([], [], color=BLUE, linewidth=1.8, label="after, on levels"))
        handles.append(Line2D([], [], color=VERMILLION, linewidth=0.8, label="quantizer"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3)

"""Accuracy against what it costs: the figure that says which rung to ship."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .style import COLOURS, INK, MARKERS, WIDTH, new_figure, plain_numbers, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MANY = 14  # points; of more only those on the front are named
SIZE = (280, 155)  # of the axes, about, in typographic points
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Cost:
    """What an accuracy is set against.

    Attributes:
        columns: of the report; the first one that a rung has counts.
        unit: how much of it is 1 on the axis.
    """

    title: str
    axis: str
    columns: tuple[str, ...]
    unit: float


BYTES = Cost(
    "Accuracy and size", "size of the packed file, kB", ("packed_bytes", "ideal_bytes"), 1e3
)
BITOPS = Cost("Accuracy and work", "bit operations per image, 10⁹", ("bitops",), 1e9)


@dataclass(frozen=True)
class Point:
    """A rung: cost in the axis' unit, accuracy in percent."""

    run: str
    stage: str
    cost: float
    accuracy: float


def points_of(rows: Sequence[Mapping[str, Any]], cost: Cost) -> list[Point]:
    """The rungs that are measured, from rows of the report (what is missing there is None)."""
    found = []
    for row in rows:
        accuracies = [row[name] for name in ("deployed_top1", "test_top1")]
        costs = [row[name] for name in cost.columns]
        accuracy = next((value for value in accuracies if value is not None), None)
        spent = next((value for value in costs if value is not None), None)
        if accuracy is not None and spent:
            found.append(Point(row["run"], row["stage"], spent / cost.unit, 100 * accuracy))
    return found


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in both, the cheapest first."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.cost, -point.accuracy)):
        if not best or point.accuracy > best[-1].accuracy:
            best.append(point)
    return best


@styled
def accuracy_against(rows: Sequence[Mapping[str, Any]], cost: Cost) -> Figure:
    """Test accuracy of every rung against its cost, with FP32's line and the Pareto front."""
    points = points_of(rows, cost)
    runs = list(dict.fromkeys(point.run for point in points))
    figure = new_figure(WIDTH, 3.3 + 0.17 * (len(runs) if len(runs) > 1 else 0), cost.title)
    panel = figure.subplots()
    best = front(points)
    panel.plot(
        [p.cost for p in best],
        [p.accuracy for p in best],
        drawstyle="steps-post",
        color=INK,
        linewidth=0.8,
        label="Pareto front",
        zorder=1,
    )
    for place, run in enumerate(runs):
        own = [point for point in points if point.run == run]
        panel.scatter(
            [point.cost for point in own],
            [point.accuracy for point in own],
            s=34,
            color=COLOURS[place % len(COLOURS)],
            marker=MARKERS[place % len(MARKERS)],
            label=run if len(runs) > 1 else "rung",
            zorder=3,
        )
    _full_precision(panel, rows, runs)
    panel.set_xscale("log")
    panel.margins(x=0.16, y=0.14)
    plain_numbers(panel.xaxis)
    panel.set_xlabel(cost.axis)
    panel.set_ylabel("test top-1, %")
    panel.grid(axis="both")
    figure.legend(loc="outside lower center", ncols=3 if len(runs) == 1 else 1)
    _names(panel, points if len(points) <= MANY else best, points)
    return figure


def _full_precision(panel: Axes, rows: Sequence[Mapping[str, Any]], runs: Sequence[str]) -> None:
    """A dashed line for each network's full precision, in its run's colour."""
    known = {(row["run"], row["fp32_top1"]) for row in rows if row["fp32_top1"] is not None}
    label = "FP32" if len(runs) == 1 else "FP32, in the colour of its run"
    for place, run in enumerate(runs):
        for value in sorted(value for owner, value in known if owner == run):
            panel.axhline(
                100 * value,
                color=COLOURS[place % len(COLOURS)],
                # dashes of runs with one network lie in each other's gaps
                linestyle=(7 * place / len(runs), (4, 3)),
                linewidth=1,
                label=label,
            )
            label = ""


def _names(panel: Axes, named: Sequence[Point], points: Sequence[Point]) -> None:
    """Beside each point the rung's name, on the first side where nothing stands yet.

    Args:
        points: all that are drawn.
    """
    to_axes = panel.transScale + panel.transLimits
    shares = to_axes.transform([(point.cost, point.accuracy) for point in points])
    spots = {p: (x * SIZE[0], y * SIZE[1]) for p, (x, y) in zip(points, shares, strict=True)}
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in spots.values()]
    for point in named:
        x, y = spots[point]
        half = 2.6 * len(point.stage)  # of the name's width, in points
        boxes = {
            ("center", "bottom", 0, 6): (x - half, y + 6, x + half, y + 15),
            ("center", "top", 0, -6): (x - half, y - 15, x + half, y - 6),
            ("left", "center", 7, 0): (x + 6, y - 4, x + 6 + 2 * half, y + 4),
            ("right", "center", -7, 0): (x - 6 - 2 * half, y - 4, x - 6, y + 4),
        }
        side = min(boxes, key=lambda side: sum(_overlap(boxes[side], box) for box in taken))
        taken.append(boxes[side])
        across, along, right, up = side
        panel.annotate(
            point.stage,
            (point.cost, point.accuracy),
            xytext=(right, up),
            textcoords="offset points",
            fontsize=8,
            ha=across,
            va=along,
            zorder=4,
        )


def _overlap(one: Box, other: Box) -> float:
    """The area that two boxes share."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0.0) * max(height, 0.0)

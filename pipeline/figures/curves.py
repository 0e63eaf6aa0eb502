"""Accuracy and loss over the training of a whole ladder, on one axis of time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from .style import COLOURS, INK, MARKERS, WIDTH, new_figure, plain_numbers, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

UNITS = ((7200.0, 3600.0, "hours"), (180.0, 60.0, "minutes"), (0.0, 1.0, "seconds"))
NATS = {  # of metrics.jsonl: what it is, the dashes that say so, and the marker of few epochs
    "train_cross_entropy": ("training: cross entropy", "solid", "o"),
    "val_loss": ("validation: cross entropy", (0, (4, 2)), "s"),
    "train_distillation": ("training: distillation", (0, (1, 1.5)), "^"),
}
LINES: dict[str, tuple[str, Any, str]] = {
    **NATS,
    "train_features": ("training: features", (0, (6, 1.5, 1, 1.5)), "D"),
    "train_bins_weight": ("bins of weights", (0, (3, 1, 1, 1, 1, 1)), "P"),
    "train_bins_activation": ("bins of activations", (0, (8, 2)), "X"),
    "train_dampening": ("dampening", (0, (2, 3)), "v"),
}
FEW = 12  # epochs; of more, markers would hide the line


@dataclass(frozen=True)
class Course:
    """How the training of a rung went.

    Attributes:
        epochs: lines of metrics.jsonl.
        test: top-1 of the test split, read once, at the end; None where it is not there yet.
    """

    stage: str
    epochs: Sequence[Mapping[str, Any]]
    test: float | None


@styled
def accuracy_curves(courses: Sequence[Course]) -> Figure:
    """Validation accuracy after each epoch, test accuracy at each rung's end."""
    figure = new_figure(WIDTH, 3.2, "Accuracy over training")
    panel = figure.subplots()
    unit, name = _unit(courses)
    for number, (course, times) in enumerate(_timed(courses, unit)):
        colour = COLOURS[number % len(COLOURS)]
        values = [_percent(line.get("val_top1")) for line in course.epochs]
        marker = MARKERS[number % len(MARKERS)] if len(times) < FEW else None
        panel.plot(times, values, color=colour, marker=marker)
        if course.test is not None and times:
            end: dict[str, Any] = {
                "marker": "*",
                "s": 55,
                "color": colour,
                "edgecolor": INK,
                "linewidth": 0.5,
            }
            panel.scatter([times[-1]], [100 * course.test], zorder=4, **end)
    _key(panel, {"validation": {}, "test, at the end": {"marker": "*", "linestyle": ""}})
    panel.set_ylabel("top-1, %")
    _hand_overs(panel, courses, unit, name)
    return figure


@styled
def loss_curves(courses: Sequence[Course]) -> Figure:
    """The losses after each epoch, on a logarithmic axis."""
    title = "Losses over training"
    drawn = [
        column
        for column in LINES
        if any(line.get(column) for course in courses for line in course.epochs)
    ]
    figure = new_figure(WIDTH, 3.2 + 0.09 * max(0, len(drawn) - 4), title)
    panel = figure.subplots()
    unit, name = _unit(courses)
    few = any(0 < len(course.epochs) < FEW for course in courses)
    for number, (course, times) in enumerate(_timed(courses, unit)):
        for column in drawn:
            _, dashes, marker = LINES[column]
            values = [line.get(column) for line in course.epochs]
            if not any(values):
                continue
            panel.plot(
                times,
                [value if value and value > 0 else float("nan") for value in values],
                color=COLOURS[number % len(COLOURS)],
                linestyle=dashes,
                marker=marker if len(times) < FEW else None,
                markerfacecolor="none",  # equal losses stay both in sight
            )
    panel.set_yscale("log")
    plain_numbers(panel.yaxis)
    hollow = {"markerfacecolor": "none"}
    looks = (LINES[column] for column in drawn)
    _key(panel, {n: {"linestyle": d, "marker": m if few else None, **hollow} for n, d, m in looks})
    panel.set_ylabel("loss, nats" if set(drawn) <= set(NATS) else "loss, each in its own unit")
    _hand_overs(panel, courses, unit, name)
    return figure


def _timed(courses: Sequence[Course], unit: float) -> list[tuple[Course, list[float]]]:
    """Each course with when its epochs ended, in the axis' unit from the ladder's start."""
    start, found = 0.0, []
    for course in courses:
        ends = list(accumulate((line["seconds"] for line in course.epochs), initial=start))
        found.append((course, [end / unit for end in ends[1:]]))
        start = ends[-1]
    return found


def _unit(courses: Sequence[Course]) -> tuple[float, str]:
    total = sum(line["seconds"] for course in courses for line in course.epochs)
    return next((unit, name) for least, unit, name in UNITS if total >= least)


def _hand_overs(panel: Axes, courses: Sequence[Course], unit: float, name: str) -> None:
    """A line where a rung hands over to the next, and between them their names."""
    start = 0.0
    ends = [times[-1] for _, times in _timed(courses, unit) if times]
    trained = [course for course in courses if course.epochs]
    narrow = [e - s < 0.13 * ends[-1] for s, e in zip([0.0, *ends], ends, strict=False)]
    for number, (course, end) in enumerate(zip(trained, ends, strict=True)):
        if number + 1 < len(ends):
            panel.axvline(end, color=INK, linewidth=0.6, linestyle=(0, (2, 2)))
        panel.annotate(
            course.stage,
            ((start + end) / 2, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            color=COLOURS[courses.index(course) % len(COLOURS)],
            fontsize=8,
            ha="left" if any(narrow) else "center",
            va="bottom",
            rotation=35 if any(narrow) else 0,
        )
        start = end
    panel.set_xlim(left=0)
    panel.set_xlabel(f"time of training, {name}")
    panel.grid(axis="y")


def _key(panel: Axes, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """A legend of what the dashes mean; the colours are named above the axes."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=INK, label=label, **look) for label, look in entries.items()]
    figure = panel.figure
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=2)


def _percent(value: float | None) -> float:
    return float("nan") if value is None else 100 * value

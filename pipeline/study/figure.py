"""The figure of a study: every value as a dot, and each arm's mean with its interval."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from .people import shared_by_all, stages
from .tables import Tables
from .trials import Study

if TYPE_CHECKING:
    import pandas as pd

# Okabe and Ito's colours, told apart by every kind of colour vision
DOT, MEAN, LOST = "#56B4E9", "#000000", "#D55E00"
COLUMNS = 3  # panels side by side
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "svg.hashsalt": "bitladder",  # the same study gives the same file
    "svg.fonttype": "none",  # letters stay letters
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw(study: Study, found: Tables) -> dict[str, bytes]:
    """The figure as a PNG and as an SVG; a panel for each stage in which arms differ."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = _panels(study, found)
    across = min(len(panels), COLUMNS)
    down = -(-len(panels) // across)
    rows = [_arms(study, found, stage) for stage in panels]
    tallest = max(map(len, rows))
    widest = max(len(arm) for arms in rows for arm in arms)
    with mpl.rc_context(STYLE):
        width = max(across * (2.9 + 0.075 * widest), 6.0)  # the caption needs so much
        figure = Figure(figsize=(width, down * (1.15 + 0.34 * tallest) + 0.7), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(down, across, squeeze=False).flatten()
        for panel, stage, arms in zip(axes, panels, rows, strict=False):
            _panel(panel, stage, arms, found)
        for panel in axes[len(panels) :]:
            panel.set_axis_off()
        figure.suptitle(study.id, fontsize=10)
        any_lost = (found.seeds["diverged"] > 0).any()
        lost = " (orange: diverged; an arrow: off the scale).\n" if any_lost else ". "
        figure.supxlabel(
            f"test top-1 in %. Dots: seeds{lost}Diamond and bar: mean and its 95 % t-interval\n"
            "(of an arm by itself; arms are compared by paired differences, see the table)",
            fontsize=8,
        )
        return {
            "png": _saved(figure, "png", dpi=150),
            "svg": _saved(figure, "svg", metadata={"Date": None}),
        }


def _saved(figure: Any, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=form, **options)
    return buffer.getvalue()


def _panels(study: Study, found: Tables) -> list[str]:
    """Stages that at least two arms have and do not all share; all stages if there is none."""
    every = stages(found)
    arms = found.seeds.groupby("stage")["arm"].nunique()
    return [s for s in every if arms[s] > 1 and not shared_by_all(study, found, s)] or every


def _arms(study: Study, found: Tables, stage: str) -> list[str]:
    own = set(found.seeds.loc[found.seeds["stage"] == stage, "arm"])
    return [arm for arm in study.arms if arm in own]


def _panel(panel: Any, stage: str, arms: list[str], found: Tables) -> None:
    seeds = found.seeds[found.seeds["stage"] == stage]
    summary = found.summary[found.summary["stage"] == stage].set_index("arm")
    low, high = _limits(seeds, summary)
    for place, arm in enumerate(arms):
        own = seeds[seeds["arm"] == arm].dropna(subset=["test_top1"])
        values = 100 * own["test_top1"].to_numpy(dtype=float)
        heights = [place - 0.14 + offset for offset in _offsets(len(values))]
        colours = [LOST if gone else DOT for gone in own["diverged"] > 0]
        panel.scatter(values, heights, s=16, color=colours, linewidths=0, zorder=2)
        below = [height for value, height in zip(values, heights, strict=True) if value < low]
        edge = {"marker": "<", "s": 18, "color": LOST, "clip_on": False}
        panel.scatter([low] * len(below), below, **edge)  # of chance, and never out of sight
        row = summary.loc[arm]
        if row["mean"] * 100 >= low:
            panel.scatter(
                [100 * row["mean"]], [place + 0.2], marker="D", s=18, color=MEAN, zorder=4
            )
            bounds = [100 * row["low"], 100 * row["high"]]
            panel.plot(bounds, [place + 0.2] * 2, color=MEAN, linewidth=1.2, zorder=3)
        elif len(own):  # the values at chance are off this scale, and so is the mean
            lost = f"{int((own['diverged'] > 0).sum())} of {len(own)} diverged"
            text = f"  {lost}: mean {100 * row['mean']:.1f}"
            panel.text(low, place + 0.2, text, color=LOST, fontsize=7.5, va="center")
            panel.scatter([low], [place + 0.2], marker="x", s=20, color=LOST, clip_on=False)
    panel.set_xlim(low, high)
    panel.set_ylim(len(arms) - 0.45, -0.6)
    panel.set_yticks(range(len(arms)), arms)
    panel.set_title(stage, fontsize=9, loc="left", fontweight="bold")
    panel.grid(axis="x", color="0.9", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.tick_params(axis="y", length=0)
    panel.locator_params(axis="x", nbins=5)


def _offsets(count: int) -> list[float]:
    """Heights of an arm's dots: a seed has the same one in every arm that is finished."""
    step = min(0.07, 0.35 / max(count, 1))
    return [step * (i - (count - 1) / 2) for i in range(count)]


def _limits(seeds: pd.DataFrame, summary: pd.DataFrame) -> tuple[float, float]:
    """The range of the values that did not diverge, and of the intervals of such arms."""
    sound = summary[summary["diverged"] == 0]
    values = [
        *seeds.loc[seeds["diverged"] == 0, "test_top1"].dropna(),
        *sound["low"].dropna(),
        *sound["high"].dropna(),
    ]
    if not values:
        return 0.0, 100.0
    low, high = 100 * min(values), 100 * max(values)
    margin = max(0.06 * (high - low), 0.2)
    return low - margin, high + margin

"""The figures of a study: every value by arm, and the paired differences that decide."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ..figures.style import GREEN, INK, SKY, VERMILLION, WIDTH, new_figure, styled
from .people import shared_by_all, sides, stages
from .tables import Tables, values_by_seed
from .trials import Study

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DOT, MEAN, LOST = SKY, INK, VERMILLION
COLUMNS = 3  # panels side by side
# of verdicts: colour and marker
LOOKS = {
    "arm better": (GREEN, "^"),
    "against better": (VERMILLION, "v"),
    "not resolved": (INK, "D"),
}


def study_figures(study: Study, found: Tables) -> dict[str, Figure]:
    """The figures by name: `study`, and `differences` where the study compares anything."""
    compared = {} if found.comparisons.empty else {"differences": differences(study, found)}
    return {"study": values(study, found), **compared}


@styled
def values(study: Study, found: Tables) -> Figure:
    """Every seed as a dot, each arm's mean with its interval; a panel a stage that differs."""
    panels = _panels(study, found)
    across = min(len(panels), COLUMNS)
    down = -(-len(panels) // across)
    rows = [_arms(study, found, stage) for stage in panels]
    tallest = max(map(len, rows))
    widest = max(len(arm) for arms in rows for arm in arms)
    width = max(across * (2.9 + 0.075 * widest), 6.0)  # the caption needs so much
    figure = new_figure(width, down * (1.15 + 0.34 * tallest) + 0.7, study.id)
    axes = figure.subplots(down, across, squeeze=False).flatten()
    for panel, stage, arms in zip(axes, panels, rows, strict=False):
        _panel(panel, stage, arms, found)
    for panel in axes[len(panels) :]:
        panel.set_axis_off()
    any_lost = (found.seeds["diverged"] > 0).any()
    lost = " (orange: diverged; an arrow: off the scale).\n" if any_lost else ". "
    figure.supxlabel(
        f"test top-1 in %. Dots: seeds{lost}Diamond and bar: mean and its 95 % t-interval\n"
        "(of an arm by itself; arms are compared by paired differences)",
        fontsize=8,
    )
    return figure


@styled
def differences(study: Study, found: Tables) -> Figure:
    """Each comparison's paired differences: seeds as dots, the mean with its 95 % interval."""
    rows = found.comparisons.to_dict("records")
    families = list(dict.fromkeys(row["family"] for row in rows))
    counts = [sum(row["family"] == family for row in rows) for family in families]
    height = 1.35 + sum(0.42 * count + 0.45 for count in counts)
    figure = new_figure(WIDTH * 1.25, height, f"{study.id}: paired differences")
    panels = figure.subplots(
        len(families), 1, squeeze=False, sharex=True, height_ratios=[c + 0.4 for c in counts]
    ).flatten()
    for panel, family in zip(panels, families, strict=True):
        own = [row for row in rows if row["family"] == family]
        _compared(panel, own, found)
        panel.set_title(family, loc="left", fontweight="bold")
    panels[-1].set_xlabel("difference of test top-1, points (arm minus against)")
    _verdicts(figure, {row["verdict"] for row in rows})
    return figure


def _compared(panel: Axes, rows: list[dict[Any, Any]], found: Tables) -> None:
    panel.axvline(0, color=INK, linewidth=0.8)
    for place, row in enumerate(rows):
        arm = values_by_seed(found.seeds, row["arm"], row["stage"])
        against = values_by_seed(found.seeds, row["against"], row["against_stage"])
        pairs = [100 * (arm[seed] - against[seed]) for seed in arm if seed in against]
        panel.scatter(pairs, [place - 0.16] * len(pairs), s=14, color=DOT, linewidths=0, zorder=2)
        if not pairs:
            panel.text(0, place + 0.12, " no pair of seeds yet", fontsize=7.5, va="center")
            continue
        colour, marker = LOOKS[row["verdict"]]
        mean = 100 * row["difference"]
        panel.scatter([mean], [place + 0.14], s=30, color=colour, marker=marker, zorder=4)
        if not math.isnan(row["low_unadjusted"]):
            ends = [100 * row["low_unadjusted"], 100 * row["high_unadjusted"]]
            panel.plot(ends, [place + 0.14] * 2, color=colour, linewidth=1.4, zorder=3)
    panel.set_yticks(range(len(rows)), [sides(row).replace(" at ", "\nat ") for row in rows])
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.tick_params(axis="y", length=0)
    panel.grid(axis="x")
    panel.margins(x=0.08)


def _verdicts(figure: Figure, seen: set[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=DOT, marker="o", linestyle="", label="a pair of seeds")]
    handles += [
        Line2D([], [], color=colour, marker=marker, label=f"mean, 95 %: {verdict}")
        for verdict, (colour, marker) in LOOKS.items()
        if verdict in seen
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)


def _panels(study: Study, found: Tables) -> list[str]:
    """Stages that at least two arms have and do not all share; all stages if there is none."""
    every = stages(found)
    arms = found.seeds.groupby("stage")["arm"].nunique()
    return [s for s in every if arms[s] > 1 and not shared_by_all(study, found, s)] or every


def _arms(study: Study, found: Tables, stage: str) -> list[str]:
    own = set(found.seeds.loc[found.seeds["stage"] == stage, "arm"])
    return [arm for arm in study.arms if arm in own]


def _panel(panel: Axes, stage: str, arms: list[str], found: Tables) -> None:
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
        edge: dict[str, Any] = {"marker": "<", "s": 18, "color": LOST, "clip_on": False}
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
    panel.grid(axis="x")
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

"""Step sizes of every quantizer over the training of a rung."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .style import HALVES, WIDTH, new_figure, plain_numbers, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def has_scales(epochs: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the epochs of a rung tell the step sizes."""
    return any(line.get("scales") for line in epochs)


@styled
def step_sizes(stage: str, epochs: Sequence[Mapping[str, Any]]) -> Figure:
    """The largest step of each quantizer at the end of each epoch.

    Args:
        epochs: lines of metrics.jsonl, with "scales".
    """
    names = list(dict.fromkeys(name for line in epochs for name in line.get("scales") or ()))
    halves = [half for half in HALVES if any(name.endswith(f".{half}") for name in names)]
    figure = new_figure(WIDTH, 0.9 + 1.7 * len(halves), f"{stage}: step sizes over training")
    panels = figure.subplots(len(halves), 1, squeeze=False, sharex=True).flatten()
    for panel, half in zip(panels, halves, strict=True):
        own = [name for name in names if name.endswith(f".{half}")]
        _panel(panel, epochs, own)
        panel.set_title(HALVES[half], loc="left")
        panel.set_ylabel("step")
    panels[-1].set_xlabel("epoch")
    panels[-1].set_xlim(epochs[0]["epoch"] - 0.5, epochs[-1]["epoch"] + 0.5)
    panels[-1].locator_params(axis="x", integer=True, min_n_ticks=1)
    return figure


def _panel(panel: Axes, epochs: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """A line a quantizer, from blue (the first layer) to yellow (the last)."""
    from matplotlib import colormaps

    # told apart by every kind of colour vision; its ends are lost on dark and on light paper
    most = max(len(names) - 1, 1)
    places = [0.12 + 0.75 * number / most for number in range(len(names))]
    shades = [tuple(shade) for shade in colormaps["viridis"](places)]
    for name, shade in zip(names, shades, strict=True):
        found = [
            (line["epoch"], line["scales"][name])
            for line in epochs
            if (line.get("scales") or {}).get(name, 0) > 0
        ]
        panel.plot(
            [epoch for epoch, _ in found],
            [scale for _, scale in found],
            color=shade,
            linewidth=1,
            marker="o" if len(epochs) < 8 else None,
        )
    panel.set_yscale("log")
    plain_numbers(panel.yaxis)
    panel.grid(axis="y")
    if len(names) > 1:
        _order(panel, [name.rpartition(".")[0] for name in names], shades)


def _order(panel: Axes, layers: Sequence[str], shades: Sequence[Any]) -> None:
    """A bar beside the axes, a piece a layer, with names of the first, the middle, and the last.

    Not matplotlib's, which is axes of its own: two of them took a third of the figure's time.
    """
    from matplotlib.collections import LineCollection

    height = 1 / len(layers)
    pieces = [((1.035, i * height), (1.035, (i + 1) * height)) for i in range(len(layers))]
    bar = LineCollection(
        pieces,
        colors=list(shades),
        linewidths=8,
        capstyle="butt",
        transform=panel.transAxes,
        clip_on=False,
    )
    panel.add_collection(bar, autolim=False)
    for i in sorted({0, (len(layers) - 1) // 2, len(layers) - 1}):
        where = (1.065, (i + 0.5) * height)
        panel.text(*where, layers[i], transform=panel.transAxes, fontsize=8, va="center")

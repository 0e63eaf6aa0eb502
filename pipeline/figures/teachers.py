"""Where a student and its teacher say different things."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .style import BLUE, GREEN, INK, ORANGE, PURPLE, SKY, WIDTH, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CLASSES = 12  # at most, those that take part in most disagreements
# of look.json: what is said of it, its colour, its hatch
SHARES = {
    "both": ("both right", GREEN, ""),
    "student": ("student alone right", SKY, "//"),
    "teacher": ("teacher alone right", ORANGE, "||"),  # dots would be 50 kB
    "neither": ("neither", PURPLE, "xx"),
}


@styled
def disagreement(
    stage: str, teacher: str, found: Mapping[str, Any], classes: Sequence[str]
) -> Figure:
    """How many images each gets right, and which classes they take for which.

    Args:
        teacher: the name of its rung.
        found: one teacher's part of look.json.
    """
    shown = _frequent(found["pairs"])
    title = f"{stage} and its teacher {teacher}, on validation"
    figure = new_figure(WIDTH, 2.0 + 0.27 * len(shown), title)
    if not shown:
        _shares(figure.subplots(), found)
    else:
        top, below = figure.subplots(2, 1, height_ratios=[1.1, 0.4 + 0.36 * len(shown)])
        _shares(top, found)
        _pairs(below, found["pairs"], shown, classes)
    return figure


def _frequent(pairs: Sequence[Sequence[int]]) -> list[int]:
    """The classes that take part in most disagreements, in their order."""
    counts: dict[int, int] = {}
    for teacher, student, count in pairs:
        for label in (teacher, student):
            counts[label] = counts.get(label, 0) + count
    return sorted(sorted(counts, key=lambda label: -counts[label])[:CLASSES])


def _shares(panel: Axes, found: Mapping[str, Any]) -> None:
    """One bar of all images, and the numbers in its legend."""
    left = 0.0
    for part, (label, colour, hatch) in SHARES.items():
        share = 100 * found[part] / max(found["images"], 1)
        panel.barh(
            [0],
            [share],
            left=left,
            color=colour,
            hatch=hatch,
            edgecolor=INK,
            linewidth=0.4,
            label=f"{label}: {found[part]}",
        )
        left += share
    panel.set_xlim(0, 100)
    panel.set_yticks([])
    panel.spines["left"].set_visible(False)
    panel.set_xlabel(f"share of {found['images']} images, %")
    panel.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)


def _pairs(
    panel: Axes, pairs: Sequence[Sequence[int]], shown: Sequence[int], classes: Sequence[str]
) -> None:
    place = {label: i for i, label in enumerate(shown)}
    kept = [(t, s, count) for t, s, count in pairs if t in place and s in place]
    most = max(count for _, _, count in kept)
    panel.scatter(
        [place[student] for _, student, _ in kept],
        [place[teacher] for teacher, _, _ in kept],
        s=[30 + 20 * round(8 * count / most) for _, _, count in kept],  # few sizes: a small file
        color=BLUE,
        alpha=0.35,
        linewidths=0,
    )
    for teacher, student, count in kept:
        where = (place[student], place[teacher])
        panel.annotate(str(count), where, ha="center", va="center", fontsize=7.5)
    names = [classes[label] if label < len(classes) else str(label) for label in shown]
    panel.set_xlim(-0.6, len(shown) - 0.4)
    panel.set_ylim(len(shown) - 0.4, -0.6)
    slanted: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    panel.set_xticks(range(len(shown)), names, **(slanted if max(map(len, names)) > 3 else {}))
    panel.set_yticks(range(len(shown)), names)
    panel.set_xlabel("the student says")
    panel.set_ylabel("the teacher says")
    panel.set_title("where they differ: images", loc="left")
    panel.grid()

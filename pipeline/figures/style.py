"""How every figure looks: colours for every kind of colour vision, letters, and its files."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

P = ParamSpec("P")
FORMS = ("png", "svg")
# Okabe and Ito's colours, told apart by every kind of colour vision
BLUE, VERMILLION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY = "#E69F00", "#56B4E9"
HALVES = {"weight": "weights", "activation": "activations"}  # of a layer, as people say
MARKERS = ("o", "s", "D", "^", "v", "P", "X")  # so that nothing is told by colour alone
# of letters and axes, of grids, of the paper: a page may put its own in their place
INK, GRID, PAPER = "#1c1c1c", "#d9d9d9", "#ffffff"
COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, INK)
WIDTH = 4.6  # inches: a column of a paper, and readable on a phone
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 8.5,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "svg.fonttype": "none",  # letters stay letters
    "text.parse_math": False,  # a name with a dollar sign is a name
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titley": 1.0,  # where it would be found to belong, each time anew
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), PAPER),
}


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Makes a function draw in this style, whatever the caller's is."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Figure:
        import matplotlib as mpl

        with mpl.rc_context(STYLE):
            return draw(*args, **kwargs)

    return drawn


def new_figure(width: float, height: float, title: str) -> Figure:
    """An empty figure without a window; width and height in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=9.5, fontweight="bold")
    return figure


def save(figure: Figure, form: str) -> bytes:
    """A figure's file; the same figure gives the same bytes."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.BytesIO()
    # the salt makes what an SVG calls its parts; figures on one page must not share such names
    salt = f"bitladder {figure.get_suptitle()}"
    with mpl.rc_context({**STYLE, "svg.hashsalt": salt}):
        _lay_out(figure)
        if form == "png":
            figure.savefig(buffer, format="png", dpi=160)
            return buffer.getvalue()
        canvas = figure.canvas
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})  # savefig draws twice
        figure.set_canvas(canvas)
    # a hundredth of a point is below what any eye or printer sees
    return rounded(buffer.getvalue().decode(), 2).encode()


def _lay_out(figure: Figure) -> None:
    """Puts the axes where their letters have room, for good."""
    if (engine := figure.get_layout_engine()) is None:
        return
    for panel in figure.axes:
        # what lies within the axes takes no room outside them
        drawn = (*panel.lines, *panel.collections, *panel.patches)
        for artist in (*drawn, *panel.spines.values()):
            artist.set_in_layout(False)
        vars(panel)["get_tightbbox"] = _measured_once(panel)
    engine.execute(figure)
    figure.set_layout_engine("none")  # left in place it is run at every drawing
    for panel in figure.axes:
        del vars(panel)["get_tightbbox"]


def _measured_once(panel: Axes) -> Callable[..., Bbox]:
    """The axes' `get_tightbbox`, which takes what stands around them to be as wide as it was.

    The layout asks twice, and measuring letters is half of the time that a figure takes.
    """
    from matplotlib.transforms import Bbox

    measure = panel.get_tightbbox
    around: list[Any] = []  # left, below, right, above; pixels

    def measured(*args: Any, **options: Any) -> Bbox:
        if not around:
            outer: Any = measure(*args, **options)
            around.append(outer.extents - panel.get_window_extent().extents)
        return Bbox.from_extents(panel.get_window_extent().extents + around[0])

    return measured


def rounded(svg: str, digits: int) -> str:
    """An SVG whose paths have no more than so many digits behind the point."""
    more = re.compile(rf"(?<=\.\d{{{digits}}})\d+")
    return re.sub(r'\s(?:d|x|y)="[^"]*"', lambda path: more.sub("", path[0]), svg)


def plain_numbers(axis: Axis) -> None:
    """Numbers of a logarithmic axis as people write them: 50, not 5 x 10^1."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def layer_rows(panel: Axes, names: Sequence[str], *, named: bool = True) -> None:
    """A row for each layer, the first one on top.

    Names are letters beside the axes: a tick would be five artists, each measured several times,
    which was a third of the time that a page of 20 layers took.
    """
    from matplotlib.transforms import ScaledTranslation

    panel.set_ylim(len(names) - 0.4, -0.6)
    panel.set_yticks([])
    if not named:
        return
    gap = ScaledTranslation(-3.5 / 72, 0, panel.figure.dpi_scale_trans)  # 3.5 points
    beside = panel.get_yaxis_transform() + gap
    longest = max(names, key=len, default="")
    for place, name in enumerate(names):
        text = panel.text(0, place, name, transform=beside, fontsize=8)
        text.set(ha="right", va="center_baseline", in_layout=name == longest)


def row_lines(panel: Axes, count: int) -> None:
    """A thin line through each row, as a grid has."""
    across = panel.get_yaxis_transform()
    panel.hlines(range(count), 0, 1, transform=across, color=GRID, linewidth=0.6, zorder=0.5)

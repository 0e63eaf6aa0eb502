"""Templates and figures made into the text of one self-contained page."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping
from html import escape
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..figures.style import BLUE, GRID, INK, PAPER, VERMILLION, rounded, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TEMPLATES = Path(__file__).parents[1] / "templates"
OWN_COLOURS = {  # the last two are too dark for dark paper
    **{INK: "currentColor", GRID: "var(--grid)", PAPER: "var(--paper)"},
    **{BLUE: "var(--blue)", VERMILLION: "var(--vermillion)"},
}
MOST_SVG = 400_000  # bytes; of a larger one a PNG is embedded
TEXT = ("stage", "state", "model", "quantizer", "teacher", "arm", "arm - against", "verdict")


def render_page(template: str, values: Mapping[str, Any]) -> str:
    """A page from a template and what it shows."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        loader=FileSystemLoader(_TEMPLATES),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["groups_of"] = _groups_of
    page = environment.get_template(template).render(**values, text_columns=TEXT)
    return _with_classes(page)


def _groups_of(
    rows: Iterable[Mapping[str, Any]], name: str
) -> list[tuple[Any, list[Mapping[str, Any]]]]:
    """Rows that stand together and have the same value, behind it; None where they have none."""
    return [(value, list(own)) for value, own in groupby(rows, key=lambda row: row.get(name))]


def embedded(figure: Figure, caption: str) -> str:
    """A figure as part of a page, in the page's own colours; read aloud as its caption."""
    from markupsafe import Markup

    svg = save(figure, "svg").decode()
    if len(svg) > MOST_SVG:
        data = base64.b64encode(save(figure, "png")).decode()
        return Markup(f'<img alt="{escape(caption)}" src="data:image/png;base64,{data}">')
    return inlined(svg, caption)


def inlined(svg: str, caption: str) -> str:
    """An SVG file's drawing, in the page's own colours and without what only a file needs."""
    from markupsafe import Markup

    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)  # names that figures of one page would share
    svg = re.sub(r'\s*xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r"font: ([^;'\"]*)'[^;\"]*", r"font: \1sans-serif", svg)
    for colour, own in OWN_COLOURS.items():
        svg = svg.replace(colour.lower(), own)
    svg = re.sub(r'(<svg [^>]*?)width="([\d.]+)pt" height="[\d.]+pt"', r"\1", svg, count=1)
    svg = rounded(svg, 1)  # points, on a screen
    svg = re.sub(r'\sd="[^"]*"', _shorter, svg)
    svg = re.sub(r' transform="rotate\(-?0 [^"]*"', "", svg)
    svg = re.sub(r">\s+<", "><", svg)
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(caption)}"', 1))


def _shorter(path: re.Match[str]) -> str:
    """A path without what SVG lets one leave out: line breaks, the L of a further line, `.0`."""
    text = re.sub(r"\.0(?=\s)", "", path[0])
    text = re.sub(r"\s+", " ", text)
    return text if "C" in text or "Q" in text else text.replace(" L ", " ")


def _with_classes(page: str) -> str:
    """A page whose drawings name their styles once, at its head: a fifth of its size."""
    names: dict[str, str] = {}

    def named(style: re.Match[str]) -> str:
        return f'class="{names.setdefault(style[1], f"s{len(names)}")}"'

    page = re.sub(r'(?<=\s)style="([^"]*)"', named, page)
    rules = "".join(f".{name}{{{style}}}" for style, name in names.items())
    return page.replace("</head>", f"<style>{rules}</style>\n</head>", 1)

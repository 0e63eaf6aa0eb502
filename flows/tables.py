"""Tables for people: on a terminal as it has room, elsewhere as wide as they need."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

_COLOURS = {"done": "green", "running": "cyan", "failed": "red", "interrupted": "yellow"}
_BLOCKS = ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉", "█")  # eighths of a cell
_PROSE = (
    "what it is",
    "options",
    "source",
    "paper",
    "learns",
    "start",
)  # may fold; what people copy never does


def table_of(
    columns: Iterable[str], *, title: str | None = None, right: Collection[str] = ()
) -> Table:
    """An empty table with these columns; those in `right` hold numbers."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(
            column,
            justify="right" if column in right else "left",
            no_wrap=column not in _PROSE,
            overflow="fold",
        )
    return table


def print_table(table: Table) -> None:
    """Prints to standard output; in a file or a pipe every row is one line, however long."""
    console = Console()
    needed = _measure(table)
    # where even the least is too wide, the terminal breaks the lines, which loses nothing
    width = max(console.width, needed.minimum) if console.is_terminal else needed.maximum
    Console(width=width).print(table, crop=False)


def print_rows(
    rows: Sequence[Mapping[str, str]], *, right: Collection[str], dispensable: Sequence[str]
) -> None:
    """Prints a table of rows by column; on a narrow terminal without some columns, and says so.

    Args:
        dispensable: what may be left out, the first one first.
    """
    columns = list(rows[0])
    possible = [column for column in dispensable if column in columns]

    def without(number: int) -> Table:
        kept = [column for column in columns if column not in possible[:number]]
        table = table_of(kept, right=right)
        for row in rows:
            table.add_row(*(row[column] for column in kept))
        return table

    missing = 0
    if Console().is_terminal:
        fitting = (n for n in range(len(possible) + 1) if fits(without(n)))
        missing = next(fitting, len(possible))
    print_table(without(missing))
    if missing:
        print(f"(no room for {', '.join(possible[:missing])})")


def bars(values: Sequence[float | None], *, width: int = 8) -> list[str]:
    """A bar for each value, as markup; the longest one is of the largest. Below 0 there is none.

    Up to a third of the largest they are green, from two thirds on red.
    """
    largest = max((value for value in values if value is not None), default=0.0)
    if largest <= 0:
        return ["" for _ in values]
    encoding = Console().encoding.lower()
    drawn = []
    for value in values:
        share = max(value or 0.0, 0.0) / largest
        eighths = round(8 * width * share)
        if encoding.startswith("utf"):
            bar = _BLOCKS[8] * (eighths // 8) + _BLOCKS[eighths % 8]
        else:
            bar = "#" * round(width * share)
        colour = "green" if share <= 1 / 3 else "red" if share >= 2 / 3 else "yellow"
        drawn.append(f"[{colour}]{bar}[/]" if bar else "")
    return drawn


def markdown_table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """The same as Markdown; a bar inside a cell is escaped."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    header = list(columns)
    lines = [header, ["---"] * len(header), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fits(table: Table) -> bool:
    """Whether the terminal has room for all columns side by side."""
    return _measure(table).minimum <= Console().width


def coloured(state: str, text: str | None = None) -> str:
    """The text, or the state itself, as markup in the state's colour."""
    return f"[{_COLOURS.get(state, 'default')}]{text or state}[/]"


def _measure(table: Table) -> Measurement:
    console = Console()
    for column in table.columns:
        if column.no_wrap:  # to rich alone this means: rather cut than folded
            cells = (Text.from_markup(str(cell)) for cell in (column.header, *column.cells))
            column.min_width = max(cell.cell_len for cell in cells)
    return Measurement.get(console, console.options.update(width=10_000), table)

import io
import re
import sys

import pytest
from bitladder.flows.check_commands import _print_layers
from bitladder.flows.tables import bars, print_rows

ROWS = [
    {"layer": "conv1", "quantizer": "lsq", "scale": "0.25", "bits": "4"},
    {"layer": "layer1.0.conv2", "quantizer": "uniq", "scale": "0.5", "bits": "2"},
]
WIDTHS = [22, 26, 27, 37, 38, 60]  # with all columns it needs 38


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """Makes standard output a terminal, so many columns wide."""

    def make(width, encoding="utf-8"):
        made = Terminal()
        made.encoding = encoding
        monkeypatch.setattr(sys, "stdout", made)
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setenv("TERM", "xterm-256color")
        for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
            monkeypatch.delenv(name, raising=False)
        return made

    return make


@pytest.mark.parametrize("width", WIDTHS)
def test_a_narrow_terminal_gets_fewer_columns_and_is_told_which(width, terminal):
    out = terminal(width)
    print_rows(ROWS, right=("bits",), dispensable=("quantizer", "scale"))
    header, *lines = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue()).splitlines()
    table = [header, *lines[:2]]
    assert all(len(line.rstrip()) <= width for line in table)
    shown = header.split()
    missing = [column for column in ROWS[0] if column not in shown]
    assert missing == ["quantizer", "scale"][: len(missing)]
    assert lines[2:] == ([f"(no room for {', '.join(missing)})"] if missing else [])
    assert ("scale" in shown) == (width >= 27)
    assert ("quantizer" in shown) == (width >= 38)
    assert lines[1].split()[0] == "layer1.0.conv2"  # what people copy is never cut


def test_a_pipe_gets_every_column_however_narrow(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "10")
    print_rows(ROWS, right=(), dispensable=("quantizer", "scale"))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [list(ROWS[0]), *([*r.values()] for r in ROWS)]


def test_what_quantizers_do_to_the_layers_of_a_resnet_fits_80_columns(terminal):
    out = terminal(80)
    halves = {"weight": ("range_linear", 2, 0.004393, -0.1612), "activation": ("lsq", 2, 1.2, -1.6)}
    row = {"layer": "layer2.0.shortcut"}
    for half, (name, bits, scale, low) in halves.items():
        values = {"quantizer": name, "bits": bits, "scale": scale, "low": low, "high": 0.0806}
        values |= {"levels": 4, "clipped": 0.1234, "sqnr_db": -10.25}
        row |= {f"{half}_{fact}": value for fact, value in values.items()}
    _print_layers([row])
    header, *lines, missing = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue()).splitlines()
    assert missing == "(no room for quantizer)"
    shown = " ".join(header.split())
    assert shown == "layer of bits scale clip range levels clip % SQNR dB"
    assert lines[0].split()[:4] == ["layer2.0.shortcut", "W", "2", "0.00439"]
    assert all(len(line.rstrip()) <= 80 for line in (header, *lines))


def text_of(bar):
    return re.sub(r"\[[^]]*\]", "", bar)


def test_bars_are_as_long_as_their_values(terminal):
    terminal(80)
    drawn = [text_of(bar) for bar in bars([0.0, 0.01, 0.02, 0.04, -0.01, None], width=8)]
    assert drawn == ["", "██", "████", "████████", "", ""]
    assert [text_of(bar) for bar in bars([0.015, 0.04], width=4)] == ["█▌", "████"]
    assert bars([0.0, None]) == ["", ""]


def test_bars_need_no_more_than_ascii_where_there_is_no_more(terminal):
    terminal(80, "ascii")
    assert [text_of(bar) for bar in bars([0.01, 0.04], width=8)] == ["##", "########"]


def test_only_a_terminal_gets_colours(terminal, capsys):
    rows = [{"stage": "w2a2", "lost": bars([1.0])[0]}]
    print_rows(rows, right=(), dispensable=())
    assert "\x1b" not in capsys.readouterr().out
    out = terminal(80)
    print_rows(rows, right=(), dispensable=())
    assert "\x1b[31m" in out.getvalue()

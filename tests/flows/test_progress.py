import io
import re

import pytest
from bitladder.flows.progress import (
    broadcast,
    describe,
    duration,
    filled,
    log_listener,
    terminal_listener,
    throttled,
)
from bitladder.pipeline.events import Event
from rich.console import Console

W8 = {"stage": "w8a8", "position": 1, "stages": 5, "epochs": 20}
STEP = Event("step", epoch=3, fraction=0.16, loss=0.25, seconds_left=42.0, **W8)
EPOCH = Event("epoch", epoch=4, fraction=0.2, loss=0.24, accuracy=0.98611, **W8)
STARTED = Event("started", **W8)
FINISHED = Event("finished", metrics={"val_top1": 0.9889, "test_top1": 0.9917}, **W8)


class Terminal(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """Makes a console on a terminal, so many columns wide."""
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("TTY_INTERACTIVE", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    return lambda width: Console(file=Terminal(), width=width, force_terminal=True)


def plain(text):
    """The text without what moves the cursor and sets colours."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_events_in_training_pass_once_in_so_many_seconds_and_others_at_once():
    heard, clock = [], Clock()
    listener = throttled(heard.append, seconds=10, clock=clock)
    listener(STARTED)
    for _ in range(250):  # 25 s, ten a second
        clock.now += 0.1
        listener(STEP)
    listener(FINISHED)
    assert heard == [STARTED, STEP, STEP, FINISHED]


def test_a_broadcast_reaches_every_listener_in_order():
    heard = []
    broadcast(lambda e: heard.append(("a", e)), lambda e: heard.append(("b", e)))(STEP)
    assert heard == [("a", STEP), ("b", STEP)]


def test_a_step_is_filled_with_the_accuracy_of_its_own_stage_only():
    heard = []
    listener = filled(heard.append)
    for event in (EPOCH, STEP, Event("step", stage="w4a4", position=2, stages=5)):
        listener(event)
    assert [event.accuracy for event in heard] == [0.98611, 0.98611, None]
    assert heard[1].loss == STEP.loss


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (STARTED, "2/5 w8a8 started"),
        (Event("started", epoch=3, **W8), "2/5 w8a8 goes on after epoch 3/20"),
        (STEP, "2/5 w8a8 epoch 3/20, loss 0.2500, 0:42 left"),
        (EPOCH, "2/5 w8a8 epoch 4/20, loss 0.2400, accuracy 98.61 %"),
        (FINISHED, "2/5 w8a8 finished, validation 98.89 %, test 99.17 %"),
        (Event("reused", **W8), "2/5 w8a8 was there already"),
        (Event("waiting", text="process 7", **W8), "2/5 w8a8 waits for process 7"),
        (Event("message", text="parent changed", **W8), "2/5 w8a8: parent changed"),
        (Event("failed", text="loss is nan", **W8), "2/5 w8a8 failed: loss is nan"),
    ],
)
def test_every_kind_of_event_has_its_line(event, line):
    assert describe(event) == line


@pytest.mark.parametrize(
    ("seconds", "text"), [(-1, "0:00"), (59.6, "1:00"), (3723, "1:02:03"), (90000, "25:00:00")]
)
def test_durations_read_as_on_a_clock(seconds, text):
    assert duration(seconds) == text


def test_a_log_has_whole_lines_and_few_of_training():
    lines = []
    listener = log_listener(lines.append)
    for event in (STARTED, *[STEP, EPOCH] * 100, FINISHED):
        listener(event)
    assert [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in lines] == [
        "2/5 w8a8 started",
        "2/5 w8a8 finished, validation 98.89 %, test 99.17 %, took 0:00",
    ]


@pytest.mark.parametrize("why", ["pipe", "coloured pipe", "CI", "dumb terminal"])
def test_where_nobody_watches_there_are_plain_lines(why, terminal, monkeypatch):
    if "pipe" in why:
        console = Console(file=io.StringIO(), width=20, force_terminal=why == "coloured pipe")
    else:
        name, value = {"CI": ("CI", "true"), "dumb terminal": ("TERM", "dumb")}[why]
        monkeypatch.setenv(name, value)
        console = terminal(20)
    with terminal_listener(console) as listener:
        for event in (STARTED, STEP, Event("message", text="see [red]/a[/red]", **W8), FINISHED):
            listener(event)
    lines = console.file.getvalue().splitlines()
    assert [line[9:] for line in lines] == [
        "2/5 w8a8 started",
        "2/5 w8a8: see [red]/a[/red]",
        "2/5 w8a8 finished, validation 98.89 %, test 99.17 %, took 0:00",
    ]


def test_a_terminal_shows_a_bar_while_training_and_a_line_when_done(terminal):
    console = terminal(120)
    with terminal_listener(console) as listener:
        for event in (STARTED, STEP, EPOCH):
            listener(event)
        during = len(console.file.getvalue())
        listener(FINISHED)
    shown = plain(console.file.getvalue())
    assert "2/5 w8a8 finished, validation 98.89 %, test 99.17 %, took 0:00\n" in shown
    assert "finished" not in plain(console.file.getvalue()[:during])


@pytest.mark.parametrize("width", [24, 46, 66, 72, 80, 120])
def test_a_bar_keeps_to_one_line_of_the_terminal(width, terminal):
    from bitladder.flows.progress import _Bars, _columns
    from rich.progress import Progress

    console = terminal(width)
    progress = Progress(*_columns(console.width), console=console, auto_refresh=False)
    listener = filled(_Bars(progress))
    for event in (STARTED, EPOCH, STEP):
        listener(event)
    lines = console.render_lines(progress.get_renderable())
    text = "".join(segment.text for segment in lines[0])
    assert len(lines) == 1
    assert len(text) <= width
    assert "0:42 left" in text
    assert "w8a8" in text
    assert ("epoch 3/20" in text) == (width >= 46)
    assert ("accuracy 98.61 %" in text) == (width >= 66)
    assert ("loss 0.2500" in text) == (width >= 80)


def test_drawing_is_throttled_however_fast_the_events_come(terminal):
    console = terminal(120)
    with terminal_listener(console) as listener:
        listener(STARTED)
        for _ in range(5000):
            listener(STEP)
    frames = console.file.getvalue().count("w8a8")
    assert frames < 50

"""Which rungs `ladder: auto` takes: a pure function of its rules and of the validation so far.

From FP32 both widths go down 8, 4, 2, 1, each as far as its target. A rung that loses more than
`step_budget` against the rung it starts from, or more than `budget` against FP32, gets another one
put between and is tried again from that: first one at the middle of both widths (3 bits between 4
and 2), then, or where there is no middle, one where half of the step is done: the activations' half
where they go to one bit (W2A1 before W1A1), else the weights' (W2A3 before W2A2). A rung between is
held to the same rules, and there are at most `insertions` of them in all.

Where nothing more can come between, or a second try is no better than the first, the best try is
kept if it is within `budget`; if not, the ladder ends, and its result is the last rung kept.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from .config import AutoConfig
from .record import StageRecord
from .run import Run

Widths = tuple[int, int]  # of weights and of activations
FP32: Widths = (32, 32)
_DOWN = (8, 4, 2, 1)
_ROUNDING = 1e-9  # 0.99 - 0.98 is a little more than 0.01


@dataclass(frozen=True)
class Rung:
    """A rung to run.

    Attributes:
        kept: names of the rungs above that were kept; it starts from the last of them.
        reason: why it is run, where that is not the plain way down.
    """

    name: str
    widths: Widths
    kept: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class End:
    """That no rung follows: which one the ladder has come to, and why it stops there."""

    result: str
    reason: str


@dataclass(frozen=True)
class Course:
    """What a ladder did, and what comes next.

    Attributes:
        rungs: those that have run and, where the ladder has not ended, the next one.
        notes: for each rung, why it was run and what came of it, and with the last one why the
            ladder ends there; empty where nothing is to say.
        end: None while there is a next rung.
    """

    rungs: tuple[Rung, ...]
    notes: tuple[str, ...]
    end: End | None


def next_rung(auto: AutoConfig, val_top1: Sequence[float]) -> Rung | End:
    """The rung to run now, or the end.

    Args:
        val_top1: validation accuracy of every rung so far, in the order in which they ran.
    """
    found = course(auto, val_top1)
    return found.end or found.rungs[-1]


def course(auto: AutoConfig, val_top1: Sequence[float]) -> Course:
    """All that a ladder did on the way to these accuracies, and what comes next."""
    descent = _Descent(auto)
    steps = descent.steps()
    rungs, end = [next(steps)], None
    for top1 in val_top1:
        try:
            rungs.append(steps.send(top1))
        except StopIteration as stop:
            end = stop.value
            break
    said = descent.verdicts if end is not None else [*descent.verdicts, []]
    if end is not None:
        said[-1].append(f"the ladder ends: {end.reason}")
    notes = ("; ".join(filter(None, [r.reason, *v])) for r, v in zip(rungs, said, strict=True))
    return Course(tuple(rungs), tuple(notes), end)


def recorded_course(run: Run, read: Callable[[str], StageRecord | None]) -> Course | None:
    """The course of a registered ladder as far as it has records; None: its rungs are given.

    Args:
        read: gives the record of a key, if there is one.
    """
    raw = run.config.get("auto")
    if raw is None:
        return None
    val_top1 = []
    for stage in run.stages:
        if (record := read(str(stage["key"]))) is None:
            break
        val_top1.append(record.metrics["val_top1"])
    return course(AutoConfig.model_validate({**raw, "rungs": {}}), val_top1)


def is_over(run: Run, read: Callable[[str], StageRecord | None]) -> bool:
    """Whether no rung follows the ones that a run has registered."""
    found = recorded_course(run, read)
    return found is None or found.end is not None


def possible_rungs(auto: AutoConfig) -> list[Widths]:
    """The widths of every rung that the ladder may come to, the widest first."""
    found: set[Widths] = {FP32}

    def add(above: Widths, below: Widths) -> None:
        found.add(below)
        for middle in between(above, below):
            add(above, middle)
            add(middle, below)

    way = [FP32, *way_down(auto)]
    for above, below in pairwise(way):
        add(above, below)
    return sorted(found, reverse=True)


def way_down(auto: AutoConfig) -> list[Widths]:
    """The rungs below FP32 if nothing has to come between."""
    target = (auto.weight_bits, auto.activation_bits)
    way = ((max(bits, target[0]), max(bits, target[1])) for bits in _DOWN)
    return list(dict.fromkeys(way))


def between(above: Widths, below: Widths) -> list[Widths]:
    """What may come between two rungs, to be tried in this order."""
    # nothing is gained by widths between 32 and 8, which lose next to nothing
    middle = tuple((a + b) // 2 if a <= 8 else b for a, b in zip(above, below, strict=True))
    half = (above[0], below[1]) if below[1] == 1 else (below[0], above[1])
    found = dict.fromkeys(((middle[0], middle[1]), half))
    return [widths for widths in found if widths not in (above, below)]


def label(widths: Widths) -> str:
    """A rung's name: `fp32`, `w8a8`, `w1a2`."""
    return "fp32" if widths == FP32 else f"w{widths[0]}a{widths[1]}"


@dataclass(frozen=True)
class _Try:
    """A rung that has run; `position` is its place among all that have."""

    name: str
    position: int
    widths: Widths
    top1: float


class _Descent:
    """The way down: yields the rung to run and is sent its accuracy.

    Attributes:
        verdicts: what came of each rung.
    """

    def __init__(self, auto: AutoConfig) -> None:
        self.verdicts: list[list[str]] = []
        self._auto = auto
        self._way = [FP32, *way_down(auto)]
        self._kept: list[_Try] = []
        self._inserted = 0
        self._names: dict[str, int] = {}

    def steps(self) -> Generator[Rung, float, End]:
        """From FP32 to the end."""
        for widths in self._way:
            if (yield from self._go_down(widths, "")) is None:
                reason = f"{label(widths)} loses more than {_points(self._auto.budget)} points"
                return self._end(reason)
        return self._end(f"the target {label(self._way[-1])} is reached")

    def _end(self, reason: str) -> End:
        fp32, result = self._kept[0], self._kept[-1]
        where = "" if result is fp32 else f", in validation {_distance(result, fp32)}"
        return End(result.name, f"{reason}; the result is {result.name}{where}")

    def _go_down(self, widths: Widths, reason: str) -> Generator[Rung, float, _Try | None]:
        """Tries a rung, as often as something can come between; None: it was not kept."""
        best = yield from self._try(widths, reason)
        tried: set[tuple[str, Widths]] = set()
        above = self._kept[-1] if self._kept else best
        while fault := self._fault(best, above):
            start = self._kept[-1]
            free = [w for w in between(start.widths, widths) if (start.name, w) not in tried]
            if not self.verdicts[best.position]:
                self._say(best, fault)
            if not free or self._inserted == self._auto.insertions:
                left = "nothing more can come between" if not free else "no insertion is left"
                self._say(best, left)
                break
            middle = free[0]
            tried.add((start.name, middle))
            self._inserted += 1
            self._say(best, f"{label(middle)} comes between")
            text = f"put between {start.name} and {label(widths)}"
            if (yield from self._go_down(middle, text)) is None:
                continue
            above = self._kept[-1]
            again = yield from self._try(widths, f"again, from {above.name}")
            if again.top1 <= best.top1:
                self._say(again, f"{_distance(again, best)}: the new start does not help")
                break
            best = again
        return self._judge(best, above)

    def _try(self, widths: Widths, reason: str) -> Generator[Rung, float, _Try]:
        name = label(widths)
        self._names[name] = count = self._names.get(name, 0) + 1
        name = name if count == 1 else f"{name}-{count}"
        top1 = yield Rung(name, widths, tuple(rung.name for rung in self._kept), reason)
        self.verdicts.append([])
        return _Try(name, len(self.verdicts) - 1, widths, top1)

    def _judge(self, best: _Try, above: _Try) -> _Try | None:
        """Keeps a rung that is within the budget."""
        if self._kept and self._lost(best) > self._auto.budget + _ROUNDING:
            self._say(best, "not kept")
            return None
        if best is not above:
            said = self.verdicts[best.position]
            self._say(best, "kept" if said else f"{_distance(best, above)}: kept")
        self._kept.append(best)
        return best

    def _fault(self, rung: _Try, above: _Try) -> str:
        """What is wrong with a rung; empty if nothing is."""
        if not self._kept:
            return ""
        if self._lost(rung) > self._auto.budget + _ROUNDING:
            allowed = _points(self._auto.budget)
            return f"{_distance(rung, self._kept[0])}, more than the budget of {allowed}"
        if above.top1 - rung.top1 > self._auto.step + _ROUNDING:
            allowed = _points(self._auto.step)
            return f"{_distance(rung, above)}, more than the {allowed} of a step"
        return ""

    def _lost(self, rung: _Try) -> float:
        return self._kept[0].top1 - rung.top1

    def _say(self, rung: _Try, text: str) -> None:
        self.verdicts[rung.position].append(text)


def _distance(rung: _Try, other: _Try) -> str:
    lost = other.top1 - rung.top1
    return f"{_points(abs(lost))} points {'below' if lost >= 0 else 'above'} {other.name}"


def _points(fraction: float) -> str:
    return f"{100 * fraction:.2f}"

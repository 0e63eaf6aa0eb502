"""Which figures there are of a ladder, and what each of them says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ..history import epochs_of
from ..look import read_look
from ..run import Run
from ..store import Store
from .curves import Course, accuracy_curves, loss_curves
from .pareto import BITOPS, BYTES, accuracy_against, points_of
from .per_layer import ERRORS, FACTS, facts_of, known, level_use, quantization_error
from .ridges import can_draw, is_quantized, ridges
from .steps import has_scales, step_sizes
from .teachers import disagreement

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Drawn:
    """A figure that can be drawn.

    Attributes:
        name: of its file, without a suffix.
        run: whose it is; None: of all runs together.
        stage: the rung that it is of; None: of all.
        caption: how to read it.
        draw: draws it.
    """

    name: str
    run: str | None
    stage: str | None
    caption: str
    draw: Callable[[], Figure]


def ladder_figures(
    store: Store | None, runs: Sequence[Run], rows: Sequence[Row]
) -> Iterator[Drawn]:
    """The figures of some runs.

    Args:
        store: where they are; None where there are none, and only `rows` are drawn.
        rows: of a report; what is missing is None.
    """
    for name, cost in (("accuracy-bytes", BYTES), ("accuracy-bitops", BITOPS)):
        if points_of(rows, cost):
            draw = partial(accuracy_against, rows, cost)
            yield Drawn(name, None, None, _PARETO, draw)
    if store is None:
        return
    for run in runs:
        yield from _of_run(store, run, "" if len(runs) == 1 else f"{run.run}-")


def _of_run(store: Store, run: Run, prefix: str) -> Iterator[Drawn]:
    courses = [course_of(store, stage) for stage in run.stages]
    if any(course.epochs for course in courses):
        accuracies, losses = partial(accuracy_curves, courses), partial(loss_curves, courses)
        yield Drawn(f"{prefix}curves-accuracy", run.run, None, _ACCURACY, accuracies)
        yield Drawn(f"{prefix}curves-loss", run.run, None, _LOSS, losses)
    for stage, course in zip(run.stages, courses, strict=True):
        for name, caption, drawing in _of_stage(store, run, stage, course):
            full = f"{prefix}{stage['name']}-{name}"
            yield Drawn(full, run.run, str(stage["name"]), caption, drawing)


def _of_stage(
    store: Store, run: Run, stage: Row, course: Course
) -> Iterator[tuple[str, str, Callable[[], Figure]]]:
    name = str(stage["name"])
    record = store.read(stage["key"])
    look = (read_look(store, record) if record else None) or {}
    layers = look.get("layers", ())
    if can_draw(layers, "weight"):
        caption = _RIDGES if is_quantized(layers, "weight") else _FULL
        yield "weights", caption, partial(ridges, name, layers, "weight")
    if can_draw(layers, "activation"):  # of inputs in float there is no view
        yield "activations", _RIDGES + _IMAGES, partial(ridges, name, layers, "activation")
    facts = facts_of(record.metrics.get("layers", ()), layers) if record else []
    if known(facts, FACTS):
        yield "levels", _LEVELS, partial(level_use, name, facts)
    if known(facts, ERRORS):
        yield "error", _ERROR, partial(quantization_error, name, facts)
    if has_scales(course.epochs):
        yield "steps", _STEPS, partial(step_sizes, name, course.epochs)
    for found in look.get("teachers", ()):
        teacher = run.named(found["key"])
        draw = partial(disagreement, name, teacher, found, look.get("classes", ()))
        yield found["role"], _TEACHER, draw


def course_of(store: Store, stage: Row) -> Course:
    """How a rung's training went, as far as it has come."""
    record = store.read(stage["key"])
    test = record.metrics.get("test_top1") if record else None
    return Course(str(stage["name"]), epochs_of(store, str(stage["key"])), test)


_PARETO = (
    "Accuracy of the packed network on the test split. Dashed: full precision. Line: the Pareto "
    "front, rungs that no other beats in both. Each rung was trained once."
)
_ACCURACY = (
    "Validation accuracy after each epoch; a star is the test accuracy, read once at the end of a "
    "rung. A dashed line is where a rung hands its weights to the next."
)
_LOSS = (
    "Mean loss of each epoch, before weights; rungs in the colours of the names above. "
    "Distillation is against each rung's own teacher, so it is not comparable between rungs."
)
_HEIGHTS = "Heights are square roots, each to its own scale."
_RIDGES = (
    "A row is a layer: values before quantization (light), shares on the levels after it (bars), "
    f"and the quantizer's function (thin line). {_HEIGHTS}"
)
_FULL = f"A row is a layer: how its values are spread; nothing is quantized. {_HEIGHTS}"
_IMAGES = " From up to 256 validation images."
_LEVELS = (
    "How many of its 2^bits levels a layer uses, and how many values lie beyond the outermost."
)
_ERROR = (
    "Signal to quantization noise: 6 dB are about one bit. BR effectiveness, where shown: how "
    "tightly the values of a bin stand around its level."
)
_STEPS = (
    "The step of each quantizer at the end of each epoch; of several scales in a layer the largest."
)
_TEACHER = "On the whole validation split; the classes with the most disagreements."

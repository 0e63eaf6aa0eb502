"""TensorBoard: the curves of a whole ladder on one axis, and histograms of its layers.

One folder a run, `reports/<run>/tensorboard`. A step of the axis is an epoch, counted from the
first epoch of the first rung, so that the rungs stand one behind the other. All curves come of
`metrics.jsonl`: what was not written while a stage was trained (it was killed, or trained for
another ladder) is written when the stage is there.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..quant.layers import QUANTIZABLE
from ..quant.probing import evaluating
from ..quant.record import record
from ..quant.swap import quant_layers
from .config import RunConfig, RuntimeConfig
from .data import DataBundle
from .errors import ConfigError
from .history import epochs_of
from .record import StageRecord
from .spec import Plan, PlannedStage
from .store import Store

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary

FOLDER = "tensorboard"
IMAGES = 128  # of validation, for the histograms of activations
BINS = 64
_TAGS = {
    "train_loss": "loss/total",
    "val_loss": "loss/validation",
    "val_top1": "accuracy/validation",
    "test_top1": "accuracy/test",
    "lr": "learning_rate/weights",
    "weights_oscillating": "oscillation/oscillating",
    "weights_frozen": "oscillation/frozen",
    "images_per_second": "speed/images_per_second",
}


def require_tensorboard(runtime: RuntimeConfig) -> None:
    """Says before anything is trained that what the config asks for is not installed.

    Raises:
        ConfigError: how to install it.
    """
    if runtime.tensorboard and find_spec("tensorboard") is None:
        raise ConfigError(
            [
                "runtime.tensorboard: needs the package tensorboard; install it with: "
                "pip install 'bitladder[tensorboard]'"
            ]
        )


def charts_of(store: Store, plan: Plan, stage: PlannedStage) -> Charts | None:
    """What a rung is charted with; None where that is not asked for, or the plan is no run."""
    runtime, folder = plan.config.runtime, store.reports / plan.run
    if not runtime.tensorboard or not folder.is_dir():  # a study's trial has no folder
        return None
    rung = plan.config.ladder[stage.position]
    return Charts(
        folder / FOLDER,
        first=_first_step(plan.config, stage.position),
        epochs=rung.train.epochs,
        bits=(rung.weight_bits, rung.activation_bits),
        histogram_epochs=runtime.histogram_epochs,
    )


def chart_result(store: Store, plan: Plan, stage: PlannedStage, done: StageRecord) -> None:
    """Adds to the charts what they do not have yet of a stage that is done."""
    charts = charts_of(store, plan, stage)
    if charts is None:
        return
    charts.add(epochs_of(store, done.key), result=done.metrics)


@dataclass
class Charts:
    """The event files of a run, for one of its rungs.

    It can be sent to another process before its first use.

    Attributes:
        folder: of the run's event files.
        first: the rung's place on the axis: its epoch n is step first + n.
        epochs: of the rung.
        bits: of weights and activations.
        histogram_epochs: between two histograms of each layer; 0 for none.
    """

    folder: Path
    first: int
    epochs: int
    bits: tuple[int, int]
    histogram_epochs: int
    _file: Path | None = None
    _images: Tensor | None = None
    _known: dict[tuple[str, int], float | None] | None = field(default=None, repr=False)

    def epoch(self, student: nn.Module, data: DataBundle, history: list[dict[str, Any]]) -> None:
        """To be called after each epoch, with the metrics of all so far.

        Draws nothing at random and leaves the student as it is.
        """
        every, done = self.histogram_epochs, len(history)
        wanted = every > 0 and (done % every == 0 or done == self.epochs)
        self.add(history, lambda: self._histograms(student, data) if wanted else ())

    def add(
        self,
        history: Sequence[Mapping[str, Any]],
        histograms: Callable[[], Sequence[Summary.Value]] = tuple,
        *,
        result: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes what is not there yet; a point that has another value now takes its place.

        Args:
            history: the epochs' lines of `metrics.jsonl`.
            histograms: gives those of the last epoch.
            result: the row of a stage that is done.
        """
        rows = [(self.first + int(line["epoch"]), dict(line)) for line in history]
        if result is not None and rows:
            rows[-1][1]["test_top1"] = result["test_top1"]
        elif result is not None:  # of a rung that was not trained
            known = {name: result[name] for name in ("val_loss", "val_top1", "test_top1")}
            rows = [(self.first + 1, known)]
        for step, line in rows:
            values = [_point(tag, value) for tag, value in _points(line, self.bits)]
            last = step == self.first + len(history)
            self._write(step, values, histograms() if last else ())

    def _write(
        self, step: int, points: Sequence[Summary.Value], histograms: Sequence[Summary.Value]
    ) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary

        known = self._read()
        again = [p for p in points if known.get((p.tag, step), p.simple_value) != p.simple_value]
        events = []
        if again:  # trained anew, with other numbers: readers drop what they had from here on
            restart = SessionLog(status=SessionLog.START)
            events.append(Event(wall_time=time.time(), step=step, session_log=restart))
            for tag, place in list(known):
                if place >= step:
                    del known[tag, place]
        values = [v for v in (*points, *histograms) if (v.tag, step) not in known]
        if not values:
            return
        events.append(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        self._append(events)
        known.update({(v.tag, step): _number(v) for v in values})

    def _append(self, events: Sequence[Any]) -> None:
        """Each process and each stage has a file of its own, opened for the moment of writing."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        if self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            # readers take the files of a folder in the order of their names
            place = f"{time.time_ns():020d}.{platform.node()}.{os.getpid()}"
            self._file = self.folder / f"events.out.tfevents.{place}"
            events = [Event(wall_time=time.time(), file_version="brain.Event:2"), *events]
        with self._file.open("ab") as file:
            writer = RecordWriter(file)
            for event in events:
                writer.write(event.SerializeToString())

    def _read(self) -> dict[tuple[str, int], float | None]:
        """Which points are there, and their values; of histograms None."""
        if self._known is None:
            self._known = {}
            for path in sorted(self.folder.glob("*tfevents*")):
                for event in _events(path):
                    if event.HasField("session_log"):
                        kept = self._known.items()
                        self._known = {k: v for k, v in kept if k[1] < event.step}
                    for value in event.summary.value:
                        self._known[value.tag, event.step] = _number(value)
        return self._known

    @torch.no_grad()
    def _histograms(self, student: nn.Module, data: DataBundle) -> list[Summary.Value]:
        """Weights and inputs of each layer, before and after quantization."""
        found = []
        layers: Mapping[str, Any] = quant_layers(student) or _float_layers(student)
        for name, layer in layers.items():
            found.append(_histogram(f"weights/{name}/float", layer.weight))
            if getattr(layer, "weight_quantizer", None) is not None:
                after = layer.weight_quantizer.encode(layer.weight).dequantize()
                found.append(_histogram(f"weights/{name}/quantized", after))
        inputs = [n for n, m in quant_layers(student).items() if m.input_quantizer is not None]
        if not inputs:
            return found
        if self._images is None:
            device = next(student.parameters()).device
            self._images, _ = next(data.validation.evaluation_batches(IMAGES, device))

        def reduce(when: str) -> Callable[[str, Tensor], None]:
            return lambda name, x: found.append(_histogram(f"activations/{name}/{when}", x))

        with ExitStack() as stack:
            stack.enter_context(evaluating(student))
            stack.enter_context(record(student, inputs, "input", reduce=reduce("float")))
            stack.enter_context(record(student, inputs, "quantized", reduce=reduce("quantized")))
            student(self._images)
        return found


def _first_step(config: RunConfig, position: int) -> int:
    """Where a rung begins on the axis; one that is not trained has one place."""
    return sum(max(rung.train.epochs, 1) for rung in config.ladder[:position])


def _points(line: Mapping[str, Any], bits: tuple[int, int]) -> Iterator[tuple[str, float]]:
    """The curves' points of one epoch, by tag."""
    for name, value in line.items():
        if name == "scales":
            yield from ((f"step_size/{tensor}", scale) for tensor, scale in value.items())
        elif name == "lr_quantizers":  # of each group that has a rate of its own
            names = ["quantizers", *(f"quantizers_{n}" for n in range(2, len(value) + 1))]
            yield from ((f"learning_rate/{n}", lr) for n, lr in zip(names, value, strict=True))
        elif name in _TAGS:
            yield _TAGS[name], value
        elif name.startswith("train_"):
            yield f"loss/{name.removeprefix('train_')}", value
    yield "rung/weight_bits", bits[0]
    yield "rung/activation_bits", bits[1]


def _point(tag: str, value: float) -> Summary.Value:
    from tensorboard.compat.proto.summary_pb2 import Summary

    return Summary.Value(tag=tag, simple_value=value)


def _number(value: Summary.Value) -> float | None:
    return value.simple_value if value.HasField("simple_value") else None


def _histogram(tag: str, x: Tensor) -> Summary.Value:
    """Counts over equal bins from the least to the largest value."""
    from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary

    x = x.detach().float().flatten()
    low, high = (float(end) for end in torch.aminmax(x))
    width = (high - low or 1.0) / BINS
    counts = torch.histc(x, BINS, low, low + BINS * width)
    sums = torch.stack([x.double().sum(), x.double().square().sum()]).tolist()
    histogram = HistogramProto(
        min=low,
        max=high,
        num=x.numel(),
        sum=sums[0],
        sum_squares=sums[1],
        bucket_limit=[low + width * (n + 1) for n in range(BINS)],
        bucket=counts.tolist(),
    )
    return Summary.Value(tag=tag, histo=histogram)


def _float_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if type(module) in QUANTIZABLE}


def _events(path: Path) -> Iterator[Any]:
    """The events of a file, up to where its writer was killed."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    for record_ in RawEventFileLoader(str(path)).Load():
        yield Event.FromString(record_)

"""How fast a packed network runs beside its float32 original, in each runtime that is there."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from ..quant.export.canonical import make_canonical
from .errors import ConfigError
from .exported import gains_by_vnni, write_onnx, write_openvino
from .network import build_network
from .packed_file import PackedModel
from .runtimes import NeedsVnni, Opened, in_pytorch, open_onnx, open_openvino
from .timing import Case, in_turns

BATCHES = (1, 64)
ROUNDS, WARM_UP = 21, 5
Pairs = dict[str, tuple[Opened, Opened]]  # the packed network and its original, by runtime


@dataclass(frozen=True)
class Speed:
    """A network in one runtime at one batch size.

    Attributes:
        runtime: "pytorch", "onnxruntime", "openvino"; "openvino, vnni" the file for processors
            with VNNI instructions; "openvino, bits" where binary layers run by xnor and popcount.
        seconds: of a batch, median over the rounds.
        low, high: the tenth and the ninetieth percentile.
        float_seconds: the same of the float32 network.
        ratio: median over the rounds of float32's time over this one's: above 1 is faster.
        kernels: see `Opened`.
        rounds: how many.
    """

    runtime: str
    batch: int
    seconds: float
    low: float
    high: float
    float_seconds: float
    ratio: float
    kernels: dict[str, int]
    rounds: int


@dataclass(frozen=True)
class Timings:
    """What the runtimes of this machine do with a network.

    Attributes:
        left_out: the runtimes that did not time it, each with why.
    """

    speeds: tuple[Speed, ...]
    left_out: Mapping[str, str]


def bench(
    packed: PackedModel,
    *,
    batches: Sequence[int] = BATCHES,
    rounds: int = ROUNDS,
    after_round: Callable[[int, int], None] = lambda done, all_: None,
) -> Timings:
    """Times a packed network and its float32 original in turns, in torch's number of threads.

    Images are random: the time does not depend on them. A runtime that is not installed, or has
    no form for the network, is left out.
    """
    original = float_original(packed)
    network = packed.description.network
    shape = (network.in_channels, network.image_size, network.image_size)
    threads = torch.get_num_threads()
    generator = torch.Generator().manual_seed(0)
    found: list[Speed] = []
    left_out: dict[str, str] = {}
    with TemporaryDirectory() as folder:
        any_batch = _opened(packed, original, Path(folder), threads, left_out)
        for batch in batches:
            x = torch.randn(batch, *shape, generator=generator)
            pairs = any_batch | _on_bits(packed, any_batch, batch, Path(folder), threads, left_out)
            cases = {name: (_case(own, x), _case(other, x)) for name, (own, other) in pairs.items()}
            every = [case for pair in cases.values() for case in pair]
            in_turns(every, rounds=rounds, warm_up=WARM_UP, after_round=after_round)
            found += [
                _speed(name, batch, own, other, pairs[name][0])
                for name, (own, other) in cases.items()
            ]
    return Timings(tuple(found), left_out)


def float_original(packed: PackedModel) -> PackedModel:
    """The same network without quantizers, with fresh weights."""
    description = packed.description
    network = description.network.model_dump(exclude={"source"})
    model = make_canonical(build_network(network, seed=0), {})
    empty = description.model_copy(update={"quantizers": [], "codings": [], "layers": {}})
    return replace(packed, model=model, weights={}, description=empty)


def _opened(
    packed: PackedModel,
    original: PackedModel,
    folder: Path,
    threads: int,
    left_out: dict[str, str],
) -> Pairs:
    def written(suffix: str, write: Callable[[PackedModel, Path], object]) -> Iterator[Path]:
        for name, network in (("own", packed), ("float", original)):
            file = folder / f"{name}{suffix}"
            write(network, file)
            yield file

    pairs = {"pytorch": (in_pytorch(packed.model), in_pytorch(original.model))}
    with _left_out_if_refused("onnxruntime", left_out):
        own, other = (open_onnx(file, threads=threads) for file in written(".onnx", write_onnx))
        pairs["onnxruntime"] = own, other
    with _left_out_if_refused("openvino", left_out):
        ir = partial(write_openvino, batch=None)
        own, other = (open_openvino(file, threads=threads) for file in written(".xml", ir))
        pairs["openvino"] = own, other
    if "openvino" in pairs and gains_by_vnni(packed):
        with _left_out_if_refused("openvino, vnni", left_out):
            file = folder / "vnni.xml"
            write_openvino(packed, file, batch=None, vnni=True)
            pairs["openvino, vnni"] = open_openvino(file, threads=threads), pairs["openvino"][1]
    return pairs


def _on_bits(
    packed: PackedModel,
    pairs: Pairs,
    batch: int,
    folder: Path,
    threads: int,
    left_out: dict[str, str],
) -> Pairs:
    """Binary layers by xnor and popcount, where there are such; they take a fixed batch."""
    file = folder / f"bits{batch}.xml"
    if "openvino" in pairs:
        with _left_out_if_refused("openvino, bits", left_out):
            if write_openvino(packed, file, batch=batch):
                _, original = pairs["openvino"]
                return {"openvino, bits": (open_openvino(file, threads=threads), original)}
    return {}


@contextmanager
def _left_out_if_refused(runtime: str, left_out: dict[str, str]) -> Iterator[None]:
    """Writes down why a runtime is not to be timed; the others are."""
    try:
        yield
    except NeedsVnni:
        left_out[runtime] = "this processor has no VNNI instructions"
    except ConfigError as error:
        left_out[runtime] = str(error)


def _case(opened: Opened, x: torch.Tensor) -> Case:
    return Case("", lambda: opened(x))


def _speed(name: str, batch: int, own: Case, other: Case, opened: Opened) -> Speed:
    low, *_, high = statistics.quantiles(own.seconds, n=10, method="inclusive")
    return Speed(
        runtime=name,
        batch=batch,
        seconds=own.median,
        low=low,
        high=high,
        float_seconds=other.median,
        ratio=other.ratio(own),
        kernels=dict(opened.kernels),
        rounds=len(own.seconds),
    )

"""Exports of packed networks to the formats of other runtimes, and how their logits agree."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..quant.export.integer import integer_reference
from .derived import too_many_flips
from .errors import ConfigError
from .files import write_atomic
from .packed_file import PackedModel
from .runtimes import NeedsVnni, Opened, in_pytorch, needed, open_onnx, open_openvino

if TYPE_CHECKING:
    from ..quant.export.onnx_qdq import OnnxGraph

Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class Agreement:
    """A file's logits beside those of the packed network, on some images.

    Attributes:
        flips: images that it classifies otherwise.
        error: largest difference over the standard deviation of the logits.
        top1: accuracy of the file.
    """

    images: int
    flips: int
    error: float
    top1: float


def write_onnx(packed: PackedModel, path: Path, *, narrow: bool = False) -> tuple[str, ...]:
    """Writes a packed network as ONNX; the names of the files, of which it is one.

    Args:
        narrow: see `onnx_qcdq`.

    Raises:
        ConfigError: the extra is missing, or the network has something that ONNX export has not.
    """
    write_atomic(path, _graph(packed, narrow=narrow).model.SerializeToString())
    return (path.name,)


def write_openvino(
    packed: PackedModel, path: Path, *, batch: int | None, vnni: bool = False
) -> tuple[str, ...]:
    """Writes a packed network as OpenVINO's IR; the names of the files, the main one first.

    Args:
        batch: with it binary layers run on bits; nothing is written where there are none.
        vnni: leaves the layers whole that only processors with VNNI instructions add rightly.

    Raises:
        ConfigError: as above.
    """
    openvino = needed("openvino")
    graph = _graph(packed, in_int16=not vnni)
    if batch is not None and not graph.binary:
        return ()
    from ..quant.export.openvino_ir import openvino_model

    openvino.save_model(openvino_model(graph, batch=batch), path, compress_to_fp16=False)
    return (path.name, path.with_suffix(".bin").name)


def gains_by_vnni(packed: PackedModel) -> bool:
    """Whether a packed network has layers that are in two parts for processors without VNNI.

    Raises:
        ConfigError: as above.
    """
    return _graph(packed).needs_vnni


def _graph(packed: PackedModel, *, in_int16: bool = False, narrow: bool = False) -> OnnxGraph:
    needed("onnx")
    from ..quant.export.onnx_qdq import onnx_qcdq
    from ..quant.export.tracing import CannotExport

    network = packed.description.network
    image = (network.in_channels, network.image_size, network.image_size)
    metadata = {
        "bitladder": json.dumps(packed.description.made, sort_keys=True),
        "images": packed.description.images.model_dump_json(),
        "packed_sha256": packed.sha256,
    }
    try:
        return onnx_qcdq(
            packed.model, packed.weights, image, metadata=metadata, in_int16=in_int16, narrow=narrow
        )
    except CannotExport as error:
        raise ConfigError([str(error)]) from None


def compare(
    form: str, path: Path, packed: PackedModel, batches: Batches, *, narrow: bool, on_bits: bool
) -> tuple[dict[str, Agreement], str | None]:
    """Runs a file in every runtime that reads it, beside the network that it was made from.

    Args:
        batches: begins to give images and targets, the same ones each time.
        narrow: see `onnx_qcdq`; OpenVINO reads no such file.
        on_bits: whether binary layers run on bits. Then the file is compared with the integer
            reference as well. That is done with the whole network: an output behind each layer
            would keep OpenVINO from fusing layers, which it has done wrongly.

    Returns:
        By runtime, the one that the format is for first; and why the file is not to be used,
        None where it does what the packed network does. An ONNX file that OpenVINO needs VNNI
        instructions for is right in ONNX Runtime, so that without them it is compared there only.

    Raises:
        ConfigError: the runtime that the format is for refuses the file.
    """
    opened = {"onnxruntime": open_onnx} if form == "onnx" else {}
    opened |= {} if narrow else {"openvino": open_openvino}
    references = {"the packed network": packed.model}
    if on_bits:
        references["the integer reference"] = integer_reference(packed.model, packed.weights)
    found: dict[str, Agreement] = {}
    problem = None
    for runtime, open_file in opened.items():
        try:
            own = open_file(path, threads=torch.get_num_threads())
        except NeedsVnni:
            if form == "openvino":
                raise
            continue
        for reference, network in references.items():
            one = agreement(own, in_pytorch(network), batches())
            found.setdefault(runtime, one)
            file = f"the {form} file in {runtime}"
            # a code or two flips in runtimes that multiply by 1/s where we divide by s, and of a
            # few hundred images one is more than the share that is allowed
            if one.flips > 1:
                problem = problem or too_many_flips(file, one.flips, one.images, reference)
    return found, problem


def agreement(
    own: Opened, reference: Opened, batches: Iterable[tuple[Tensor, Tensor]]
) -> Agreement:
    """How a file's logits differ from those of the packed network."""
    images = flips = right = 0
    largest = 0.0
    for x, targets in batches:
        logits, expected = own(x), reference(x)
        spread = float(expected.std().clamp_min(1e-12))
        largest = max(largest, float((logits - expected).abs().max()) / spread)
        flips += int((logits.argmax(1) != expected.argmax(1)).sum())
        right += int((logits.argmax(1) == targets).sum())
        images += len(x)
    return Agreement(images, flips, largest, right / images)


def open_export(form: str, path: Path) -> Opened:
    """The runtime that a format is for, with torch's number of threads."""
    runtimes: dict[str, Callable[..., Opened]] = {"onnx": open_onnx, "openvino": open_openvino}
    return runtimes[form](path, threads=torch.get_num_threads())

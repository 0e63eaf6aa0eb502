"""What runs a shipped file: PyTorch, ONNX Runtime, OpenVINO; each a function of images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ConfigError
from .packed_file import read_packed

EXTRA = "pip install 'bitladder[deploy]'"


class NeedsVnni(ConfigError):
    """A file whose layers OpenVINO computes wrongly on this processor."""

    def __init__(self, file: Path) -> None:
        super().__init__(
            [
                f"{file}: it needs VNNI instructions, which this processor lacks: OpenVINO would "
                "add wrongly; for here: bitladder export --format openvino, without --vnni"
            ]
        )


@dataclass(frozen=True)
class Opened:
    """A network in a runtime.

    Attributes:
        run: images (N, C, H, W), float32, normalised -> logits (N, K), float32.
        kernels: what the convolutions and linear layers run on, as far as the runtime says:
            name -> how many.
    """

    run: Callable[[Tensor], Tensor]
    kernels: Mapping[str, int] = field(default_factory=dict)

    def __call__(self, images: Tensor) -> Tensor:
        """The logits of images."""
        return self.run(images)


def in_pytorch(model: nn.Module) -> Opened:
    """A network in evaluation mode, in as many threads as torch has."""

    def run(images: Tensor) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = model(images.to(memory_format=torch.channels_last))
            return logits.float()

    return Opened(run)


def open_packed(file: Path, *, trust: Collection[str] = ()) -> Opened:
    """A packed file in PyTorch."""
    return in_pytorch(read_packed(file, trust=trust).model)


def open_onnx(file: Path, *, threads: int) -> Opened:
    """An ONNX file in ONNX Runtime on the CPU.

    `session.disable_quant_qdq` stops the pass that rounds biases to multiples of the steps of
    input and weight (`WeightBiasQuantization`), an error of several percent at few bits.

    Raises:
        ConfigError: ONNX Runtime is not installed, or refuses the file.
    """
    runtime = needed("onnxruntime")
    options = runtime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common class
        raise ConfigError([f"{file}: ONNX Runtime refuses it: {error}"]) from None
    name = session.get_inputs()[0].name

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: images.contiguous().numpy()})[0])

    return Opened(run)


def open_openvino(file: Path, *, threads: int) -> Opened:
    """An ONNX or OpenVINO file in OpenVINO on the CPU, in float32 where it is not in integers.

    Its own default there is bfloat16 on some machines, which costs accuracy without a word. A
    model of a fixed batch gets its images in such batches, the last one filled up.

    Raises:
        NeedsVnni: this processor lacks the instructions.
        ConfigError: OpenVINO is not installed, or refuses the file.
    """
    needed("openvino")
    from ..quant.export.openvino_ir import adds_in_int32, needs_vnni, the_core

    core = the_core()
    hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    try:
        model = core.read_model(file)
        compiled = core.compile_model(model, "CPU", hints)
    except Exception as error:
        raise ConfigError([f"{file}: OpenVINO refuses it: {error}"]) from None
    if needs_vnni(model) and not adds_in_int32():
        raise NeedsVnni(file)
    batch = compiled.input(0).get_partial_shape()[0]
    size = batch.get_length() if batch.is_static else None

    def run(images: Tensor) -> Tensor:
        if size is None or len(images) == size:
            return torch.from_numpy(compiled(images.contiguous().numpy())[0].copy())
        filled = images[torch.arange(-(-len(images) // size) * size) % len(images)]
        return torch.cat([run(part) for part in filled.split(size)])[: len(images)]

    return Opened(run, _kernels(compiled))


def needed(package: str) -> Any:
    """A package of the extra `deploy`.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return import_module(package)
    except ImportError:
        raise ConfigError([f"this needs {package}; install it with: {EXTRA}"]) from None


def runtime_versions() -> dict[str, str]:
    """The versions of the runtimes that are installed, by name."""
    found = {"pytorch": str(torch.__version__)}
    for package in ("onnxruntime", "openvino"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _kernels(compiled: Any) -> Counter[str]:
    """The width in which each layer with weights runs, by the names of OpenVINO's kernels."""
    widths = {"i8": "int8", "u1": "1 bit", "f32": "float32", "bf16": "bfloat16"}
    found: Counter[str] = Counter()
    for operation in compiled.get_runtime_model().get_ordered_ops():
        info = operation.get_rt_info()
        kind, kernel = (str(info[key].astype(str)) for key in ("layerType", "primitiveType"))
        end = kernel.rpartition("_")[2].lower()  # such as brgconv_avx512_I8
        if kind in ("Convolution", "BinaryConvolution", "FullyConnected"):
            found[widths.get(end, kernel)] += 1
    return found

"""Export a packed network to another runtime's format, and run it there before it counts."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..derived import SUFFIXES
from ..errors import StageError
from ..exported import compare, write_onnx, write_openvino
from ..fit import EVALUATION_BATCH
from ..packed_file import read_packed
from ..record import PACKED
from .base import STAGES, StageContext, StageOutput


@STAGES.register("export")
def export(context: StageContext) -> StageOutput:
    """Writes the file, classifies the test set with it, and compares with the packed network.

    Accuracy and flips are those of the runtime that the format is for; under `runtimes` are those
    of every one that reads it.

    Raises:
        StageError: it classifies more images otherwise than it may.
        ConfigError: the extra `deploy` is missing, or the network cannot be said in the format.
    """
    record, options = context.parents["packed"], context.spec.options
    form, batch = options["format"], options["batch"]
    source = context.store.stages / record.key / PACKED
    packed = read_packed(source, trust={record.network["name"]})  # it ran here
    path = context.around.workdir / f"model{SUFFIXES[form][0]}"
    if form == "onnx":
        written = write_onnx(packed, path, narrow=options["narrow"])
    elif not (written := write_openvino(packed, path, batch=batch, vnni=options["vnni"])):
        raise StageError(
            context.around.name, "no layer is binary, so nothing needs a batch size", "leave it out"
        )
    found, problem = compare(
        form,
        path,
        packed,
        lambda: context.data.test.evaluation_batches(EVALUATION_BATCH, device="cpu"),
        narrow=options["narrow"],
        on_bits=batch is not None,
    )
    if problem:
        raise StageError(context.around.name, problem)
    runtimes = {runtime: asdict(one) for runtime, one in found.items()}
    metrics: dict[str, Any] = {
        "format": form,
        **{f"export_{key}": value for key, value in next(iter(runtimes.values())).items()},
        "runtimes": runtimes,
        "export_bytes": sum(path.with_name(name).stat().st_size for name in written),
    }
    return StageOutput(written, record.network, metrics)

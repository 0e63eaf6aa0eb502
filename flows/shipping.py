"""The commands about files to ship, as the command line has them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from .options import (
    DEFAULT_STORE,
    DatabaseOption,
    RunArgument,
    StoreOption,
    TrustOption,
    VerboseOption,
    open_store,
    quiet,
)


def export(
    run: RunArgument = None,
    stage: Annotated[str | None, typer.Option(help="One rung; default: all.")] = None,
    format_: Annotated[
        Literal["packed", "onnx", "openvino"],
        typer.Option("--format", "-f", help="packed is made with every ladder."),
    ] = "packed",
    batch: Annotated[
        int | None,
        typer.Option(
            min=1, help="Images at a time, fixed; with it OpenVINO runs W1A1 layers on bits."
        ),
    ] = None,
    narrow: Annotated[
        bool,
        typer.Option("--narrow", help="ONNX with INT4 and INT2 weights: smaller, runs in float."),
    ] = False,
    vnni: Annotated[
        bool,
        typer.Option(
            "--vnni", help="OpenVINO at 8 bits for processors with VNNI only: twice as fast there."
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Copy to this file; several rungs, or a folder that is there: into this folder. "
            "Default: only tell where in the store it is."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what --out names.")] = False,
    store: StoreOption = DEFAULT_STORE,
    database: DatabaseOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Write networks as files to ship; each is run and compared before it gets its name.

    bitladder export digits --stage w4a4 --out w4a4.safetensors
    bitladder export digits --format onnx --out shipped

    \b
      packed    all in one safetensors file, codes of b bits in b bits; for PyTorch
      onnx      QuantizeLinear, Clip, DequantizeLinear and int8 codes: 4, 2 and
                1 bit take as much room as 8, and run as 8
      openvino  the same as OpenVINO's IR (.xml and .bin)

    Runtimes: ONNX Runtime with session.disable_quant_qdq=1, OpenVINO with
    INFERENCE_PRECISION_HINT=f32; their defaults round more than the network does.
    """
    from .ship_commands import export_run

    export_run(
        run, stage, format_, batch, narrow, vnni, out, force, open_store(store, database, verbose)
    )


def predict(
    file: Annotated[Path, typer.Argument(help="A packed or an ONNX file.")],
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")],
    top: Annotated[int, typer.Option(min=1, help="So many of the likeliest classes.")] = 1,
    trust: TrustOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Classify images with a shipped file.

    bitladder predict w4a4.safetensors photo.jpg more-photos/ --top 3
    """
    from .ship_commands import predict_images

    quiet(verbose)
    predict_images(file, images, top, trust or [])


def bench(
    networks: Annotated[
        list[str], typer.Argument(help="Packed files; or ladders, whose times are recorded.")
    ],
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Default: 1 and 64.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: as torch has it.")] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Measure ladders anew that were measured before.")
    ] = False,
    trust: TrustOption = None,
    store: StoreOption = DEFAULT_STORE,
    database: DatabaseOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Time packed files in PyTorch, ONNX Runtime and OpenVINO, beside FP32 in the same.

    bitladder bench w4a4.safetensors --batch 1 --batch 64
    bitladder bench digits                 all rungs; the report then shows them

    "times" is how many times as fast as FP32, the median over rounds in which
    both were timed in turns. "layers in" is what OpenVINO says of its kernels:
    4 and 2 bits run on those of 8 bits, so they are smaller and not faster. What
    was measured of a ladder is shown again until a runtime has another version.
    """
    from .ship_commands import bench_networks

    opened = open_store(store, database, verbose)
    bench_networks(networks, batch or [1, 64], threads, trust or [], again, opened)

"""What a ladder's files do: accuracy, bytes and speed of every rung in every runtime.

    python benchmarks/shipped_files.py --store artifacts digits
    python benchmarks/shipped_files.py --store artifacts digits --bench 1 --bench 64 --threads 2

Exports what is not exported yet (ONNX, OpenVINO, and for binary rungs OpenVINO on bits), each run
on the whole test set and compared with the packed network; with `--bench` also times them, on a
quiet machine, beside the float32 network in the same runtime. Prints Markdown.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from bitladder.pipeline.bench import bench
from bitladder.pipeline.derive import derive
from bitladder.pipeline.derived import export_spec, pack_spec
from bitladder.pipeline.errors import BitladderError
from bitladder.pipeline.packed_file import read_packed
from bitladder.pipeline.record import PACKED, StageRecord
from bitladder.pipeline.run import Run
from bitladder.pipeline.store import Store
from timing import where_and_how

BATCH_ON_BITS = 64
FORMS: dict[str, tuple[str, int | None]] = {
    "onnx": ("onnx", None),
    "openvino": ("openvino", None),
    "bits": ("openvino", BATCH_ON_BITS),
}


def main() -> None:
    """Prints the tables of the runs."""
    args = parse_arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    store = Store(args.store)
    for name in args.runs:
        run = store.run(name)
        print(f"{run.run}. {where_and_how()}\n")
        print(accuracies(run, store), flush=True)
        if args.bench:
            print(speeds(run, store, args.bench), flush=True)


def accuracies(run: Run, store: Store) -> str:
    """Test accuracy in training, packed and exported (flips); bytes, and how many times fewer."""
    lines = [
        "| rung | training | packed | flips | ONNX Runtime | OpenVINO | on bits | bytes | ratio "
        "| ideal |"
    ]
    lines += ["|" + "---|" * 10]
    for planned in run.stages:
        trained, packed = store.read(planned["key"]), store.read(pack_spec(planned["key"]).key)
        if trained is None or packed is None:
            continue
        found = packed.metrics
        exports = [_export(run, planned["name"], packed, form, store) for form in FORMS]
        ideal = found["float_bytes"] / trained.metrics["ideal_bytes"]
        cells = [
            planned["name"],
            _percent(trained.metrics["test_top1"]),
            _percent(found["deployed_top1"]),
            f"{found['flips']}",
            *exports,
            f"{found['packed_bytes']:,}",
            f"{found['compression']:.2f}",
            f"{ideal:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _export(run: Run, name: str, packed: StageRecord, form: str, store: Store) -> str:
    try:
        kind, batch = FORMS[form]
        spec = export_spec(packed.key, kind, batch=batch)
        found = derive(run, name, spec, store).metrics
    except BitladderError as error:
        print(f"{name}, {form}: {error}", file=sys.stderr)
        return "-"
    return f"{_percent(found['export_top1'])} ({found['export_flips']})"


def speeds(run: Run, store: Store, batches: list[int]) -> str:
    """Milliseconds a batch and times as fast as float32 in the same runtime."""
    lines = ["| rung | runtime | batch | ms | 10-90 % | FP32 ms | times as fast | layers in |"]
    lines += ["|" + "---|" * 8]
    for planned in run.stages:
        packed = store.read(pack_spec(planned["key"]).key)
        if packed is None:
            continue
        trust = {packed.network["name"]}
        network = read_packed(store.stages / packed.key / PACKED, trust=trust)
        for one in bench(network, batches=batches).speeds:
            kernels = ", ".join(f"{n} {kind}" for kind, n in one.kernels.items())
            lines.append(
                f"| {planned['name']} | {one.runtime} | {one.batch} | {1e3 * one.seconds:.2f} | "
                f"{1e3 * one.low:.2f} - {1e3 * one.high:.2f} | {1e3 * one.float_seconds:.2f} | "
                f"{one.ratio:.2f} | {kernels} |"
            )
    return "\n".join(lines) + "\n"


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", help="ids or names of finished ladders")
    parser.add_argument("--store", type=Path, default=Path("artifacts"))
    parser.add_argument("--bench", type=int, action="append", help="a batch size to be timed")
    parser.add_argument("--threads", type=int)
    return parser.parse_args()


if __name__ == "__main__":
    main()

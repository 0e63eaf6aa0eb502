"""What a ladder's files do: accuracy, bytes and speed of every rung in every runtime.

    python benchmarks/shipped_files.py --store artifacts digits
    python benchmarks/shipped_files.py --store artifacts digits --bench 1 --bench 64 --threads 2

Exports what is not exported yet (ONNX, OpenVINO for any processor and for those with VNNI, and for
binary rungs OpenVINO on bits), each run on the whole test set and compared with the packed network.
With `--bench` times them instead, on a quiet machine, beside the float32 network in the same
runtime. Prints Markdown.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from bitladder.pipeline.bench import ROUNDS, Speed, bench
from bitladder.pipeline.derive import derive
from bitladder.pipeline.derived import export_spec, pack_spec
from bitladder.pipeline.errors import BitladderError
from bitladder.pipeline.packed_file import read_packed
from bitladder.pipeline.record import PACKED, StageRecord
from bitladder.pipeline.run import Run
from bitladder.pipeline.store import Store
from timing import where_and_how

BATCH_ON_BITS = 64
FORMS: dict[str, dict[str, Any]] = {
    "ONNX Runtime": {"form": "onnx"},
    "OpenVINO": {"form": "openvino"},
    "with VNNI": {"form": "openvino", "vnni": True},
    "on bits": {"form": "openvino", "batch": BATCH_ON_BITS},
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
        if args.bench:
            print(speeds(run, store, args.bench, args.rounds), flush=True)
        else:
            print(accuracies(run, store), flush=True)


def accuracies(run: Run, store: Store) -> str:
    """Test accuracy in training, packed and exported (flips); bytes, and how many times fewer."""
    heads = ["rung", "training", "packed", "flips", *FORMS, "bytes", "ratio", "ideal"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
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
        spec = export_spec(packed.key, **FORMS[form])
        found = derive(run, name, spec, store).metrics
    except BitladderError as error:
        print(f"{name}, {form}: {error}", file=sys.stderr)
        return "-"
    return f"{_percent(found['export_top1'])} ({found['export_flips']})"


def speeds(run: Run, store: Store, batches: list[int], rounds: int) -> str:
    """How many times as fast as float32 in the same runtime; milliseconds a batch in brackets."""
    heads = ["rung", "runtime", *(f"batch {b}: times FP32 (ms, 10-90 %)" for b in batches)]
    lines = [f"| {' | '.join([*heads, 'layers in'])} |", "|" + "---|" * (len(heads) + 1)]
    for planned in run.stages:
        packed = store.read(pack_spec(planned["key"]).key)
        if packed is None:
            continue
        trust = {packed.network["name"]}
        network = read_packed(store.stages / packed.key / PACKED, trust=trust)
        if not network.weights:
            continue  # float32 itself
        found: dict[str, list[Speed]] = {}
        for one in bench(network, batches=batches, rounds=rounds).speeds:
            found.setdefault(one.runtime, []).append(one)
        for runtime, of_batches in found.items():
            kernels = ", ".join(f"{n} {kind}" for kind, n in of_batches[-1].kernels.items())
            cells = [planned["name"], runtime, *map(_said, of_batches), kernels]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _said(one: Speed) -> str:
    ms, low, high = (1e3 * seconds for seconds in (one.seconds, one.low, one.high))
    return f"{one.ratio:.2f} ({ms:.2f}, {low:.2f}-{high:.2f})"


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
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--threads", type=int)
    return parser.parse_args()


if __name__ == "__main__":
    main()

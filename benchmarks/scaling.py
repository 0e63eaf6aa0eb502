"""How the cost of a step grows with the task, and that of a ladder with its rungs.

    python benchmarks/scaling.py --out scaling.md
    python benchmarks/scaling.py --axes batch width --modes eager compiled
    python benchmarks/scaling.py --axes rungs --counts 1 2 4 8

One axis at a time from the same point: preact_resnet20, width 16, batch 128, ten classes, images of
32x32. The FP32 step (channels last), our W4A4 LSQ step and the same under an FP32 teacher, at every
value of the axis, take turns (see `timing.py`). "growth" is how many times as long our step takes
as at the value above it, beside how many times the work in multiply-accumulates: equal means that
the cost follows the work.

The axis `rungs` runs whole ladders on the embedded digits, `bitladder run` from the start of the
process to its end: one FP32 rung and so many W4A4 rungs of the same length below it. A straight
line through their times gives what a rung costs and what the ladder costs besides.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from bitladder.pipeline.compiling import allow_variants
from bitladder.pipeline.machine import keep_freed_memory
from bitladder.quant import probe
from step import MODES, Bench, kd_step, plain_step, qat_step
from tabulate import tabulate
from timing import Case, in_turns, where_and_how
from watched_run import WatchedRun

AXES: dict[str, Sequence[int]] = {
    "batch": (32, 64, 128, 256),
    "width": (8, 16, 32, 64),
    "depth": (8, 14, 20, 32, 56),
    "classes": (10, 100, 1000),
    "image": (16, 32, 64),
}
RUNGS = "rungs"


def main() -> None:
    args = parse_arguments()
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    allow_variants()
    parts = [f"{where_and_how()}. n = {args.rounds} rounds after {args.warm_up}."]
    for axis in args.axes:
        print(axis, file=sys.stderr)
        parts.append(rungs_report(args) if axis == RUNGS else step_report(axis, args))
    text = "\n\n".join(parts)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = [*AXES, RUNGS]
    parser.add_argument("--axes", nargs="+", choices=every, default=every)
    parser.add_argument("--values", nargs="+", type=int, help="of one axis, in place of its own")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["eager"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warm-up", type=int, default=2, help="rounds that do not count")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--depth", type=int, default=20, help="where it is not the axis")
    parser.add_argument("--counts", nargs="+", type=int, default=[1, 2, 4, 8], help="of rungs")
    parser.add_argument("--epochs", type=int, default=5, help="of a rung")
    parser.add_argument("--repeats", type=int, default=3, help="of each ladder")
    parser.add_argument("--out", type=Path, help="where the tables go as well")
    return parser.parse_args()


def bench_at(axis: str, value: int, depth: int) -> Bench:
    """The usual task but for one axis."""
    at = {"batch": 128, "width": 16, "depth": depth, "classes": 10, "image": 32, axis: value}
    return Bench(
        f"preact_resnet{at['depth']}",
        batch_size=at["batch"],
        image_size=at["image"],
        num_classes=at["classes"],
        options={"width": at["width"]},
    )


def step_report(axis: str, args: argparse.Namespace) -> str:
    """A row for each value; all their steps take turns."""
    steps: dict[str, Callable[[Bench], Any]] = {"fp32": partial(plain_step, channels_last=True)}
    for mode in args.modes:
        steps[f"qat {mode}"] = partial(qat_step, mode=mode)
        steps[f"kd {mode}"] = partial(kd_step, mode=mode)
    benches = {v: bench_at(axis, v, args.depth) for v in args.values or AXES[axis]}
    cases = {
        value: {name: Case(name, make(bench)) for name, make in steps.items()}
        for value, bench in benches.items()
    }
    every = [case for own in cases.values() for case in own.values()]
    in_turns(every, rounds=args.rounds, warm_up=args.warm_up)
    lines: list[dict[str, str]] = []
    before: tuple[Case, int] | None = None
    for value, bench in benches.items():
        own, work = cases[value][f"qat {args.modes[0]}"], work_of(bench)
        line = {axis: str(value), "GMAC": f"{work / 1e9:.2f}", **columns(cases[value])}
        line["images/s"] = f"{bench.batch_size / own.median:.0f}"
        line["growth"] = f"{own.ratio(before[0]):.2f}" if before else ""
        line["of work"] = f"{work / before[1]:.2f}" if before else ""
        lines.append(line)
        before = own, work
    table = tabulate(lines, headers="keys", tablefmt="github", disable_numparse=True)
    return f"Milliseconds a step, and times the FP32 step, by {axis}:\n\n{table}"


def columns(cases: Mapping[str, Case]) -> dict[str, str]:
    """Milliseconds of each step, and its ratio to the FP32 one."""
    found = {}
    for name, case in cases.items():
        found[name] = f"{1e3 * case.median:.1f}"
        if name != "fp32":
            found[f"x ({name})"] = f"{case.ratio(cases['fp32']):.2f}"
    return found


def work_of(bench: Bench) -> int:
    """Multiply-accumulates of the forward pass over a batch."""
    images, _ = bench.batch()
    found = probe(bench.make_model(), [images[:1]])
    return bench.batch_size * sum(facts.macs for facts in found.layers.values())


def rungs_report(args: argparse.Namespace) -> str:
    """Whole ladders of different length, and the straight line through their times."""
    seconds: dict[int, list[float]] = {count: [] for count in args.counts}
    for _ in range(args.repeats):  # in turns, so that a machine that slows down slows all
        for count in args.counts:
            seconds[count].append(ladder_seconds(count, args))
            print(f"{count} rungs: {seconds[count][-1]:.1f} s", file=sys.stderr)
    medians = {count: statistics.median(taken) for count, taken in seconds.items()}
    lines = [
        {
            "rungs": str(count),
            "seconds": f"{medians[count]:.1f}",
            "from": f"{min(taken):.1f}",
            "to": f"{max(taken):.1f}",
            "a rung": f"{medians[count] / (count + 1):.2f}",
        }
        for count, taken in seconds.items()
    ]
    table = tabulate(lines, headers="keys", tablefmt="github", disable_numparse=True)
    text = (
        f"A whole ladder by its W4A4 rungs below one FP32 rung, {args.epochs} epochs each, digits, "
        f"preact_resnet8, n = {args.repeats}:\n\n{table}"
    )
    if len(medians) > 1:
        line = statistics.linear_regression(list(medians), list(medians.values()))
        text += f"\n\n{line.slope:.2f} s a rung, and {line.intercept:.1f} s besides."
    return text


def ladder_seconds(count: int, args: argparse.Namespace) -> float:
    """From the start of the process to its end, in a store of its own."""
    config = {
        "name": f"rungs-{count}",
        "data": {"name": "digits", "batch_size": 64},
        "model": {"name": "preact_resnet8"},
        "train": {"epochs": args.epochs},
        "runtime": {"threads": args.threads},
        "ladder": [
            {"weight_bits": 32, "activation_bits": 32},
            *({"weight_bits": 4, "activation_bits": 4} for _ in range(count)),
        ],
    }
    with tempfile.TemporaryDirectory(prefix="bitladder-scaling-") as folder:
        path = Path(folder) / "ladder.yaml"
        path.write_text(yaml.safe_dump(config))
        run = WatchedRun(["run", str(path)], Path(folder) / "artifacts")
        if run.finish():
            sys.exit("\n".join(run.lines))
        return run.seconds


if __name__ == "__main__":
    main()

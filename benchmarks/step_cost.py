"""What a training step with each quantizer costs, as a ratio to the FP32 step.

    python benchmarks/step_cost.py
    python benchmarks/step_cost.py --bits 2 4 8 --only lsq pact --rounds 31 --out step_cost.md

ResNet-20 at batch 128 on synthetic images of 3x32x32, quantized, calibrated and stepped as a stage
does it: channels last, first and last layer at 8 bits, SGD with momentum, cross-entropy, no
teacher. Each method stands on weights and activations where it takes both; else the row says what
stands on the other side. A method that takes signed activations alone is measured in the network
with RPReLU, and its ratio is to that network's own FP32 step.

All rows run in one process and in turn: a round is one step of each, the FP32 step among them, so
that a machine that slows down slows all. A step whose threads waited over 5 % of it for a processor
that somebody else had is done again, up to twice (Linux; elsewhere it counts as it is). Each
row's time is the median over the rounds, its ratio the median of the ratios within a round.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from admitted import Row, admitted
from bitladder.pipeline.config import (
    BinRegularizationConfig,
    OptimizerConfig,
    OscillationConfig,
    TrainConfig,
)
from bitladder.pipeline.learner import Learner, Objective
from bitladder.pipeline.machine import describe, keep_freed_memory
from bitladder.pipeline.network import build_network
from bitladder.pipeline.optimizer import build_optimizer
from bitladder.quant import QUANTIZERS, QuantizerChoice, QuantPolicy, calibrate, quantize_model
from tabulate import tabulate
from torch import Tensor, nn

FP32 = "fp32"
LIMIT = 2.5  # times the FP32 step
CALIBRATION_BATCHES = 2
WAITED, TRIES = 0.05, 3


@dataclass
class Case:
    """One step to be timed, and the seconds that it took, round by round."""

    name: str
    methods: str
    bits: str
    network: str
    step: Callable[[], None]
    seconds: list[float] = field(default_factory=list)


def main() -> None:
    args = parse_arguments()
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows, _ = admitted(args.only or list(QUANTIZERS), args.bits, controls=False)
    cases, failures = make_cases(rows, args)
    for round_ in range(args.warm_up + args.rounds):
        for case in cases:
            seconds = undisturbed(case.step)
            if round_ >= args.warm_up:
                case.seconds.append(seconds)
        print(f"\rround {round_ + 1} of {args.warm_up + args.rounds}", end="", file=sys.stderr)
    print(file=sys.stderr)
    text = report(cases, failures, args)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", default="preact_resnet20")
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(QUANTIZERS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warm-up", type=int, default=3, help="rounds that do not count")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="where the table goes as well")
    return parser.parse_args()


def make_cases(rows: Sequence[Row], args: argparse.Namespace) -> tuple[list[Case], list[str]]:
    """The FP32 step of each network that is needed, then every row; and what could not be built."""
    cases: list[Case] = []
    failures = []
    for signed in sorted({False, *(row.signed for row in rows)}):
        network = f"{args.network}{' rprelu' if signed else ''}"
        for row in (None, *(row for row in rows if row.signed is signed)):
            name, methods = (row.quantizer, row.methods()) if row else (FP32, "")
            bits = f"W{row.bits}A{row.bits}" if row else ""
            try:
                step = make_step(row, signed, args)
            except (ValueError, RuntimeError) as error:
                failures.append(f"{name} {bits} in {network}: {error}")
                if row is None:
                    break  # nothing to compare the others with
            else:
                cases.append(Case(name, methods, bits, network, step))
    return cases, failures


def make_step(row: Row | None, signed: bool, args: argparse.Namespace) -> Callable[[], None]:
    """A training step of a fresh network, as `fit` takes it."""
    student = build_network(
        {
            "name": args.network,
            "options": {"activation": "rprelu"} if signed else {},
            "num_classes": 10,
            "in_channels": 3,
            "image_size": 32,
        },
        seed=0,
    )
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(args.batch_size, 3, 32, 32, generator=generator)
    targets = torch.randint(0, 10, (args.batch_size,), generator=generator)
    if row is not None:
        student = quantized(student, row, images)
    train = TrainConfig(optimizer=OptimizerConfig(name="sgd", lr=1e-3))  # speed only: stay finite
    objective = Objective(train, None, BinRegularizationConfig(), OscillationConfig())
    learner = Learner(student, objective).train()
    optimizer = build_optimizer(learner, student, train)

    def step() -> None:
        learner.before_step(0.5)
        loss: Tensor = learner(images, targets, (), 0.5)["total"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        learner.after_step(0.5)

    return step


def quantized(student: nn.Module, row: Row, images: Tensor) -> nn.Module:
    """The network with the row's methods, calibrated."""
    policy = QuantPolicy(
        weight_bits=row.bits,
        activation_bits=row.bits,
        weight=QuantizerChoice(row.weight),
        activation=QuantizerChoice(row.activation),
    )
    batches = [images] * CALIBRATION_BATCHES
    student = quantize_model(student, policy, batches=batches)
    calibrate(student, batches)
    return student


def undisturbed(step: Callable[[], None]) -> float:
    """Seconds of a step that had its processors for itself, or of the last of a few tries."""
    for _ in range(TRIES):
        waited, began = waiting_seconds(), time.perf_counter()
        step()
        seconds = time.perf_counter() - began
        if waiting_seconds() - waited < WAITED * seconds:
            break
    return seconds


def waiting_seconds() -> float:
    """How long the threads of this process were ready to run and did not, in all so far."""
    total = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        try:
            total += int(path.read_text().split()[1])
        except (OSError, IndexError):  # the thread has just ended
            continue
    return total / 1e9


def report(cases: Sequence[Case], failures: Sequence[str], args: argparse.Namespace) -> str:
    """The table, dearest rows first within a width, and what is over the limit."""
    base = {case.network: case for case in cases if case.name == FP32}
    ratios = {
        id(case): [a / b for a, b in zip(case.seconds, base[case.network].seconds, strict=True)]
        for case in cases
    }
    lines, over = [], 0
    for case in sorted(cases, key=lambda c: (c.bits, -statistics.median(ratios[id(c)]))):
        found = ratios[id(case)]
        ratio = statistics.median(found)
        over += ratio > LIMIT
        lines.append(
            {
                "quantizer": case.name,
                "bits": case.bits,
                "methods": case.methods,
                "network": case.network,
                "ms": f"{1e3 * statistics.median(case.seconds):.1f}",
                "ms min": f"{1e3 * min(case.seconds):.1f}",
                "ms max": f"{1e3 * max(case.seconds):.1f}",
                "x FP32": f"{ratio:.2f}",
                "x min": f"{min(found):.2f}",
                "x max": f"{max(found):.2f}",
                "": f"OVER {LIMIT}" if ratio > LIMIT else "",
            }
        )
    facts = describe(torch.device("cpu"))
    head = (
        f"One training step, {args.network}, batch {args.batch_size}, {args.rounds} rounds after "
        f"{args.warm_up}, {args.threads} threads; {facts['device_name']}, torch {facts['torch']}. "
        f"{over} of {len(cases) - len(base)} rows over {LIMIT} x."
    )
    table = tabulate(lines, headers="keys", tablefmt="github", disable_numparse=True)
    failed = ["", "Not measured:", "", *(f"- {text}" for text in failures)] if failures else []
    return "\n".join([head, "", table, *failed])


if __name__ == "__main__":
    main()

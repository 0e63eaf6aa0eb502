"""Accuracy of the embedded ladder by 5-fold cross-validation over several seeds.

    python benchmarks/digits_cross_validation.py --seeds 5 --out build/cv

Every one of the 1,797 images is tested once per seed. Prints, per rung, the mean over seeds and
the mean paired drop from FP32 with its 95 % t-interval (n = seeds). Work is found again by key, so
a stopped run goes on where it was.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from scipy.stats import t

FOLDS = 5


def one(job: tuple[str, list[str], int, int, str]) -> list[tuple[str, int, int]]:
    """(stage, images right, images) for one fold of one seed."""
    config, overrides, seed, fold, out = job
    from bitladder.pipeline.config_load import load_config
    from bitladder.pipeline.runner import open_ladder, run_ladder

    logging.getLogger("bitladder").setLevel(logging.ERROR)
    own = [
        f"seed={seed}",
        f"data.fold={fold}",
        "runtime.threads=1",
        "runtime.checkpoint_seconds=600",
    ]
    ladder = open_ladder(load_config(config, [*overrides, *own]), out)
    records = run_ladder(ladder)
    found = []
    for stage, record in zip(ladder.plan.stages, records, strict=True):
        images = record.metrics["test_images"]
        found.append((stage.name, round(record.metrics["test_top1"] * images), images))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", default="digits")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2, help="each trains on one thread")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    jobs = [
        (args.config, args.set, seed, fold, str(args.out))
        for seed in range(args.seeds)
        for fold in range(FOLDS)
    ]
    began = time.monotonic()
    with ProcessPoolExecutor(args.processes, mp_context=get_context("spawn")) as pool:
        results = list(pool.map(one, jobs))
    accuracy: dict[str, list[float]] = {}
    for seed in range(args.seeds):
        folds = results[seed * FOLDS : (seed + 1) * FOLDS]
        for position, (stage, _, _) in enumerate(folds[0]):
            right = sum(fold[position][1] for fold in folds)
            images = sum(fold[position][2] for fold in folds)
            accuracy.setdefault(stage, []).append(right / images)
    seconds = time.monotonic() - began
    print(
        f"{args.seeds} seeds x {FOLDS} folds, {images} images tested once a seed, {seconds:.0f} s"
    )
    fp32 = next(iter(accuracy.values()))
    for stage, values in accuracy.items():
        drops = [100 * (a - b) for a, b in zip(fp32, values, strict=True)]
        listed = " ".join(f"{100 * v:.2f}" for v in values)
        print(f"{stage:>6}  {100 * mean(values):.2f} %  drop {interval(drops)}  ({listed})")


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def interval(values: list[float]) -> str:
    """Mean and half-width of its 95 % t-interval."""
    n, centre = len(values), mean(values)
    if n < 2:
        return f"{centre:+.2f}"
    deviation = math.sqrt(sum((v - centre) ** 2 for v in values) / (n - 1))
    return f"{centre:+.2f} +- {t.ppf(0.975, n - 1) * deviation / math.sqrt(n):.2f}"


if __name__ == "__main__":
    main()

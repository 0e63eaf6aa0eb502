"""Whether compiled ladders are as accurate as eager ones: the same ladder, both ways, seed by seed.

    python benchmarks/compiled_accuracy.py --out build/compiled
    python benchmarks/compiled_accuracy.py --out DIR --base study/fashion_short --set data.root=DATA

Compiling changes the last bits of a result and is not part of a stage's key, so each way has a
store of its own, `OUT/off` and `OUT/on`. A stopped run goes on where it was. Prints, for each rung,
both means and the mean difference over the seeds with its 95 % t-interval.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pandas as pd
import yaml
from bitladder.pipeline.study.statistics import paired
from tabulate import tabulate

NAME = "compiled"


def values(args: argparse.Namespace, way: str) -> pd.DataFrame:
    """The study's table of one way: a row for each seed and rung."""
    args.out.mkdir(parents=True, exist_ok=True)
    study = {"name": NAME, "base": args.base, "seeds": args.seeds, "arms": {"ladder": {}}}
    source = args.out / "compiled.yaml"
    source.write_text(yaml.safe_dump(study))
    settings = [f"set.train.compile={way}", *(f"set.{value}" for value in args.set)]
    store = args.out / way
    command = [sys.executable, "-m", "bitladder.flows", "study", str(source), "--store", str(store)]
    command += ["--workers", str(args.workers)]
    subprocess.run([*command, *(word for own in settings for word in ("--set", own))], check=True)
    found = list((store / "studies").glob(f"{NAME}-*/values.csv"))
    newest = max(found, key=lambda path: path.stat().st_mtime)
    return pd.read_csv(newest)


def main() -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base", default="study/digits_short")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    eager, compiled = values(args, "off"), values(args, "on")
    rows = []
    for stage in eager["stage"].unique():
        one, other = (
            (100 * of[of["stage"] == stage].set_index("seed")["test_top1"]).to_dict()
            for of in (eager, compiled)
        )
        found = paired(other, one)
        means = [sum(own.values()) / len(own) for own in (one, other)]
        interval = f"{found.low:+.2f} .. {found.high:+.2f}"
        rows.append((stage, *means, found.difference, interval, found.p, found.n))
    head = ("rung", "eager", "compiled", "difference", "95 %", "p", "n")
    print(tabulate(rows, head, floatfmt=("", ".2f", ".2f", "+.2f", "", ".2f", "")))


if __name__ == "__main__":
    main()

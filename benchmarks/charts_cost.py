"""What a ladder pays to be seen and shipped: the share of each rung's time that goes into
TensorBoard's charts, the look inside for its page, and its packed file.

python benchmarks/charts_cost.py [CONFIG] [--times 3] [--set KEY=VALUE ...]

Runs the ladder (digits by default) in a folder of its own with runtime.tensorboard on and
everything else as configured. All is timed in one process, so a busy machine slows all alike.
The first rung also pays for the import of TensorBoard. Look and packed file cost the same for a
rung of any length, so a short rung pays a larger share. Ends with 1 if the ladder as a whole pays
more than `--goal` percent.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bitladder.pipeline import runner
from bitladder.pipeline.config_load import load_config
from bitladder.pipeline.runner import open_ladder, run_ladder
from bitladder.pipeline.store import Store
from bitladder.pipeline.tensorboard import Charts
from ladder import longer

PARTS = ("charts", "look", "pack")


def main() -> None:
    args = parse_arguments()
    overrides = [*args.set, *longer(args.config, args.set, args.times)]
    config = load_config(args.config, [*overrides, "runtime.tensorboard=true"])
    spent: dict[str, list[float]] = defaultdict(list)  # a number a rung
    runner.found_or_made = timed(  # type: ignore[assignment]
        runner.found_or_made, spent, lambda ladder, stage, spec, stop: spec.kind
    )
    written: dict[int, float] = defaultdict(float)
    Charts.add = summed(Charts.add, written)  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        run_ladder(open_ladder(config, store))
        num_bytes = sum(path.stat().st_size for path in store.root.rglob("*tfevents*"))
    spent["charts"] = list(written.values())
    trained = next(spent[kind] for kind in spent if kind not in PARTS)
    for place, (rung, seconds) in enumerate(zip(config.ladder, trained, strict=True)):
        shares = {part: 100 * spent[part][place] / seconds for part in PARTS}
        told = ", ".join(f"{part} {share:.1f} %" for part, share in shares.items())
        print(f"{rung.name}: {seconds:.1f} s; {told}; together {sum(shares.values()):.1f} %")
    shares = {part: 100 * sum(spent[part]) / sum(trained) for part in PARTS}
    told = ", ".join(f"{part} {share:.1f} %" for part, share in shares.items())
    print(f"all: {sum(trained):.1f} s; {told}; together {sum(shares.values()):.1f} %")
    print(f"{num_bytes / 1e3:.0f} kB of events")
    sys.exit(sum(shares.values()) > args.goal)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("config", nargs="?", default="digits")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--times", type=int, default=1, help="as many epochs as configured")
    parser.add_argument("--goal", type=float, default=3.0, metavar="PERCENT")
    return parser.parse_args()


def timed(
    call: Callable[..., Any], spent: dict[str, list[float]], name: Callable[..., str]
) -> Callable[..., Any]:
    """The same call, whose seconds are noted under what it is named by its arguments."""

    def noted(*args: Any) -> Any:
        began = time.perf_counter()
        try:
            return call(*args)
        finally:
            spent[name(*args)].append(time.perf_counter() - began)

    return noted


def summed(add: Callable[..., None], written: dict[int, float]) -> Callable[..., None]:
    """`Charts.add` whose seconds are added up for each rung."""

    def noted(charts: Charts, *args: Any, **options: Any) -> None:
        began = time.perf_counter()
        add(charts, *args, **options)
        written[charts.first] += time.perf_counter() - began

    return noted


if __name__ == "__main__":
    main()

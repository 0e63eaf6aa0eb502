"""What TensorBoard costs a ladder: the share of each rung's time that goes into its charts.

python benchmarks/charts_cost.py [CONFIG] [--set KEY=VALUE ...]

Runs the ladder (digits by default) in a folder of its own with runtime.tensorboard on and
everything else as configured. Charts and rung are timed in one process, so a busy machine slows
both alike. The first rung also pays for the import of the package.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from bitladder.pipeline.config_load import load_config
from bitladder.pipeline.runner import open_ladder, run_ladder
from bitladder.pipeline.store import Store
from bitladder.pipeline.tensorboard import Charts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("config", nargs="?", default="digits")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    asked = parser.parse_args()
    spent: dict[int, float] = {}
    write = Charts.epoch

    def timed(charts: Charts, *facts: Any) -> None:
        began = time.perf_counter()
        write(charts, *facts)
        spent[charts.first] = spent.get(charts.first, 0.0) + time.perf_counter() - began

    Charts.epoch = timed  # type: ignore[method-assign]
    config = load_config(asked.config, [*asked.overrides, "runtime.tensorboard=true"])
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        records = run_ladder(open_ladder(config, store))
        num_bytes = sum(path.stat().st_size for path in store.root.rglob("*tfevents*"))
    for name, record, seconds in zip(
        [rung.name for rung in config.ladder], records, spent.values(), strict=True
    ):
        whole = record.metrics["seconds_here"]
        print(f"{name}: {seconds:.2f} of {whole:.1f} s, {100 * seconds / whole:.1f} %")
    print(f"{num_bytes / 1e3:.0f} kB of events")


if __name__ == "__main__":
    main()

"""A store with many ladders, and how long the commands that only look at it take.

    python benchmarks/large_store.py
    python benchmarks/large_store.py --runs 1000 --keep big

One small ladder of five rungs is trained for real; the others are copies of its stages under the
keys of other seeds, committed as any stage is. So folders, records and the index are as ladders
leave them, but the networks are tiny: reading one costs nothing that depends on the store.

Printed for each command: the wall time of a fresh process, its imports included, and how much of
it passed before the command could look at the store at all (`bitladder list` of an empty one).
Ends with 1 if a command takes longer than `--goal`.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bitladder.pipeline.config import RunConfig
from bitladder.pipeline.config_load import parse_config
from bitladder.pipeline.derived import look_spec, pack_spec, teacher_keys
from bitladder.pipeline.files import now
from bitladder.pipeline.plan import make_plan
from bitladder.pipeline.record import StageRecord
from bitladder.pipeline.runner import open_ladder, run_ladder
from bitladder.pipeline.spec import StageSpec
from bitladder.pipeline.store import Store

BITLADDER = str(Path(sys.executable).with_name("bitladder"))
WIDTHS = (32, 8, 4, 2, 1)


def main() -> None:
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        root = args.keep or Path(folder) / "store"
        if not root.exists():
            fill(Store(root), args.runs)
        run = Store(root).run().run
        empty = seconds_of(["list"], Path(folder) / "empty", args.repeats)
        print(f"{len(Store(root).keys())} stages; start-up {empty:.2f} s")
        slowest = 0.0
        for command in commands(run, Path(folder)):
            seconds = seconds_of(command, root, args.repeats)
            slowest = max(slowest, seconds)
            print(f"bitladder {' '.join(command[:3])}: {seconds:.2f} s", flush=True)
        sys.exit(slowest > args.goal)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=200, help="ladders of five rungs")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest counts")
    parser.add_argument("--goal", type=float, default=3.0, metavar="SECONDS")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="makes the store there, once")
    return parser.parse_args()


def commands(run: str, folder: Path) -> list[list[str]]:
    """Those that a user waits for and that train nothing."""
    page = ["--format", "html", "--out", str(folder / "page.html")]
    return [["list"], ["report"], ["report", run], ["report", run, *page]]


def ladder(seed: int) -> RunConfig:
    """A ladder that takes seconds; the seed makes it another one."""
    rungs = [{"weight_bits": bits, "activation_bits": bits, "epochs": 1} for bits in WIDTHS]
    return parse_config(
        {"name": "many", "seed": seed, "model": "tiny_convnet", "ladder": rungs}
        | {"data": {"name": "digits"}}
    )


def fill(store: Store, runs: int) -> None:
    """Trains the first ladder, and commits copies of its stages as those of the others."""
    began = time.monotonic()
    run_ladder(open_ladder(ladder(0), store))
    first = store.run()
    for seed in range(1, runs):
        plan = make_plan(ladder(seed))
        store.register(plan)
        made = zip(first.trained, first.packed, first.looks, strict=True)
        for stage, (trained, packed, look) in zip(plan.stages, made, strict=True):
            copy(store, trained, stage.spec)
            copy(store, packed, pack_spec(stage.key))
            copy(store, look, look_spec(stage.key, teacher_keys(stage.spec.parents)))
    print(f"made {runs} ladders in {time.monotonic() - began:.0f} s", flush=True)


def copy(store: Store, key: str, spec: StageSpec) -> StageRecord:
    """Commits what a stage left once more, as the result of another."""
    record, part = store.read(key), store.workdir(spec.key)
    assert record is not None
    for name in record.files:
        shutil.copy(store.stages / key / name, part / name)
    parents = {
        role: {"key": parent, "sha256": other.sha256}
        for role, parent in spec.parents.items()
        if (other := store.read(parent))
    }
    return store.commit(replace(record, key=spec.key, spec=spec, parents=parents, created=now()))


def seconds_of(command: Sequence[str], store: Path, repeats: int) -> float:
    """The fastest of several runs of a command: other work on the machine only adds."""
    times = []
    for _ in range(repeats):
        began = time.monotonic()
        subprocess.run(
            [BITLADDER, *command, "--store", str(store)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        times.append(time.monotonic() - began)
    return min(times)


if __name__ == "__main__":
    main()

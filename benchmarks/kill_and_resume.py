"""Kills a ladder with SIGKILL at random instants and resumes it: same weights, nothing left behind.

    python benchmarks/kill_and_resume.py
    python benchmarks/kill_and_resume.py --aim checkpoint=3 --aim evaluation=3 --aim commit=3
    python benchmarks/kill_and_resume.py --truncate --aim sql=10

A trial runs the ladder in a store of its own and kills the process at an instant drawn uniformly
over the time that an uninterrupted run takes. Within 5 s no process of it may live and both its
pipes must have ended. Then `bitladder resume` takes the ladder to its end (`bitladder run`, if no
stage had begun), and the sha256 of every stage's weights is compared with the uninterrupted run's,
and the results table with the files.

`--truncate` also cuts a file of the store off at a random byte before it resumes: first a kind of
file is drawn (results.db, results.db-wal, stage.json, last.pt, ...), then one of that kind. Its
instants reach beyond the end of the run, where there is nothing to kill but more to truncate; one
before there is any file to truncate waits for results.db.

`--aim PHASE=N` adds N trials that, from their instant on, wait for the next time that a phase of
that name begins, and kill within 20 ms of it; `sql` waits for a write to the SQLite database.

Exit code 1 if a trial fails. Linux only (/proc).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from watched_run import BITLADDER, WatchedRun

LIMIT = 5.0  # seconds after a kill until nothing of it may be left
AFTER_THE_END = "after the end"
SQL = "sql"
Weights = dict[str, str]  # stage key -> sha256


@dataclass(frozen=True)
class Setting:
    """What all trials share."""

    config: str
    options: list[str]  # of `bitladder run`
    runner: str
    truncate: bool
    out: Path


@dataclass(frozen=True)
class Trial:
    """When to kill: at an instant, or where `aim` names a phase, at its next beginning."""

    number: int
    instant: float
    aim: str | None
    seed: int


@dataclass
class Outcome:
    """What came of a trial."""

    trial: Trial
    seconds: float = 0.0  # of the kill, after the start
    phase: str = ""
    left: int = 0  # processes that lived on for more than LIMIT
    pipes_ended: bool = True
    gone_after: float = 0.0
    truncated: str = ""
    went_on: str = ""
    equal: bool = False
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether nothing was left and nothing lost."""
        return self.equal and not self.left and self.pipes_ended and not self.problems

    def __str__(self) -> str:
        cut = f"  truncated {self.truncated}" if self.truncated else ""
        return (
            f"{self.trial.number:3}  {self.seconds:6.2f} s  {self.phase:24}"
            f"  left {self.left}, pipes {'ended' if self.pipes_ended else 'OPEN'}"
            f" after {self.gone_after:.2f} s{cut}  {self.went_on}"
            f"  {'equal' if self.equal else 'DIFFERENT'}"
            + "".join(f"\n     {problem}" for problem in self.problems)
        )


def main() -> None:
    args = parse_arguments()
    options = [word for value in args.set for word in ("--set", value)]
    with tempfile.TemporaryDirectory(prefix="bitladder-kill-") as temporary:
        out = args.out or Path(temporary)
        setting = Setting(args.config, options, args.runner, args.truncate, out)
        seconds, expected = reference(setting, args.jobs)
        print(f"uninterrupted: {seconds:.1f} s, {len(expected)} stages", flush=True)
        draw = random.Random(args.seed)
        trials = draw_trials(args.trials, args.aim, seconds, draw, truncate=args.truncate)
        outcomes = []
        with ThreadPoolExecutor(args.jobs) as pool:
            for outcome in pool.map(lambda trial: run_trial(setting, trial, expected), trials):
                print(outcome, flush=True)
                outcomes.append(outcome)
    print_summary(outcomes)
    sys.exit(0 if all(outcome.passed for outcome in outcomes) else 1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("config", nargs="?", default="digits", help="as for bitladder run")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--runner", default="prefect", choices=("prefect", "plain"))
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--aim", action="append", default=[], type=_aim, metavar="PHASE=N")
    parser.add_argument("--truncate", action="store_true", help="also damage a file each time")
    parser.add_argument("--seed", type=int, default=0, help="of the instants and truncations")
    parser.add_argument("--jobs", type=int, default=1, help="trials at once; set runtime.threads")
    parser.add_argument("--out", type=Path, help="keep all stores in this new folder")
    args = parser.parse_args()
    if args.out is not None:
        args.out.mkdir(parents=True)
    return args


def _aim(text: str) -> tuple[str, int]:
    phase, _, number = text.partition("=")
    return phase, int(number)


def reference(setting: Setting, jobs: int) -> tuple[float, Weights]:
    """Seconds and weights of an uninterrupted run, as many at once as there will be trials."""
    runs = []
    for number in range(jobs):
        arguments = ["run", setting.config, *setting.options, "--runner", setting.runner]
        runs.append(WatchedRun(arguments, setting.out / f"uninterrupted-{number}"))
    seconds = []
    for run in runs:
        if run.finish():
            sys.exit("\n".join(run.lines))
        seconds.append(run.seconds)
    found = [weights(run.store) for run in runs]
    if any(other != found[0] for other in found):
        sys.exit("two uninterrupted runs differ: give --set runtime.threads=1")
    return sum(seconds) / jobs, found[0]


def draw_trials(
    number: int,
    aims: Sequence[tuple[str, int]],
    seconds: float,
    draw: random.Random,
    *,
    truncate: bool,
) -> list[Trial]:
    """Trials with uniform instants, then the aimed ones, which need some of the run ahead."""
    uniform: list[str | None] = [None] * number
    aimed = [aim for aim, times in aims for _ in range(times)]
    reach = 1.25 if truncate else 1.0
    return [
        Trial(n, draw.uniform(0, seconds * (0.75 if aim else reach)), aim, draw.getrandbits(32))
        for n, aim in enumerate([*uniform, *aimed], start=1)
    ]


def run_trial(setting: Setting, trial: Trial, expected: Weights) -> Outcome:
    """Kills, waits, perhaps truncates, resumes, compares."""
    draw = random.Random(trial.seed)
    store = setting.out / f"trial-{trial.number}"
    outcome = Outcome(trial)
    arguments = ["run", setting.config, *setting.options, "--runner", setting.runner]
    run = WatchedRun(arguments, store)
    if setting.truncate:
        run.wait_for_file(store / "results.db")
    kill(run, trial, draw, outcome)
    if setting.truncate:
        outcome.truncated = truncate_one(store, draw)
    outcome.went_on = go_on(setting, store, outcome)
    outcome.equal = weights(store) == expected
    outcome.problems += table_problems(store, expected)
    if outcome.passed:
        shutil.rmtree(store)
    return outcome


def kill(run: WatchedRun, trial: Trial, draw: random.Random, outcome: Outcome) -> None:
    """Ends a run at the trial's instant and waits until nothing of it is left, 5 s at most."""
    alive = run.wait_until(trial.instant)
    if alive and trial.aim == SQL:
        alive = run.wait_for_file(run.store / "results.db-wal")
    elif alive and trial.aim is not None:
        alive = run.wait_for_phase(trial.aim)
        time.sleep(draw.uniform(0, 0.02))
    outcome.seconds = run.seconds
    tree = run.kill() if alive else set()
    killed = time.monotonic()
    while (left := run.left(tree)) or not run.pipes_ended:
        if time.monotonic() - killed > LIMIT:
            break
        time.sleep(0.02)
    outcome.gone_after = time.monotonic() - killed
    outcome.left, outcome.pipes_ended = len(left), run.pipes_ended
    outcome.phase = run.phase if alive else AFTER_THE_END  # now that all it said is read


def truncate_one(store: Path, draw: random.Random) -> str:
    """Cuts a random file off at a random byte; says which."""
    files = [p for p in sorted(store.rglob("*")) if p.is_file() and p.stat().st_size]
    if not files:
        return "nothing"
    kind = draw.choice(sorted({path.name for path in files}))
    path = draw.choice([path for path in files if path.name == kind])
    size = path.stat().st_size
    kept = draw.randrange(size)
    os.truncate(path, kept)
    return f"{path.relative_to(store)} to {kept} of {size} bytes"


def go_on(setting: Setting, store: Path, outcome: Outcome) -> str:
    """Takes the ladder to its end; says with which command."""
    begun = any((store / "stages").glob("*")) if store.is_dir() else False
    end = ["--runner", setting.runner, "--store", str(store)]
    resumed = _bitladder(["resume", *end], outcome)
    if "nothing to resume" not in resumed:
        return "resumed"
    if begun:
        return "resume had nothing to do"
    _bitladder(["run", setting.config, *setting.options, *end], outcome)
    return "run anew"


def _bitladder(arguments: Sequence[str], outcome: Outcome) -> str:
    done = subprocess.run(
        [BITLADDER, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode:
        tail = "\n     ".join(done.stderr.splitlines()[-8:])
        outcome.problems.append(f"{arguments[0]} ended with code {done.returncode}: {tail}")
    return done.stdout


def weights(store: Path) -> Weights:
    """The sha256 of the weights of every committed stage."""
    return {
        path.parent.name: sha256(path.read_bytes()).hexdigest()
        for path in store.glob("stages/*/model.safetensors")
        if "." not in path.parent.name
    }


def table_problems(store: Path, expected: Weights) -> list[str]:
    """Where the results table says something else than the expected weights."""
    query = "SELECT key, sha256 FROM results WHERE state = 'done'"
    try:
        with contextlib.closing(sqlite3.connect(store / "results.db")) as connection:
            found = dict(connection.execute(query).fetchall())
    except sqlite3.Error as error:
        return [f"results.db: {error}"]
    return [] if found == expected else [f"results.db has {len(found)} right stages"]


def print_summary(outcomes: Sequence[Outcome]) -> None:
    uniform = [o for o in outcomes if o.trial.aim is None]
    aimed = [o for o in outcomes if o.trial.aim is not None]
    for name, group in (("uniform", uniform), ("aimed", aimed)):
        if not group:
            continue
        phases = Counter(_kind(outcome.phase) for outcome in group)
        passed = sum(outcome.passed for outcome in group)
        equal = sum(outcome.equal for outcome in group)
        listed = ", ".join(f"{phase} {times}" for phase, times in phases.most_common())
        print(f"{name}: passed {passed} of {len(group)}, weights equal {equal} of {len(group)}")
        print(f"  hit: {listed}")
    cut = Counter(Path(o.truncated.partition(" to ")[0]).name for o in outcomes if o.truncated)
    if cut:
        print("  truncated: " + ", ".join(f"{name} {n}" for name, n in cut.most_common()))
    print(f"nothing left of any after {max(o.gone_after for o in outcomes):.2f} s at most")


def _kind(phase: str) -> str:
    """`evaluation of epoch 3` is an evaluation like any other."""
    return phase.partition(" of epoch")[0]


if __name__ == "__main__":
    main()

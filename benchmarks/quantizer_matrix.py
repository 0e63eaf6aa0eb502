"""Every quantizer at every width that it takes, trained as one rung from the same FP32 networks.

    python benchmarks/quantizer_matrix.py --out matrix --root data
    python benchmarks/quantizer_matrix.py --out matrix --root data --table-only
    python benchmarks/quantizer_matrix.py --out matrix --data digits --only lsq dorefa

Digits: 1, 2, 3, 4 and 8 bits, five folds, each with a seed of its own, so n = 5 networks and every
image tested once. Fashion-MNIST: 1, 2 and 4 bits, 12,000 fixed training images (1,200 of them for
validation), the whole test set, three seeds. One recipe for all methods: it depends on the data set
and on the width, never on the method, and all options of a method are at their defaults. A rung
starts from the FP32 network of its fold or seed and is distilled by it, as in the shipped ladders.

A method that takes weights and activations at a width stands on both sides; where it refuses one,
the row says what stands there. A method that takes signed activations alone (signs, mostly) is
trained in the same network with RPReLU in place of ReLU, against that network's own FP32 rung; LSQ
and UniQ run there too, as the control. The shortcuts are padded, so every layer but the first and
the last (8 bits) has the row's width.

Everything goes through the store under --out: what is done is found there, so a run that was
stopped goes on where it was, and the tables (matrix.md, matrix.csv, and matrix_runs.csv with every
single network and its stage's key) are read from it.
"""

from __future__ import annotations

import argparse
import csv
import logging
import math
import signal
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from admitted import Refusal, Row, admitted

if TYPE_CHECKING:
    from multiprocessing.synchronize import Event

    from bitladder.pipeline.store import Store

FP32, RUNG = "fp32", "rung"


@dataclass(frozen=True)
class Setting:
    """How one data set is run.

    Attributes:
        data, model: sections of the config; the index of a repeat sets `data`'s fold, if any.
        widths: of the rows.
        repeats: folds or seeds.
        epochs: of the FP32 rung and, by width, of the others.
        lr: the same, for SGD at the data set's batch size.
    """

    data: Mapping[str, Any]
    model: Mapping[str, Any]
    folds: bool
    widths: tuple[int, ...]
    repeats: int
    epochs: Mapping[int, int]
    lr: Mapping[int, float]


WEIGHT_DECAY = {32: 5e-4, 8: 5e-4, 4: 5e-4, 3: 1e-4, 2: 1e-4, 1: 0.0}  # latent weights at one bit
SETTINGS = {
    "digits": Setting(
        data={"name": "digits", "batch_size": 64},
        model={"name": "preact_resnet8", "width": 16, "shortcut": "pad"},
        folds=True,
        widths=(1, 2, 3, 4, 8),
        repeats=5,
        epochs={32: 30, 8: 4, 4: 8, 3: 8, 2: 12, 1: 15},
        lr={32: 0.05, 8: 0.01, 4: 0.02, 3: 0.03, 2: 0.05, 1: 0.05},
    ),
    "fashion_mnist": Setting(
        data={"name": "fashion_mnist", "limit": 12_000, "batch_size": 64, "download": False},
        model={"name": "preact_resnet8", "width": 8, "shortcut": "pad"},
        folds=False,
        widths=(1, 2, 4),
        repeats=3,
        epochs={32: 8, 4: 1, 2: 2, 1: 3},
        lr={32: 0.05, 4: 0.02, 2: 0.05, 1: 0.05},
    ),
}


@dataclass(frozen=True)
class Job:
    """One network to train: a row at one fold or seed, or the FP32 network alone."""

    data: str
    index: int
    signed: bool
    row: Row | None
    root: str

    def __str__(self) -> str:
        unit = "fold" if SETTINGS[self.data].folds else "seed"
        what = self.row.label if self.row else f"fp32{'-signed' if self.signed else ''}"
        return f"{self.data} {what} {unit} {self.index}"


@dataclass(frozen=True)
class Outcome:
    """How a job ended: test accuracy of its last rung, or why there is none."""

    top1: float | None
    error: str
    seconds: float


def config_of(job: Job) -> dict[str, Any]:
    """The ladder of a job, as YAML would say it."""
    setting = SETTINGS[job.data]
    data = dict(setting.data)
    if setting.folds:
        data["fold"] = job.index
    else:
        data["root"] = job.root
    model = {**setting.model, **({"activation": "rprelu"} if job.signed else {})}
    ladder = [_rung(setting, 32, name=FP32)]
    if job.row is not None:
        methods = {"weight": job.row.weight, "activation": job.row.activation}
        ladder.append(_rung(setting, job.row.bits, name=RUNG, quantizer=methods))
    return {
        "name": str(job).replace(" ", "-"),
        "seed": job.index,
        "data": data,
        "model": model,
        "train": {"schedule": {"name": "cosine", "warmup_epochs": 0.25}},
        "distill": {"teacher": "fp32", "loss": "kl", "temperature": 1.0, "weight": 0.5},
        "runtime": {"device": "cpu", "threads": 1, "checkpoint_seconds": 600.0},
        "ladder": ladder,
    }


def _rung(setting: Setting, bits: int, **more: Any) -> dict[str, Any]:
    optimizer = {"name": "sgd", "lr": setting.lr[bits], "weight_decay": WEIGHT_DECAY[bits]}
    widths = {"weight_bits": bits, "activation_bits": bits}
    return {**widths, "epochs": setting.epochs[bits], "train": {"optimizer": optimizer}, **more}


# -- work ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Worker:
    """What a worker process has for all its jobs."""

    store: Store
    threads: int
    stop: Event


worker: Worker  # of this process


def prepare(out: str, threads: int, stop: Event) -> None:
    """What a worker process does once."""
    global worker
    import torch
    from bitladder.pipeline.store import Store

    logging.getLogger("bitladder").setLevel(logging.ERROR)
    torch.set_num_threads(threads)
    worker = Worker(Store(out), threads, stop)


def work(job: Job) -> Outcome:
    """Trains what is missing of a job's ladder; a failure comes back, it does not stop the rest."""
    from bitladder.pipeline.config_load import parse_config
    from bitladder.pipeline.errors import Interrupted, StageError
    from bitladder.pipeline.plan import make_plan
    from bitladder.pipeline.runner import open_ladder, run_ladder

    if worker.stop.is_set():
        raise Interrupted(signal.SIGINT)
    began = time.monotonic()
    raw = config_of(job)
    raw["runtime"]["threads"] = worker.threads
    try:
        config = parse_config(raw)
        try:
            top1 = run_ladder(open_ladder(config, worker.store))[-1].metrics["test_top1"]
        except (Interrupted, StageError):  # a stage notes its failure itself
            raise
        except Exception as error:
            worker.store.fail(make_plan(config).stages[-1].key, describe(error))
            raise
    except Interrupted:
        raise
    except Exception as error:
        return Outcome(None, describe(error), time.monotonic() - began)
    return Outcome(top1, "", time.monotonic() - began)


def describe(error: Exception) -> str:
    """An error in a line."""
    from bitladder.pipeline.errors import BitladderError

    kind = "" if isinstance(error, BitladderError) else f"{type(error).__name__}: "
    return " ".join(f"{kind}{error}".split())


def run(jobs: Sequence[Job], args: argparse.Namespace) -> None:
    """All jobs in worker processes, the FP32 networks first, a line for each."""
    context = get_context("spawn")
    stop = context.Event()
    progress = Progress(jobs, args.workers)
    pool = ProcessPoolExecutor(
        args.workers, context, initializer=prepare, initargs=(str(args.out), args.threads, stop)
    )
    with pool:
        try:
            for only_fp32 in (True, False):
                group = [job for job in jobs if (job.row is None) is only_fp32]
                futures = {pool.submit(work, job): job for job in group}
                for future in as_completed(futures):
                    progress.tell(futures[future], future.result())
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class Progress:
    """A line for each job that has ended, with a guess of what is left."""

    def __init__(self, jobs: Sequence[Job], workers: int) -> None:
        self._jobs, self._workers = len(jobs), workers
        self._waiting = Counter(job.data for job in jobs)
        self._seconds: dict[str, list[float]] = defaultdict(list)
        self._began = time.monotonic()

    def tell(self, job: Job, outcome: Outcome) -> None:
        """Prints the line of a job."""
        self._waiting[job.data] -= 1
        self._seconds[job.data].append(outcome.seconds)
        done = self._jobs - self._waiting.total()
        # a data set that has not begun has no mean yet
        means = {data: statistics.mean(seconds) for data, seconds in self._seconds.items()}
        left = sum(n * means.get(data, 0.0) for data, n in self._waiting.items()) / self._workers
        result = f"FAILED: {outcome.error}" if outcome.top1 is None else f"{outcome.top1:.2%}"
        minutes = (time.monotonic() - self._began) / 60
        print(
            f"[{done}/{self._jobs}] {job}: {result}  {outcome.seconds:.1f} s"
            f"  ({minutes:.1f} min, about {left / 60:.0f} left)",
            flush=True,
        )


# -- tables --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """Test accuracies of a rung and of its FP32 network."""

    top1: float
    fp32: float
    images: int
    classes: int
    seconds: float

    @property
    def near_chance(self) -> bool:
        """Whether guessing gives as much: below 1 / classes and three standard deviations."""
        p = 1 / self.classes
        return self.top1 < p + 3 * math.sqrt(p * (1 - p) / self.images)


@dataclass(frozen=True)
class Measured:
    """What the store holds of one job: its result, or why there is none."""

    job: Job
    key: str
    result: Result | None
    error: str


def look_up(job: Job, store: Store) -> Measured:
    """A job's result as the store has it."""
    from bitladder.pipeline.config_load import parse_config
    from bitladder.pipeline.errors import ConfigError
    from bitladder.pipeline.plan import make_plan

    try:
        fp32, rung = make_plan(parse_config(config_of(job))).stages
    except ConfigError as wrong:
        return Measured(job, "", None, describe(wrong))
    above, record = store.read(fp32.key), store.read(rung.key)
    if above is None or record is None:
        state, error = store.state(rung.key)
        return Measured(job, rung.key, None, error or state)
    result = Result(
        top1=record.metrics["test_top1"],
        fp32=above.metrics["test_top1"],
        images=record.metrics["test_images"],
        classes=record.network["num_classes"],
        seconds=record.metrics["seconds_here"],
    )
    return Measured(job, rung.key, result, "")


def summary(row: Row, runs: Sequence[Measured]) -> dict[str, Any]:
    """One line of the table; accuracies in per cent, the drop in points with its 95 % interval."""
    good = [run.result for run in runs if run.result is not None]
    top1 = [100 * result.top1 for result in good]
    drops = [100 * (result.fp32 - result.top1) for result in good]
    errors = list(dict.fromkeys(run.error for run in runs if run.error))
    notes = [f"{len(runs) - len(good)} of {len(runs)}: {'; '.join(errors)}"] if errors else []
    if lost := sum(result.near_chance for result in good):
        notes.append(f"NEAR CHANCE in {lost} of {len(good)}")
    return {
        "quantizer": row.quantizer,
        "bits": f"W{row.bits}A{row.bits}",
        "methods": row.methods(),
        "network": "rprelu" if row.signed else "relu",
        "n": len(good),
        "top1": _number(statistics.mean, top1),
        "sd": _number(statistics.stdev, top1),
        "fp32": _number(statistics.mean, [100 * result.fp32 for result in good]),
        "drop": _number(statistics.mean, drops),
        "drop_ci95": _half_width(drops),
        "worst": _number(min, top1),
        "seconds": _number(statistics.mean, [result.seconds for result in good]),
        "note": "; ".join(notes),
    }


def _number(of: Callable[[Sequence[float]], float], values: Sequence[float]) -> str:
    enough = len(values) > (1 if of is statistics.stdev else 0)
    return f"{of(values):.2f}" if enough else ""


def _half_width(values: Sequence[float]) -> str:
    """Of the 95 % t-interval of the mean."""
    from scipy.stats import t

    if len(values) < 2:
        return ""
    n = len(values)
    return f"{t.ppf(0.975, n - 1) * statistics.stdev(values) / math.sqrt(n):.2f}"


def write_tables(
    plan: Mapping[str, tuple[list[Row], list[Refusal]]], args: argparse.Namespace
) -> str:
    """Writes matrix.md, matrix.csv and matrix_runs.csv; gives back the first."""
    from bitladder.pipeline.store import Store
    from tabulate import tabulate

    store = Store(args.out)
    parts, lines, singles = [], [], []
    for data, (rows, refusals) in plan.items():
        table, runs = [], []
        for row in rows:
            jobs = [Job(data, i, row.signed, row, str(args.root)) for i in repeats(data, args)]
            found = [look_up(job, store) for job in jobs]
            table.append(summary(row, found))
            runs += found
        parts.append(f"## {data}\n\n{_facts(data, runs, store)}\n")
        parts.append(tabulate(table, headers="keys", tablefmt="github", disable_numparse=True))
        parts.append("")
        parts += _refused(refusals)
        lines += [{"data": data, **line} for line in table]
        singles += [_single(data, run) for run in runs]
    text = "\n".join(["# Quantizers x widths\n", *parts])
    (args.out / "matrix.md").write_text(text)
    _write_csv(args.out / "matrix.csv", lines)
    _write_csv(args.out / "matrix_runs.csv", singles)
    return text


def _facts(data: str, runs: Sequence[Measured], store: Store) -> str:
    """What the table below is of, in a sentence or two."""
    setting = SETTINGS[data]
    done = [run.result for run in runs if run.result is not None]
    records = [store.read(run.key) for run in runs if run.result is not None]
    machines = sorted(
        {f"{r.environment['device_name']}, torch {r.environment['torch']}" for r in records if r}
    )
    options = ", ".join(f"{k} {v}" for k, v in setting.model.items() if k != "name")
    epochs = ", ".join(f"{b} bits {n}" for b, n in setting.epochs.items())
    chance = sum(result.near_chance for result in done)
    repeats = len({run.job.index for run in runs})
    return (
        f"{setting.model['name']} ({options}); {'folds' if setting.folds else 'seeds'}: "
        f"{repeats}; epochs: {epochs}; each rung from FP32, distilled by it. "
        f"{len(done)} of {len(runs)} networks done, {chance} near chance, "
        f"{sum(result.seconds for result in done) / 3600:.2f} process hours for their rungs. "
        f"Accuracies in %, drop in points with its 95 % t-interval. {'; '.join(machines)}"
    )


def _refused(refusals: Iterable[Refusal]) -> list[str]:
    """The refused widths by method and reason."""
    widths: dict[tuple[str, str], list[int]] = defaultdict(list)
    for refusal in refusals:
        widths[refusal.quantizer, refusal.reason].append(refusal.bits)
    lines = [
        f"- {name}, {', '.join(map(str, bits))} bits: {reason}"
        for (name, reason), bits in widths.items()
    ]
    return ["Refused:\n", *lines, ""] if lines else []


def _single(data: str, run: Measured) -> dict[str, Any]:
    assert run.job.row is not None
    found = asdict(run.result) if run.result else dict.fromkeys(Result.__dataclass_fields__)
    return {
        "data": data,
        "run": run.job.row.label,
        "index": run.job.index,
        **found,
        "key": run.key,
        "error": run.error,
    }


def _write_csv(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]) if lines else [])
        writer.writeheader()
        writer.writerows(lines)


# -- command -------------------------------------------------------------------------------


def repeats(data: str, args: argparse.Namespace) -> range:
    """The folds or seeds that are run."""
    return range(min(SETTINGS[data].repeats, args.repeats or SETTINGS[data].repeats))


def parse_arguments() -> argparse.Namespace:
    from bitladder.quant import QUANTIZERS

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the store, and the tables")
    parser.add_argument("--root", type=Path, default=Path("data"), help="where Fashion-MNIST is")
    parser.add_argument("--data", choices=list(SETTINGS), help="one data set; default: both")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(QUANTIZERS))
    parser.add_argument("--repeats", type=int, help="at most so many folds or seeds")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--table-only", action="store_true", help="train nothing")
    return parser.parse_args()


def main() -> None:
    from bitladder.pipeline.errors import Interrupted
    from bitladder.quant import QUANTIZERS

    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    names = args.only or list(QUANTIZERS)
    plan = {
        data: admitted(names, setting.widths)
        for data, setting in SETTINGS.items()
        if args.data in (None, data)
    }
    if not args.table_only:
        jobs = []
        for data, (rows, _) in plan.items():
            for index in repeats(data, args):
                networks = sorted({row.signed for row in rows})
                jobs += [Job(data, index, signed, None, str(args.root)) for signed in networks]
                jobs += [Job(data, index, row.signed, row, str(args.root)) for row in rows]
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            run(jobs, args)
        except (KeyboardInterrupt, Interrupted):
            sys.exit(130)
    print(write_tables(plan, args))


if __name__ == "__main__":
    main()

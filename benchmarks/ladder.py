"""A whole ladder against a bare training loop: what the machinery costs, as a ratio.

    python benchmarks/ladder.py digits --times 10
    python benchmarks/ladder.py my.yaml --runner plain --repeats 3

The ladder is `bitladder run`, from the start of the process to its end: imports, Prefect and its
server, store, checkpoints, validation after every epoch, test, results table and reports. The bare
loop trains the same students on the same batches, in a fresh process, and does nothing else: no
store, no checkpoint, no flow, no evaluation. That both did the same work is seen from their last
weights, whose sha256 must be equal (exit code 1 if not); give `--set runtime.threads=1` where they
differ because PyTorch splits work among threads.

The goal, at most 3 % over the bare loop, is for a ladder of ten minutes: `--times 10` trains every
rung ten times as many epochs. Three ratios are printed: of wall time, against the loop alone, timed
from the first line after imports and data, and against the bare process as a whole; and of
processor time of all processes, which tells more where the machine has other work.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from functools import partial
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from watched_run import WatchedRun

if TYPE_CHECKING:
    import torch
    from bitladder.pipeline.config import RunConfig, StageConfig
    from bitladder.pipeline.data import DataBundle
    from bitladder.pipeline.learner import Learner
    from bitladder.pipeline.spec import PlannedStage
    from bitladder.pipeline.teachers import Teachers
    from bitladder.quant import Probe
    from torch import nn

GOAL = 0.03  # of the bare loop, for a ladder of ten minutes


def main() -> None:
    args = parse_arguments()
    args.set += longer(args.config, args.set, args.times)
    if args.bare:
        print(json.dumps(bare_ladder(args.config, args.set)))
        return
    ladders, bares = [], []
    for number in range(args.repeats):  # in turns, so that a machine that slows down slows both
        bares.append(bare_process(args))
        ladders.append(whole_ladder(args))
        print(
            f"{number + 1}: ladder {ladders[-1]['seconds']:.1f} s, bare process "
            f"{bares[-1]['seconds']:.1f} s, its loop {bares[-1]['loop']:.1f} s",
            flush=True,
        )
    report(ladders, bares)
    same = {run["sha256"] for run in (*ladders, *bares)}
    print(f"last weights: {'equal' if len(same) == 1 else 'DIFFERENT'} ({', '.join(same)})")
    sys.exit(len(same) != 1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("config", nargs="?", default="digits", help="as for bitladder run")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--times", type=int, default=1, help="so many times the epochs")
    parser.add_argument("--runner", default="prefect", choices=("prefect", "plain"))
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--bare", action="store_true", help="only the bare loop; prints JSON")
    return parser.parse_args()


def longer(source: str, overrides: list[str], times: int) -> list[str]:
    """Overrides that give each rung of a list so many times its epochs."""
    if times == 1:
        return []
    from bitladder.pipeline.config_load import load_config

    rungs = load_config(source, overrides).ladder
    return [f"ladder.{n}.epochs={times * rung.train.epochs}" for n, rung in enumerate(rungs)]


def _options(overrides: list[str]) -> list[str]:
    return [word for value in overrides for word in ("--set", value)]


def whole_ladder(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of `bitladder run` in a new store, those of each phase, and the last weights."""
    before = processor_seconds()
    with tempfile.TemporaryDirectory(prefix="bitladder-ladder-") as folder:
        arguments = ["run", args.config, *_options(args.set), "--runner", args.runner]
        run = WatchedRun(arguments, Path(folder))
        code = run.finish()
        seconds = run.seconds
        if code:
            sys.exit("\n".join(run.lines))
        phases: dict[str, float] = defaultdict(float)
        ends = [began for began, _ in run.phases[1:]] + [seconds]
        for (began, phase), end in zip(run.phases, ends, strict=True):
            phases[phase.partition(" of epoch")[0]] += end - began
        manifests = [json.loads(p.read_text()) for p in Path(folder).glob("stages/*/stage.json")]
        trained = [manifest for manifest in manifests if "model.safetensors" in manifest["files"]]
        last = max(trained, key=lambda manifest: str(manifest["created"]))
        digest = last["files"]["model.safetensors"]["sha256"]
    processor = processor_seconds() - before
    return {"seconds": seconds, "processor": processor, "phases": phases, "sha256": digest}


def bare_process(args: argparse.Namespace) -> dict[str, Any]:
    """The same training in a process of its own: its seconds, and what it says itself."""
    began, before = time.monotonic(), processor_seconds()
    words = [sys.executable, __file__, args.config, *_options(args.set), "--bare"]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    seconds, processor = time.monotonic() - began, processor_seconds() - before
    return {"seconds": seconds, "processor": processor, **json.loads(done.stdout)}


def processor_seconds() -> float:
    """Of all processes that were started from here and have ended, and of those they waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def bare_ladder(source: str, overrides: list[str]) -> dict[str, Any]:
    """Trains all rungs one after the other, everything in memory; seconds and last weights."""
    import torch
    from bitladder.pipeline.config_load import load_config
    from bitladder.pipeline.machine import choose_device, keep_freed_memory
    from bitladder.pipeline.plan import make_plan
    from bitladder.pipeline.runner import data_of
    from safetensors.torch import save

    config = load_config(source, overrides)
    stages = make_plan(config).stages
    data = data_of(config.data)
    device = choose_device(config.runtime.device)
    if config.runtime.keep_freed_memory:
        keep_freed_memory()
    if config.runtime.threads:
        torch.set_num_threads(config.runtime.threads)
    began = time.monotonic()
    trained: dict[str, nn.Module] = {}
    for stage in stages:
        torch.manual_seed(int(stage.key[:15], 16))
        trained[stage.key] = bare_stage(config, stage, data, trained, device).eval()
    if device.type == "cuda":
        torch.cuda.synchronize()
    loop = time.monotonic() - began
    weights = trained[stages[-1].key].state_dict()
    plain = {name: tensor.cpu().contiguous() for name, tensor in weights.items()}
    return {"loop": loop, "sha256": sha256(save(plain)).hexdigest()}


def bare_stage(
    config: RunConfig,
    planned: PlannedStage,
    data: DataBundle,
    trained: dict[str, nn.Module],
    device: torch.device,
) -> nn.Module:
    """One rung: hand over, calibrate, distil, re-estimate batch norm."""
    from bitladder.models import load_weights
    from bitladder.pipeline.cheap_teachers import ready_teachers
    from bitladder.pipeline.learner import Learner, Objective
    from bitladder.pipeline.network import build_network, describe_network
    from bitladder.pipeline.policy import policy_of
    from bitladder.pipeline.stages.train import PROBE_BATCHES, calibration_of
    from bitladder.quant.absorb import absorb_relus
    from bitladder.quant.calibrate import bake, calibrate, ranges, reestimate_batch_norm
    from bitladder.quant.probing import probe
    from bitladder.quant.swap import apply_plan, float_state_dict

    options, parents = planned.spec.options, planned.spec.parents
    stage, seed, batch_size = config.ladder[planned.position], options["seed"], _batch(options)
    drawn = calibration_of(stage, data, batch_size=batch_size, seed=seed, device=device)
    calibration = list(drawn(stage.train.calibration_batches))
    student = build_network(describe_network(options["model"], data), seed=seed)
    parent = trained.get(parents.get("init", ""))
    if parent is not None:
        student.load_state_dict(float_state_dict(parent), strict=True)
    elif options["weights"]:
        load_weights(student, Path(config.model.weights or ""), key_map=options["key_map"])
    student.to(device)
    facts = probe(student, calibration[:PROBE_BATCHES])
    if not stage.full_precision:
        student = apply_plan(student, policy_of(stage).resolve(facts)).to(device)
        calibrate(student, calibration, keep=ranges(parent) if parent is not None else None)
        if stage.train.batch_norm_batches:
            reestimate_batch_norm(student, calibration)
    absorb_relus(student)
    above = [bake(copy.deepcopy(trained[parents["teacher"]]))] if "teacher" in parents else []
    teachers, _ = ready_teachers(
        above,
        stage.distill,
        data,
        augment=stage.train.augment,
        batch_size=batch_size,
        seed=seed,
        device=device,
    )
    distill = stage.distill if above else None
    objective = Objective(stage.train, distill, stage.bin_regularization, stage.oscillation)
    learner = Learner(student, objective, precision=stage.train.precision).to(device).train()
    bare_loop(learner, teachers, data, stage, facts, batch_size, seed, device)
    if stage.train.epochs and stage.train.batch_norm_batches:
        reestimate_batch_norm(student, drawn(stage.train.batch_norm_batches))
    return student


def bare_loop(
    learner: Learner,
    teachers: Teachers,
    data: DataBundle,
    stage: StageConfig,
    facts: Probe,
    batch_size: int,
    seed: int,
    device: torch.device,
) -> None:
    """Nothing but steps, compiled where the stage's are."""
    from bitladder.pipeline.compiling import compile_networks, wants, why_not
    from bitladder.pipeline.optimizer import build_optimizer
    from bitladder.pipeline.training_step import TrainingStep

    per_epoch = data.train.num_batches(batch_size)
    steps, number = stage.train.epochs * per_epoch, 0
    batches = partial(
        data.train.batches, batch_size, seed=seed, augment=stage.train.augment, device=device
    )
    wanted = wants(stage.train, facts, batch_size=batch_size, steps=steps, device=device)
    if wanted and steps and len(data.train) >= batch_size and not why_not(learner.student):
        compile_networks(learner, teachers, next(batches(epoch=0))[0])
    step = TrainingStep(
        learner,
        teachers,
        build_optimizer(learner, learner.student, stage.train),
        stage,
        steps=steps,
        per_epoch=per_epoch,
        seed=seed,
    )
    learner.train()
    for epoch in range(stage.train.epochs):
        for x, targets in batches(epoch=epoch, start=0):
            step(x, targets, number)
            number += 1


def _batch(options: Any) -> int:
    return int(options["data"]["batch_size"])


def report(ladders: list[dict[str, Any]], bares: list[dict[str, Any]]) -> None:
    """Medians over the repeats, their ratios, and where the ladder's time went."""
    from timing import where_and_how

    whole, process = (median(run["seconds"] for run in runs) for runs in (ladders, bares))
    busy, bare_busy = (median(run["processor"] for run in runs) for runs in (ladders, bares))
    loop = median(run["loop"] for run in bares)
    over = median(
        ladder["seconds"] / bare["loop"] - 1 for ladder, bare in zip(ladders, bares, strict=True)
    )
    missed = over - GOAL
    verdict = f"missed by {100 * missed:.1f} points" if missed > 0 else "met"
    print(f"{where_and_how()}; n = {len(ladders)}")
    print(f"bitladder run   {whole:8.1f} s,  processor {busy:8.1f} s")
    print(f"bare process    {process:8.1f} s,  processor {bare_busy:8.1f} s")
    print(f"bare loop       {loop:8.1f} s")
    print(
        f"machinery / bare loop {100 * over:.1f} % (goal for ten minutes: at most "
        f"{100 * GOAL:.0f} %; {verdict}, in {whole / 60:.1f} minutes)"
    )
    print(f"ladder / bare process {whole / process:.3f}, of processor time {busy / bare_busy:.3f}")
    print("where the ladder's time went (medians):")
    names = {phase for run in ladders for phase in run["phases"]}
    medians = {name: median(run["phases"][name] for run in ladders) for name in names}
    for name, seconds in sorted(medians.items(), key=lambda item: -item[1]):
        print(f"  {name:28}{seconds:8.2f} s  {100 * seconds / whole:5.1f} %")


if __name__ == "__main__":
    main()

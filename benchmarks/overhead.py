"""What the whole machinery costs over the bare training loop, as a ratio of wall times.

    python benchmarks/overhead.py digits --set train.epochs=60
    python benchmarks/overhead.py my.yaml --runner plain --repeats 3

The ladder is `bitladder run`, from the start of the process to its end: imports, Prefect and its
server, store, checkpoints, validation after every epoch, test, results table and reports. The bare
loop trains the same students on the same batches, in a fresh process, and does nothing else: no
store, no checkpoint, no flow, no evaluation. That both did the same work is seen from their last
weights, whose sha256 must be equal (exit code 1 if not); give `--set runtime.threads=1` where they
differ because PyTorch splits work among threads.

Three ratios are printed: of wall time, against the bare process as a whole and against its loop
alone, timed from the first line after imports and data; and of processor time of all processes,
which tells more where the machine has other work.
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
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from watched_run import WatchedRun

if TYPE_CHECKING:
    import torch
    from bitladder.pipeline.config import RunConfig, StageConfig
    from bitladder.pipeline.data import DataBundle
    from bitladder.pipeline.spec import PlannedStage
    from torch import nn


def main() -> None:
    args = parse_arguments()
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
    parser.add_argument("--runner", default="prefect", choices=("prefect", "plain"))
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--bare", action="store_true", help="only the bare loop; prints JSON")
    return parser.parse_args()


def _options(overrides: list[str]) -> list[str]:
    return [word for value in overrides for word in ("--set", value)]


def whole_ladder(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of `bitladder run` in a new store, those of each phase, and the last weights."""
    before = processor_seconds()
    with tempfile.TemporaryDirectory(prefix="bitladder-overhead-") as folder:
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
        last = max(manifests, key=lambda manifest: str(manifest["created"]))
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
    from bitladder.pipeline.runner import load_data
    from safetensors.torch import save

    config = load_config(source, overrides)
    stages = make_plan(config).stages
    data = load_data(config.data.name, json.dumps(config.data.options, sort_keys=True))
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
    from bitladder.pipeline.network import build_network, describe_network
    from bitladder.pipeline.policy import policy_of
    from bitladder.pipeline.stages.train import PROBE_BATCHES
    from bitladder.quant.calibrate import bake, calibrate, ranges, reestimate_batch_norm
    from bitladder.quant.probing import probe
    from bitladder.quant.swap import apply_plan, float_state_dict

    options, parents = planned.spec.options, planned.spec.parents
    stage, seed, batch_size = config.ladder[planned.position], options["seed"], _batch(options)
    count = stage.train.calibration_batches
    calibration = list(data.train.calibration(batch_size, count, seed=seed, device=device))
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
    teacher = bake(copy.deepcopy(trained[parents["teacher"]])) if "teacher" in parents else None
    bare_loop(student, teacher, data, stage, batch_size, seed, device)
    if stage.train.epochs and stage.train.batch_norm_batches:
        count = stage.train.batch_norm_batches
        again = data.train.calibration(batch_size, count, seed=seed, device=device)
        reestimate_batch_norm(student, again)
    return student


def bare_loop(
    student: nn.Module,
    teacher: nn.Module | None,
    data: DataBundle,
    stage: StageConfig,
    batch_size: int,
    seed: int,
    device: torch.device,
) -> None:
    """Nothing but steps."""
    from bitladder.pipeline.fit import freeze_scales
    from bitladder.pipeline.learner import Learner, Objective
    from bitladder.pipeline.optimizer import build_optimizer, global_norm_clip, set_lr
    from bitladder.pipeline.schedule import lr_factor
    from bitladder.pipeline.teachers import teach

    distill = stage.distill if teacher is not None else None
    objective = Objective(stage.train, distill, stage.bin_regularization, stage.oscillation)
    learner = Learner(student, objective).to(device)
    optimizer = build_optimizer(learner, student, stage.train)
    per_epoch, bins = data.train.num_batches(batch_size), stage.bin_regularization
    steps, step, frozen = stage.train.epochs * per_epoch, 0, False
    augment = stage.train.augment
    learner.train()
    for epoch in range(stage.train.epochs):
        for x, targets in data.train.batches(
            batch_size, seed=seed, epoch=epoch, start=0, augment=augment, device=device
        ):
            progress = step / steps
            if not frozen and progress >= bins.warmup:
                freeze_scales(student, bins.freeze_weight_scale, "weight_quantizer")
                freeze_scales(student, bins.freeze_activation_scale, "input_quantizer")
                frozen = True
            set_lr(optimizer, lr_factor(stage.train.schedule, step, steps, per_epoch))
            taught = teach([teacher] if teacher is not None else [], x)
            learner.before_step(progress)
            learner(x, targets, taught, progress)["total"].backward()
            if stage.train.clip_grad_norm is not None:
                global_norm_clip(learner, stage.train.clip_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            learner.after_step(progress)
            step += 1


def _batch(options: Any) -> int:
    return int(options["data"]["batch_size"])


def report(ladders: list[dict[str, Any]], bares: list[dict[str, Any]]) -> None:
    """Medians over the repeats, their ratios, and where the ladder's time went."""
    whole, process = (median(run["seconds"] for run in runs) for runs in (ladders, bares))
    busy, bare_busy = (median(run["processor"] for run in runs) for runs in (ladders, bares))
    loop = median(run["loop"] for run in bares)
    print(f"bitladder run   {whole:8.1f} s,  processor {busy:8.1f} s")
    print(
        f"bare process    {process:8.1f} s,  processor {bare_busy:8.1f} s   "
        f"ratio {whole / process:.3f}, of processor time {busy / bare_busy:.3f}"
    )
    print(f"bare loop       {loop:8.1f} s   ratio {whole / loop:.3f}")
    print("where the ladder's time went (medians):")
    names = {phase for run in ladders for phase in run["phases"]}
    medians = {name: median(run["phases"][name] for run in ladders) for name in names}
    for name, seconds in sorted(medians.items(), key=lambda item: -item[1]):
        print(f"  {name:28}{seconds:8.2f} s  {100 * seconds / whole:5.1f} %")


if __name__ == "__main__":
    main()

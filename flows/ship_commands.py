"""`bitladder export`, `predict` and `bench`: the files to ship, and what they do."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from ..pipeline.derived import SUFFIXES, bench_spec, export_spec, format_of
from ..pipeline.errors import ConfigError, StoreError
from ..pipeline.files import write_atomic
from ..pipeline.record import StageRecord
from ..pipeline.resume_command import resume_command
from ..pipeline.run import Run
from ..pipeline.store import Store
from .tables import print_table, table_of


def export_run(
    name: str | None,
    stage: str | None,
    form: str,
    batch: int | None,
    narrow: bool,
    vnni: bool,
    out: Path | None,
    force: bool,
    store: Store,
) -> None:
    """`bitladder export`."""
    from ..pipeline.derive import derive

    if batch is not None and form != "openvino":
        raise ConfigError([f"--batch is for --format openvino; {form} takes any"])
    if narrow and form != "onnx":
        raise ConfigError([f"--narrow is for --format onnx, not {form}"])
    if vnni and form != "openvino":
        raise ConfigError([f"--vnni is for --format openvino; {form} is the same without it"])
    run = store.run(name)
    packed = _packed(run, stage, store)
    try:
        wanted = _targets(out, packed, form) if out is not None else {}
        there = [path for files in wanted.values() for path in files.values() if path.exists()]
    except OSError as error:  # such as a name that is too long
        raise ConfigError([f"--out {out}: {error.strerror or error}"]) from None
    if there and not force:
        raise ConfigError([f"{p} exists already; give another --out, or --force" for p in there])
    rows = []
    for rung, record in packed.items():
        made = record
        if form != "packed":
            spec = export_spec(record.key, form, batch=batch, narrow=narrow, vnni=vnni)
            made = derive(run, rung, spec, store)
        if rung in wanted:
            _deliver(made, store, wanted[rung])
        places = wanted.get(rung) or {
            Path(n).suffix: store.stages / made.key / n for n in made.files
        }
        rows.append((rung, made, places[SUFFIXES[form][0]]))
    table = table_of(("stage", "kB", "test %", "file"), right=("kB", "test %"))
    for rung, made, target in rows:
        size = made.metrics.get("export_bytes", made.metrics.get("packed_bytes"))
        top1 = made.metrics.get("export_top1", made.metrics.get("deployed_top1"))
        table.add_row(rung, f"{size / 1e3:.1f}", f"{100 * top1:.2f}", escape(str(target)))
    print_table(table)
    for rung, made, _ in rows if form == "onnx" and not narrow else []:
        if "openvino" not in made.metrics["runtimes"]:
            print(
                f"{rung}: for ONNX Runtime; OpenVINO adds it wrongly without VNNI instructions, "
                "which this processor lacks: give OpenVINO --format openvino"
            )


def _packed(run: Run, stage: str | None, store: Store) -> dict[str, StageRecord]:
    """The packed networks of a run, or of one stage of it, by stage.

    Raises:
        ConfigError: there is no such stage.
        StoreError: one is not packed yet.
    """
    names = [str(s["name"]) for s in run.stages]
    if stage is not None and stage not in names:
        raise ConfigError([f"no stage {stage!r} in {run.run}; there are: {', '.join(names)}"])
    found = {}
    for name, key in zip(names, run.packed, strict=True):
        record = store.find(key) if stage in (None, name) else None
        if record is not None:
            found[name] = record
        elif stage in (None, name):
            raise StoreError(
                f"{name} of {run.run} is not packed yet; go on with: "
                f"{resume_command(store, run.run)}"
            )
    return found


def _targets(out: Path, rungs: Collection[str], form: str) -> dict[str, dict[str, Path]]:
    """Where the files of each rung are wanted, by suffix; the main file first.

    Raises:
        ConfigError: several rungs are to go into one file.
    """
    if len(rungs) > 1 and out.is_file():
        raise ConfigError([f"--out {out} is a file; several rungs need a folder, or give --stage"])
    main = SUFFIXES[form][0]
    found = {}
    for rung in rungs:
        path = out if out.suffix == main else Path(f"{out}{main}")
        if len(rungs) > 1 or out.is_dir():
            path = out / f"{rung}{main}"
        found[rung] = {suffix: path.with_suffix(suffix) for suffix in SUFFIXES[form]}
    return found


def _deliver(made: StageRecord, store: Store, wanted: Mapping[str, Path]) -> None:
    """Copies the files of a stage to where they are wanted: all of them, or none."""
    written: list[Path] = []
    try:
        for name in made.files:
            target = wanted[Path(name).suffix]
            target.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(target, (store.stages / made.key / name).read_bytes())
            written.append(target)
    except OSError as error:
        for target in written:
            target.unlink()
        raise ConfigError([f"--out {target}: {error.strerror or error}"]) from None


def predict_images(file: Path, images: Sequence[Path], top: int, trust: Collection[str]) -> None:
    """`bitladder predict`."""
    from ..pipeline.predict import predict

    table = table_of(("image", *(f"class {n}" for n in range(1, top + 1))))
    for found in predict(file, images, top=top, trust=trust):
        classes = (f"{name} {100 * share:.1f} %" for name, share in found.classes)
        table.add_row(*map(escape, (str(found.image), *classes)))  # a name may look like markup
    print_table(table)


def bench_networks(
    asked: Sequence[str],
    batches: Sequence[int],
    threads: int | None,
    trust: Collection[str],
    again: bool,
    store: Store,
) -> None:
    """`bitladder bench`: files are timed, ladders are timed and that is recorded."""
    import torch

    from ..pipeline.machine import describe
    from ..pipeline.report import speed_row
    from ..pipeline.runtimes import runtime_versions

    files = {one: Path(one) for one in asked if Path(one).is_file()}
    runs = {one: _run_named(one, store) for one in asked if one not in files}
    if other := [file for file in files.values() if format_of(file) != "packed"]:
        way_out = "bench takes packed files, and times their ONNX and OpenVINO forms itself"
        raise ConfigError([f"{file}: {way_out}" for file in other])
    threads = threads or torch.get_num_threads()
    machine = str(describe(torch.device("cpu"))["device_name"])
    table = table_of(
        (
            "network",
            "runtime",
            "batch",
            "ms",
            "10-90 %",
            "images/s",
            "FP32 ms",
            "times",
            "layers in",
        ),
        right=("batch", "ms", "10-90 %", "images/s", "FP32 ms", "times"),
    )
    versions = ", ".join(f"{name} {number}" for name, number in runtime_versions().items())
    notes = []
    with Console(stderr=True).status("") as status:
        for one in asked:
            if one in files:
                found = _bench_file(files[one], batches, threads, trust, status.update)
            else:
                found = _bench_run(
                    runs[one], batches, threads, machine, again, store, status.update
                )
            for name, timings in found:
                for speed in timings["speeds"]:
                    table.add_row(escape(name), *speed_row(speed).values())
                notes += [f"{name}: no {r}: {why}" for r, why in timings["left_out"].items()]
    print_table(table)
    print("\n".join([*notes, f"{machine}, {threads} threads, {versions}"]))


def _run_named(name: str, store: Store) -> Run:
    """A run that was asked for where a file could be meant.

    Raises:
        StoreError: it is neither.
    """
    try:
        return store.run(name)
    except StoreError as error:
        raise StoreError(f"there is no file {name}, and no such run: {error}") from None


def _bench_file(
    file: Path,
    batches: Sequence[int],
    threads: int,
    trust: Collection[str],
    say: Callable[[str], None],
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Name and `Timings`, once."""
    import torch

    from ..pipeline.bench import bench
    from ..pipeline.packed_file import read_packed

    torch.set_num_threads(threads)
    packed = read_packed(file, trust=trust)

    def tell(done: int, all_: int) -> None:
        say(f"{escape(file.name)}: round {done} of {all_}")

    yield file.name, asdict(bench(packed, batches=batches, after_round=tell))


def _bench_run(
    run: Run,
    batches: Sequence[int],
    threads: int,
    machine: str,
    again: bool,
    store: Store,
    say: Callable[[str], None],
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Name and `Timings` of each rung, as recorded."""
    from ..pipeline.derive import derive
    from ..pipeline.runtimes import runtime_versions

    versions = runtime_versions()
    for rung, record in _packed(run, None, store).items():
        say(f"{run.run}, {rung}")
        spec = partial(bench_spec, record.key, machine, threads, batches, versions=versions)
        measured = next(n for n in count() if store.find(spec(repeat=n).key) is None)
        repeat = measured if again else max(measured - 1, 0)
        yield rung, derive(run, rung, spec(repeat=repeat), store).metrics

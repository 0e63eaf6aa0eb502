"""What each command of the command line does."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..pipeline.errors import BitladderError, ConfigError, Interrupted, StoreError
from ..pipeline.record import CHECKPOINT
from ..pipeline.store import Run, Store

console = Console(soft_wrap=False)
_COLOURS = {"done": "green", "running": "cyan", "failed": "red", "interrupted": "yellow"}


def run_config(source: str, overrides: Sequence[str], store: Store, runner: str) -> None:
    """`bitladder run`."""
    from ..pipeline.config_load import load_config

    _run(load_config(source, overrides), store, runner)


def resume_run(name: str | None, store: Store, runner: str) -> None:
    """`bitladder resume`."""
    from ..pipeline.config_load import parse_config

    if name is None:
        unfinished = [run for run in store.runs() if _state(store, run) != "done"]
        if not unfinished:
            print("nothing to resume: every ladder in the store is done")
            return
        run = unfinished[-1]
    else:
        run = store.run(name)
    print(f"resuming {run.run}", file=sys.stderr)
    _run(parse_config(run.config), store, runner)


def _run(config: Any, store: Store, runner: str) -> None:
    from ..pipeline.report import accuracy_report
    from .launch import launch
    from .progress import terminal_listener

    try:
        with terminal_listener(Console(stderr=True)) as listener:
            run = launch(config, store, runner=runner, listener=listener)
    except Interrupted:
        print("stopped, and saved; go on with: bitladder resume", file=sys.stderr)
        raise
    except BitladderError as error:
        if error.exit_code == 1:
            print("go on after mending the cause with: bitladder resume", file=sys.stderr)
        raise
    frame = accuracy_report(store, run)
    print_frame(frame)
    print_files(store, run)


def show_plan(source: str, overrides: Sequence[str], store: Store) -> None:
    """`bitladder plan`."""
    from ..pipeline.config_load import load_config
    from ..pipeline.plan import make_plan

    plan = make_plan(load_config(source, overrides))
    table = Table(title=plan.run, title_justify="left")
    for column in ("stage", "kind", "key", "starts from", "teacher", "epochs", "state"):
        table.add_column(column)
    for stage in plan.stages:
        state, _ = store.state(stage.key)
        words = {"interrupted": "partly done", "failed": "partly done, failed"}.get(state, state)
        table.add_row(
            stage.name,
            stage.spec.kind,
            stage.key,
            stage.parent or "scratch",
            stage.teacher or "none",
            str(plan.config.ladder[stage.position].train.epochs),
            f"[{_COLOURS.get(state, 'default')}]{words}[/]",
        )
    console.print(table)


def list_runs(store: Store) -> None:
    """`bitladder list`."""
    runs = store.runs()
    if not runs:
        print(f"no ladder in {store.root} yet; start one with: bitladder run digits")
        return
    table = Table()
    for column in ("run", "state", "stages done", "data", "model", "seed", "created"):
        table.add_column(column)
    for run in runs:
        states = [store.state(str(s["key"]))[0] for s in run.stages]
        state = _state(store, run)
        table.add_row(
            run.run,
            f"[{_COLOURS.get(state, 'default')}]{state}[/]",
            f"{states.count('done')} of {len(states)}",
            run.config["data"]["name"],
            run.config["model"]["name"],
            str(run.config["seed"]),
            run.created[:16].replace("T", " "),
        )
    console.print(table)


def _state(store: Store, run: Run) -> str:
    """A ladder's state: the worst of its stages'."""
    states = {store.state(str(stage["key"]))[0] for stage in run.stages}
    for state in ("running", "failed", "interrupted"):
        if state in states:
            return state
    return "interrupted" if states != {"done"} else "done"


def show_report(names: Sequence[str], form: str, out: Path | None, store: Store) -> None:
    """`bitladder report`."""
    from ..pipeline.report import people, render, reports, write_report

    runs = [store.run(name) for name in names] if names else [store.run()]
    frame = reports(store, runs)
    if form == "table" and out is None:
        print_frame(frame)
    elif form == "table":
        assert out is not None
        out.write_text(people(frame).to_string(index=False) + "\n", encoding="utf-8")
    elif out is not None:
        print(write_report(frame, form, out))
    elif form == "parquet" and sys.stdout.isatty():
        raise ConfigError(["parquet is not for a terminal; give --out FILE"])
    else:
        sys.stdout.buffer.write(render(frame, form))


def print_frame(frame: Any) -> None:
    """The table for people on standard output, colours on a terminal only."""
    from ..pipeline.report import people

    shown = people(frame)
    if not sys.stdout.isatty():
        print(shown.to_string(index=False))
    else:
        table = Table()
        left = ("run", "stage", "state", "quantizer", "teacher")
        for column in shown.columns:
            table.add_column(column, justify="left" if column in left else "right")
        for row in shown.to_numpy().tolist():
            table.add_row(*(f"[{_COLOURS.get(v, 'default')}]{v}[/]" for v in row))
        console.print(table)
    for row in frame[frame["error"].notna()].to_dict("records"):
        print(f"{row['stage']}: {row['error']}")
    if frame["state"].ne("done").any():
        unfinished = frame[frame["state"] != "done"]["run"].iloc[0]
        print(f"not finished; go on with: bitladder resume {unfinished}")


def print_files(store: Store, run: Run) -> None:
    """Where everything lies."""
    for stage in run.stages:
        record = store.read(str(stage["key"]))
        for name in record.files if record else ():
            print(store.stages / str(stage["key"]) / name)
    for path in sorted((store.reports / run.run).iterdir()):
        print(path)
    print(store.root / "results.db")


def evaluate_run(name: str | None, stage: str | None, store: Store) -> None:
    """`bitladder evaluate`."""
    from ..pipeline.evaluate_stage import evaluate_stage

    run = store.run(name)
    names = [str(s["name"]) for s in run.stages]
    if stage is not None and stage not in names:
        raise ConfigError([f"no stage {stage!r} in {run.run}; there are: {', '.join(names)}"])
    found = False
    for planned in run.stages:
        if stage not in (None, planned["name"]):
            continue
        record = store.find(str(planned["key"]))
        if record is None:
            continue
        found = True
        result = evaluate_stage(store, run, record)
        recorded = record.metrics["test_top1"]
        console.print(
            f"{planned['name']}: test top-1 {100 * result.accuracy.top1:.2f} % "
            f"(recorded {100 * recorded:.2f} %), top-5 {100 * result.accuracy.top5:.2f} %, "
            f"{result.accuracy.images} images"
        )
        if result.layers:
            console.print(_layers(result.layers))
    if not found:
        raise StoreError("no such stage is done yet; see: bitladder list")


def _layers(layers: Sequence[dict[str, Any]]) -> Table:
    table = Table()
    for column in (
        "layer",
        "of",
        "bits",
        "quantizer",
        "scale",
        "clip range",
        "levels",
        "clipped %",
    ):
        table.add_column(column, justify="left" if column in ("layer", "of") else "right")
    for layer in layers:
        for half in ("weight", "activation"):
            if layer[f"{half}_bits"] is None:
                continue
            table.add_row(
                layer["layer"],
                half,
                str(layer[f"{half}_bits"]),
                layer[f"{half}_quantizer"],
                f"{layer[f'{half}_scale']:.4g}",
                f"{layer[f'{half}_low']:.3g} .. {layer[f'{half}_high']:.3g}",
                str(layer[f"{half}_levels"]),
                f"{100 * layer[f'{half}_clipped']:.2f}",
            )
    return table


def verify_store(name: str | None, store: Store) -> None:
    """`bitladder verify`."""
    keys = [str(s["key"]) for s in store.run(name).stages] if name else store.keys()
    bad = files = 0
    for key in keys:
        if not (store.stages / key).is_dir():
            print(f"{key}: not done")
            continue
        problem = store.problem(key)
        if problem is None:
            record = store.read(key)
            files += len(record.files) if record else 0
            continue
        bad += 1
        print(f"{key}: {problem}")
    print(f"{len(keys)} stages, {files} files match their checksums, {bad} stages damaged")
    if bad:
        print("damaged stages are never used; redo them with: bitladder run or bitladder resume")
        sys.exit(1)


def clean_store(store: Store, *, yes: bool) -> None:
    """`bitladder clean`."""
    doomed = _removable(store)
    if not doomed:
        print("nothing to remove")
        return
    for path, why in doomed:
        print(f"{path}  ({why})")
    if not yes:
        if not sys.stdin.isatty():
            print("nothing was removed; to remove these give --yes")
            return
        if input(f"remove these {len(doomed)}? [y/N] ").strip().lower() not in ("y", "yes"):
            return
    freed = sum(store.remove(path) for path, _ in doomed)
    print(f"removed {len(doomed)}, {freed / 1e6:.1f} MB")


def _removable(store: Store) -> list[tuple[Path, str]]:
    if not store.stages.is_dir():
        return []
    used = {str(stage["key"]) for run in store.runs() for stage in run.stages}
    found = []
    for path in sorted(store.stages.iterdir()):
        key, _, rest = path.name.partition(".")
        if key and store.holder(key) is not None:
            continue  # somebody works on it
        if rest.startswith("bad-"):
            found.append((path, "damaged or outdated, set aside"))
        elif not rest and path.is_dir() and key not in used:
            found.append((path, "no ladder refers to it"))
        elif rest == "part" and key not in used:
            found.append((path, "unfinished, no ladder refers to it"))
        elif rest == "part" and (store.stages / key).is_dir():
            found.append((path, f"old {CHECKPOINT} of a finished stage"))
    return found

"""What each command of the command line does."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from ..pipeline.derived import differs_too_much
from ..pipeline.errors import ConfigError
from ..pipeline.ladder_state import ladder_state
from ..pipeline.record import CHECKPOINT
from ..pipeline.resume_command import resume_command
from ..pipeline.run import Run
from ..pipeline.store import Store
from ..pipeline.study_record import StudyRecord, damaged_studies, study_records, study_state
from .tables import bars, coloured, print_rows, print_table, table_of

if TYPE_CHECKING:
    from ..pipeline.spec import Plan

_BAR = "lost"  # the drop as a bar
# what a terminal too narrow does without, of a report and of the list, the first one first
_DISPENSABLE = (
    _BAR,
    *("Gbitops", "epochs", "ideal kB", "ratio", "seconds", "val %", "levels"),
    *("size kB", "packed %", "teacher", "model"),
)
_LESS_OF_RUNS = ("created", "seed", "model", "data")


def run_config(source: str, overrides: Sequence[str], store: Store, runner: str) -> None:
    """`bitladder run`."""
    from ..pipeline.config_load import load_config

    _run(load_config(source, overrides), store, runner)


def resume_run(name: str | None, store: Store, runner: str) -> None:
    """`bitladder resume`."""
    from ..pipeline.auto_plan import plan_so_far
    from ..pipeline.config_load import parse_config

    if name is None:
        runs = store.runs()
        # first the states, which cost nothing; only then every file against its checksum
        unfinished = [run for run in runs if ladder_state(store, run) != "done"] or [
            run for run in runs if not _whole(store, run)
        ]
        if not unfinished:
            every = "every ladder in the store is done" if runs else f"no ladder in {store.root}"
            print(f"nothing to resume: {every}")
            for study in study_records(store):
                if study_state(store, study)[0] != "done":
                    print(f"{study.study} is not finished; go on with: {study.command}")
            return
        run = unfinished[-1]
    else:
        run = store.run(name)
    config = parse_config(run.config)
    plan = plan_so_far(config, store.read)
    print(f"resuming {run.run}", file=sys.stderr)
    if plan.run != run.run:
        print(f"{_changed(run, plan)}; it goes on as {plan.run}", file=sys.stderr)
    _run(config, store, runner)


def _whole(store: Store, run: Run) -> bool:
    """Whether the stages of a finished ladder are undamaged and its reports were written."""
    from ..pipeline.report import reports_current

    damaged = any(store.problem(key) for key in (*run.trained, *run.packed))
    return not damaged and reports_current(store, run)


def _changed(run: Run, plan: Plan) -> str:
    """What makes a stored ladder another one now, though its config is the same."""
    names = {"model": "the model's code", "weights": "model.weights", "data": "the data"}
    both = zip(run.stages, plan.stages, strict=False)
    pairs = [(stored["spec"]["options"], stage.spec.options) for stored, stage in both]
    changed = [
        text
        for key, text in names.items()
        if any(before.get(key) != now[key] for before, now in pairs)
    ]
    return f"{' and '.join(changed) or 'the code of its parts'} changed since it was stored"


def _run(config: Any, store: Store, runner: str) -> None:
    from ..pipeline.report import accuracy_report
    from .launch import launch
    from .progress import terminal_listener

    with terminal_listener(Console(stderr=True)) as listener:
        run = launch(config, store, runner=runner, listener=listener)
    print_frame(accuracy_report(store, run), store)
    print_files(store, run)
    if unlike := _unlike_training(store, run):
        print("\n".join(unlike), file=sys.stderr)
        sys.exit(1)


def _unlike_training(store: Store, run: Run) -> list[str]:
    """The packed networks that classify too many images otherwise than those that were trained."""
    problems = []
    for stage, key in zip(run.stages, run.packed, strict=True):
        record = store.read(key)
        if record is not None and (problem := differs_too_much(record.metrics)):
            problems.append(f"{stage['name']}: {problem}; its weights are kept")
    return problems


def show_plan(source: str, overrides: Sequence[str], store: Store) -> None:
    """`bitladder plan`."""
    from ..pipeline.auto_plan import plan_so_far
    from ..pipeline.config_load import load_config
    from ..pipeline.spec import model_text

    plan = plan_so_far(load_config(source, overrides), store.read)
    print(plan.run)
    models = [model_text(stage.spec.options["model"]) for stage in plan.stages]
    several = ("model",) if len(set(models)) > 1 else ()
    columns = ("stage", "kind", *several, "key", "starts from", "teacher", "epochs", "state")
    table = table_of(columns, right=("epochs",))
    for stage, model in zip(plan.stages, models, strict=True):
        rung = plan.config.ladder[stage.position]
        file = plan.config.model_of(rung).weights if stage.spec.options["weights"] else None
        state, _ = store.state(stage.key)
        table.add_row(
            stage.name,
            stage.spec.kind,
            *([model] if several else []),
            stage.key,
            stage.parent or file or "scratch",
            stage.teacher or "none",
            str(rung.train.epochs),
            coloured(state, "partly done" if state == "interrupted" else None),
        )
    print_table(table)
    for stage, note in zip(plan.stages, plan.notes, strict=False):
        if note:
            print(f"{stage.name}: {note}")
    if not plan.complete:
        print(f"what comes after {plan.stages[-1].name} depends on its result")


def list_runs(store: Store) -> None:
    """`bitladder list`."""
    runs, studies = store.runs(), study_records(store)
    if not runs and not studies:
        print(f"no ladder in {store.root} yet; start one with: bitladder run digits")
        return
    if runs:
        rows = [_run_row(run, store) for run in runs]
        print_rows(rows, right=(), dispensable=_LESS_OF_RUNS)
    if studies:
        print_table(_studies(studies, store))


def _run_row(run: Run, store: Store) -> dict[str, str]:
    states = [state for state, _ in store.rung_states(run)]
    models = dict.fromkeys(s["spec"]["options"]["model"]["name"] for s in run.stages)
    return {
        "run": run.run,
        "state": coloured(ladder_state(store, run, states)),
        "done": f"{states.count('done')} of {len(states)}",
        "data": run.config["data"]["name"],
        "model": ", ".join(models),
        "seed": str(run.config["seed"]),
        "created": run.created[:16].replace("T", " "),
    }


def _studies(studies: Sequence[StudyRecord], store: Store) -> Table:
    table = table_of(("study", "state", "done", "diverged", "arms", "seeds", "created"))
    for study in studies:
        state, counts = study_state(store, study)
        table.add_row(
            study.study,
            coloured(state),
            f"{counts.get('done', 0)} of {len(study.trials)} trials",
            str(counts.get("diverged", 0)),
            str(len({trial["arm"] for trial in study.trials})),
            str(len({trial["seed"] for trial in study.trials})),
            study.created[:16].replace("T", " "),
        )
    return table


def show_report(names: Sequence[str], form: str, out: Path | None, store: Store) -> None:
    """`bitladder report`."""
    from ..pipeline.figures.style import FORMS
    from ..pipeline.look import make_missing_looks
    from ..pipeline.report import render, reports, write_figures, write_report

    runs = [store.run(name) for name in names] if names else [store.run()]
    if form in FORMS and out is None:
        raise ConfigError([f"{form} is a file for each figure; give --out DIR"])
    if form in ("html", *FORMS):
        for run in runs:
            make_missing_looks(store, run)
    frame = reports(store, runs)
    if out is not None:
        try:
            if form in FORMS:
                print("\n".join(map(str, write_figures(store, runs, form, out))))
            else:
                print(write_report(frame, form, out, store, runs))
        except OSError as error:
            raise ConfigError([f"--out {out}: {error.strerror or error}"]) from None
    elif form == "table":
        print_frame(frame, store)
    elif form == "parquet" and sys.stdout.isatty():
        raise ConfigError(["parquet is not for a terminal; give --out FILE"])
    else:
        sys.stdout.buffer.write(render(frame, form, store, runs))


def print_frame(frame: Any, store: Store) -> None:
    """The table for people on standard output, and below it what failed or is not finished."""
    from ..pipeline.report import plain_table

    if sys.stdout.isatty():
        _print_on_terminal(frame)
    else:
        print(plain_table(frame))
    for row in frame[frame["error"].notna()].to_dict("records"):
        print(f"{row['run']}, {row['stage']}: {row['error']}")
    for run in dict.fromkeys(frame["run"]):
        state = ladder_state(store, store.run(run))
        if state == "running":
            print(f"{run} is running")
        elif state != "done":
            print(f"{run} is not finished; go on with: {resume_command(store, run)}")


def _print_on_terminal(frame: Any) -> None:
    from ..pipeline.report import note_lines, people, text_rows

    shown = people(frame)
    if "run" not in shown:
        print(frame["run"].iloc[0])
    drops = [None if drop != drop else float(drop) for drop in frame["drop"]]  # NaN: not known
    if any(drawn := bars(drops)):
        shown.insert(list(shown.columns).index("drop") + 1, _BAR, drawn)
    shown["state"] = [coloured(state) for state in shown["state"]]
    text = ("run", "stage", "state", "model", "quantizer", "teacher", _BAR)
    numbers = [column for column in shown.columns if column not in text]
    print_rows(text_rows(shown), right=numbers, dispensable=_DISPENSABLE)
    for line in note_lines(frame):
        print(line)


def print_files(store: Store, run: Run) -> None:
    """Where everything lies."""
    for key in chain.from_iterable(zip(run.trained, run.packed, run.looks, strict=True)):
        record = store.read(key)
        for name in record.files if record else ():
            print(store.stages / key / name)
    for path in sorted((store.reports / run.run).glob("[!.]*")):
        print(path)
    if (database := store.root / "results.db").exists():
        print(database)


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
    # once more: while the question stood, a ladder may have begun that needs some of it
    again = _removable(store)
    still = [one for one in doomed if one in again]
    freed = sum(store.remove(path) for path, _ in still)
    print(f"removed {len(still)}, {freed / 1e6:.1f} MB")


def _removable(store: Store) -> list[tuple[Path, str]]:
    if not store.stages.is_dir():
        return []
    found = [(path, "half written by a process that was killed") for path in store.leftovers()]
    used = {key for run in store.runs() for key in (*run.trained, *run.packed, *run.looks)}
    used |= {key for study in study_records(store) for key in study.keys}
    # no run lists what was made from its packed networks on request
    asked_for = (*store.of_kind("export"), *store.of_kind("bench"))
    used |= {record.key for record in asked_for if used & set(record.spec.parents.values())}
    if store.damaged_runs() or damaged_studies(store):  # whose stages would seem to be nobody's
        used |= {path.name.partition(".")[0] for path in store.stages.iterdir()}
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
        elif rest == "lock" and key not in used and not _has_work(store, key):
            found.append((path, "lock of a stage that is gone"))
    return found


def _has_work(store: Store, key: str) -> bool:
    return any((store.stages / name).exists() for name in (key, f"{key}.part"))

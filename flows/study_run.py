"""`bitladder study`: every trial of a study, in parallel, and the tables of what they came to."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

from rich.console import Console

from ..pipeline.errors import BitladderError, ConfigError, Interrupted, StoreError
from ..pipeline.interruption import Interruption
from ..pipeline.store import DEFAULT_STORE, Store
from ..pipeline.study_record import FILE, StudyRecord, register_study, study_folder
from .trials.dispatch import Crew, Task, dispatch, settled
from .trials.processes import Processes
from .trials.progress import study_watcher
from .trials.run_trial import Outcome, Request

if TYPE_CHECKING:
    from ..pipeline.study import Study, Trial

log = logging.getLogger(__name__)
RUNNERS = ("processes", "dask", "ray")
SHOWN_FAILURES = 20


@dataclass(frozen=True)
class StudyRun:
    """How a study is to be run.

    Attributes:
        source: a shipped study by name, or a YAML file.
        overrides: KEY=VALUE.
        runner: one of `RUNNERS`.
        workers: trials at a time; None: one for each core of this machine, on a GPU one.
        address: of a Dask or Ray cluster that runs; None: one of our own on this machine.
    """

    source: str
    overrides: tuple[str, ...] = ()
    runner: str = "processes"
    workers: int | None = None
    address: str | None = None

    def command(self, store: Store) -> str:
        """What a user types to go on with it."""
        words = ["bitladder", "study", self.source]
        words += [word for override in self.overrides for word in ("--set", override)]
        words += ["--store", str(store.root)] if store.root != DEFAULT_STORE else []
        words += ["--runner", self.runner] if self.runner != "processes" else []
        words += ["--workers", str(self.workers)] if self.workers else []
        words += ["--address", self.address] if self.address else []
        return shlex.join(words)


def run_study(run: StudyRun, store: Store) -> None:
    """`bitladder study`.

    Raises:
        ConfigError: bad input, all of it at once; nothing is written.
        Interrupted: every worker has saved its state; a note says how to go on.
        BitladderError: a trial failed; the tables of what is there have been printed.
    """
    study = load(run)
    outcomes = execute(study, run, store)
    from ..pipeline.study import study_tables, text, write_study

    found = study_tables(study, store)
    print(text(study, store, found))
    for path in [*write_study(study, store, found), study_folder(store, study.id) / FILE]:
        print(path)
    raise_failures(study, outcomes, run.command(store))


def show_study(run: StudyRun, store: Store) -> None:
    """`bitladder study --report-only`: the tables of what is there; runs nothing.

    The files of a study that was begun are written again: a changed study, or a newer version of
    this package, tells more of the same results.
    """
    study = load(run)
    tasks = _tasks(study, store, threads=1)
    left = [task for task in tasks if not settled(task, store)]
    if not any((store.stages / key).is_dir() for task in tasks for key in task.keys):
        print(f"nothing of {study.id} is in {store.root} yet")
    else:
        from ..pipeline.study import study_tables, text, write_study

        found = study_tables(study, store)
        print(text(study, store, found))
        if (study_folder(store, study.id) / FILE).is_file():
            try:
                for path in write_study(study, store, found):
                    print(path)
            except StoreError as error:  # such as of a store that one may only read
                log.warning("the files of %s stay as they are: %s", study.id, error)
    if left:
        print(f"\n{len(left)} of {len(tasks)} trials are left; go on with: {run.command(store)}")


def execute(study: Study, run: StudyRun, store: Store) -> dict[int, Outcome]:
    """Runs the trials that are not over; gives back their outcomes by number.

    Raises:
        ConfigError: network, weights and data of an arm do not fit together; nothing is written.
        Interrupted: every worker has saved its state.
    """
    whole = cache(lambda key: store.find(key) is not None)  # reads every file: each stage once
    found = [_is_over(trial, store, whole) for trial in study.trials]
    open_trials = [trial for trial, over in zip(study.trials, found, strict=True) if not over]
    _check(open_trials)
    size = _size(run, open_trials)
    tasks = _tasks(study, store, threads=1 if size > 1 else None)
    tasks = [task for task, over in zip(tasks, found, strict=True) if not over]
    register_study(store, _record(study, run.command(store)))
    if not tasks:
        return {}
    log.info("%s: %d trials on %d workers", study.id, len(tasks), size)
    there = {key for task in tasks for key in task.keys if whole(key)}
    console = Console(stderr=True)
    with ExitStack() as stack:
        stop = stack.enter_context(Interruption())
        watcher = stack.enter_context(
            study_watcher(console, tasks, len(study.trials), there.__contains__)
        )

        def work(crew: Crew) -> dict[int, Outcome]:
            return dispatch(tasks, crew, store, watcher, stop)

        try:
            if run.runner == "processes":
                return work(stack.enter_context(Processes(size)))
            from .trials.clusters import run_on_cluster

            folder = study_folder(store, study.id).resolve()
            return run_on_cluster(run.runner, study.id, folder, size, run.address, store, work)
        except (Interrupted, KeyboardInterrupt) as error:
            number = error.signal_number if isinstance(error, Interrupted) else 2
            stopped = Interrupted(number)
            stopped.add_note(f"stopped, and saved; go on with: {run.command(store)}")
            raise stopped from None


def load(run: StudyRun) -> Study:
    """The study, checked.

    Raises:
        ConfigError: one line for each mistake in the YAML and in how it is to be run.
    """
    from ..pipeline.study import load_study

    errors = _mistakes(run)
    try:
        study = load_study(run.source, run.overrides)
    except ConfigError as error:
        raise ConfigError([*errors, *error.errors]) from None
    if errors:
        raise ConfigError(errors)
    return study


def _mistakes(run: StudyRun) -> list[str]:
    if run.runner not in RUNNERS:
        return [f"unknown runner {run.runner!r}; known: {', '.join(RUNNERS)}"]
    if run.runner == "processes":
        return ["--address: is for --runner dask and ray"] if run.address else []
    if any(find_spec(module) is None for module in (f"prefect_{run.runner}", run.runner)):
        return [f"--runner {run.runner}: is not installed; pip install 'bitladder[{run.runner}]'"]
    from .trials.clusters import address_mistakes

    return address_mistakes(run.address)


def _check(trials: Sequence[Trial]) -> None:
    """Tries the first trial of each arm before anything is written."""
    from ..pipeline.runner import check_ladder, load_data

    errors: dict[str, None] = {}
    seen: set[str] = set()
    for trial in trials:
        if trial.arm in seen:
            continue
        seen.add(trial.arm)
        try:
            check_ladder(trial.config)
        except ConfigError as error:
            errors |= dict.fromkeys(f"arms.{trial.arm}: {line}" for line in error.errors)
    load_data.cache_clear()  # the workers have their own
    if errors:
        raise ConfigError(list(errors))


def _size(run: StudyRun, trials: Sequence[Trial]) -> int:
    from ..pipeline.cores import usable_cores
    from ..pipeline.machine import choose_device

    if run.workers is not None:
        return run.workers
    if any(choose_device(trial.config.runtime.device).type != "cpu" for trial in trials[:1]):
        return 1  # one network fills it; give --workers where it does not
    return max(1, min(usable_cores(), len(trials)))


def _tasks(study: Study, store: Store, threads: int | None) -> list[Task]:
    """The trials as workers get them.

    Args:
        threads: for a stage, unless its config says; None: as many as in this process. The
            number decides a result's last bits, so it is the same in all workers.
    """
    if threads is None:
        import torch

        threads = torch.get_num_threads()
    return [
        Task(
            number,
            trial,
            Request(
                name=trial.name,
                config=trial.config.model_dump(mode="json"),
                threads=trial.config.runtime.threads or threads,
                store=str(store.root),
                database=store.url,
            ),
        )
        for number, trial in enumerate(study.trials)
    ]


def _is_over(trial: Trial, store: Store, whole: Callable[[str], bool]) -> bool:
    keys = [stage.key for stage in trial.plan.stages]
    return any(store.diverged(key) for key in keys) or all(whole(key) for key in keys)


def _record(study: Study, command: str) -> StudyRecord:
    trials = tuple(
        {
            "name": trial.name,
            "arm": trial.arm,
            "seed": trial.seed,
            "fold": trial.fold,
            "stages": [{"name": stage.name, "key": stage.key} for stage in trial.plan.stages],
        }
        for trial in study.trials
    )
    return StudyRecord(study.id, command, trials)


def raise_failures(study: Study, outcomes: dict[int, Outcome], command: str) -> None:
    """Raises one error for all trials that failed, if any did; a diverged one has not."""
    failed = {n: outcome for n, outcome in sorted(outcomes.items()) if outcome.state != "done"}
    failed = {n: outcome for n, outcome in failed.items() if outcome.state != "diverged"}
    if not failed:
        return
    lines = [f"{len(failed)} of {len(study.trials)} trials failed:"]
    for number, outcome in list(failed.items())[:SHOWN_FAILURES]:
        cause = (outcome.cause or "its worker was stopped").replace("\n", "\n    ")
        lines.append(f"  {study.trials[number].name}: {cause}")
    if len(failed) > SHOWN_FAILURES:
        lines.append(f"  and {len(failed) - SHOWN_FAILURES} more")
    error = BitladderError("\n".join(lines))
    error.add_note(f"what is done is kept; go on after mending the cause with: {command}")
    raise error

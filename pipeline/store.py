"""The store: a folder per stage, an index over them, and the runs that refer to them.

results.db                 an index; rebuilt from the rest when missing or torn
stages/<key>/              a committed stage: never changes
stages/<key>.part/         work in progress
stages/<key>.bad-<n>/      set aside: damaged, or made from a parent that has since changed
reports/<run>/run.json     a run: its config and its stages' keys
studies/<id>/study.json    a study: its trials and their stages' keys (see `study_record`)
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from .errors import StoreError, store_problem
from .files import (
    TEMPORARY,
    TornFileError,
    delete,
    now,
    read_json,
    sha256_of,
    sync_folder,
    write_json,
)
from .record import CHECKPOINT, MANIFEST, StageRecord, read_record
from .run import Run
from .run_file import last_begun, read_run_file
from .spec import Plan
from .stage_lock import StageLock
from .store_index import Index

log = logging.getLogger(__name__)
T = TypeVar("T")
DEFAULT_STORE = Path("artifacts")
State = Literal["done", "running", "failed", "interrupted", "to do"]
_HOLDER, _ERROR, _RUN = "holder.json", "error.json", "run.json"


class Store:
    """Everything that ladders leave, under one folder."""

    def __init__(self, root: Path | str, *, url: str | None = None) -> None:
        """Opens a store; the folder is made by the first thing that is written.

        Args:
            url: any SQLAlchemy URL for the index; SQLite in the folder by default.
        """
        self.root = Path(root)
        self.stages = self.root / "stages"
        self.reports = self.root / "reports"
        self.url = url
        self._index: Index | None = None

    # -- stages ----------------------------------------------------------------------------

    def find(self, key: str) -> StageRecord | None:
        """A committed stage whose files all match their checksums and whose parents stand."""
        whole = (self.stages / key).is_dir() and self.problem(key) is None
        return read_record(self.stages / key) if whole else None

    def claim(self, key: str) -> StageRecord | None:
        """The same for the holder of the stage's lock, who mends what a crash has left.

        A folder that fails the test is set aside and said so: it is never used silently.
        """
        self._finish_commit(key)
        if record := self.find(key):
            self._enter_stage(record)  # a crash may have come between the rename and the index
            return record
        folder = self.stages / key
        if folder.is_dir():
            problem = self.problem(key)
            log.warning("stage %s is not used and will be redone: %s", key, problem)
            self._set_aside(folder)
        return None

    def problem(self, key: str) -> str | None:
        """What is wrong with a committed stage; None if nothing is."""
        folder = self.stages / key
        try:
            record = read_record(folder)
        except TornFileError as error:
            return str(error)
        for name, facts in record.files.items():
            path = folder / name
            if not path.is_file():
                return f"{path} is missing"
            if sha256_of(path) != facts["sha256"]:
                return f"{path} does not match its checksum"
        for role, parent in record.parents.items():
            try:
                now = read_record(self.stages / parent["key"]).sha256
            except TornFileError:
                continue  # cleaned away or being redone; its own stage says so
            if now != parent["sha256"]:
                return f"its {role}, stage {parent['key']}, has other weights now"
        return None

    def read(self, key: str) -> StageRecord | None:
        """A committed stage's record without checking its files; None if there is none."""
        try:
            return read_record(self.stages / key)
        except (TornFileError, NotADirectoryError):
            return None

    def of_kind(self, kind: str) -> list[StageRecord]:
        """All committed stages of a kind, the oldest first."""
        keys = self._ask(lambda index: index.keys_of_kind(kind))
        return [record for key in keys if (record := self.read(key)) is not None]

    def keys(self) -> list[str]:
        """Keys of all committed stages."""
        found = self.stages.iterdir() if self.stages.is_dir() else ()
        return sorted(path.name for path in found if path.is_dir() and "." not in path.name)

    def workdir(self, key: str) -> Path:
        """The folder where a stage's work happens; it may hold a checkpoint from before."""
        folder = self.stages / f"{key}.part"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _ERROR).unlink(missing_ok=True)
        for torn in folder.glob(TEMPORARY):
            torn.unlink()  # who wrote it was killed: the stage is ours
        return folder

    def commit(self, record: StageRecord) -> StageRecord:
        """Makes a stage's work final: the manifest last, everything synced, then the rename."""
        part = self.stages / f"{record.key}.part"
        log.debug("phase commit")
        write_json(part / MANIFEST, record.as_dict())
        self._finish_commit(record.key)
        self._enter_stage(record)
        return record

    def _enter_stage(self, record: StageRecord) -> None:
        try:
            self._ask(lambda index: index.add_stage(record))
        except StoreError as error:  # the folder is what counts; the index is made from it again
            log.warning("%s", error)

    def _finish_commit(self, key: str) -> None:
        """Renames finished work; also after a crash between the manifest and the rename."""
        part, folder = self.stages / f"{key}.part", self.stages / key
        if not (part / MANIFEST).is_file():
            return
        try:
            record = read_record(part)
            whole = all(sha256_of(part / n) == f["sha256"] for n, f in record.files.items())
        except (TornFileError, FileNotFoundError):
            whole = False
        if not whole:
            (part / MANIFEST).unlink()
            return
        for extra in part.iterdir():
            if extra.name != MANIFEST and extra.name not in record.files:
                extra.unlink()
        sync_folder(part)
        part.rename(folder)
        sync_folder(self.stages)

    def _set_aside(self, folder: Path) -> None:
        taken = {p.name for p in self.stages.iterdir()}
        number = next(n for n in range(1, 10**6) if f"{folder.name}.bad-{n}" not in taken)
        folder.rename(folder.with_name(f"{folder.name}.bad-{number}"))
        sync_folder(self.stages)
        self._ask(lambda index: index.remove_stages([folder.name]))

    def fail(self, key: str, error: str, *, diverged: bool = False) -> None:
        """Notes why a stage stopped, beside its work, and whether its loss was not finite."""
        try:
            note = {"error": error, "time": now(), "diverged": diverged}
            write_json(self.workdir(key) / _ERROR, note)
        except OSError as problem:  # no space or a read-only store: the error itself is said anyway
            log.warning("could not note the failure in the store: %s", problem)

    def diverged(self, key: str) -> str | None:
        """In what a stage that is not done diverged, if that is why it stopped."""
        if (self.stages / key / MANIFEST).is_file():
            return None
        try:
            note = read_json(self.stages / f"{key}.part" / _ERROR)
        except (OSError, TornFileError):
            return None
        return str(note["error"]) if note.get("diverged") else None

    # -- locks -----------------------------------------------------------------------------

    @contextmanager
    def lock(
        self, key: str, *, waiting: Callable[[str], None], stop: Callable[[], int | None]
    ) -> Iterator[None]:
        """Holds a stage: one process trains it, the others wait; see `StageLock.hold`.

        Raises:
            Interrupted: `stop` gave a signal's number.
            StoreError: the store cannot be written.
        """
        self._make()
        lock = self._lock(key)
        try:
            held = lock.hold(waiting=waiting, stop=stop)
        except OSError as error:
            raise StoreError(store_problem(self.root, error), exit_code=1) from None
        try:
            if not (self.stages / key).is_dir():
                (self.stages / f"{key}.part").mkdir(exist_ok=True)
                lock.sign()
            yield
        finally:
            lock.release(held)

    def holder(self, key: str) -> str | None:
        """The process that has a stage, in words; None if nobody has it."""
        return self._lock(key).holder()

    def _lock(self, key: str) -> StageLock:
        return StageLock(self.stages / f"{key}.lock", self.stages / f"{key}.part" / _HOLDER)

    # -- runs ------------------------------------------------------------------------------

    def register(self, plan: Plan) -> Run:
        """Writes a run down before anything of it is trained; later, with the stages found since.

        An automatic ladder whose records are not all whole is planned anew as far as they are: it
        keeps what it had beyond, until it is known that something else comes there.
        """
        known = self._read_run(plan.run)
        run = Run.of(plan, created=known.created if known else now())
        if known and not plan.complete and known.begins_with(run):
            run = replace(run, stages=known.stages)
        self._make()
        folder = self.reports / run.run
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / _RUN, {**run.as_dict(), "touched": now()})
        self._ask(lambda index: self._enter(run, index))
        return run

    def runs(self) -> list[Run]:
        """All runs, the newest last."""
        found = [self._raw_run(name) for name in self._run_names()]
        for path in self.damaged_runs() if None in found else ():
            log.warning("%s is damaged; running its config again writes it anew", path)
        return [Run.from_dict(raw) for raw in sorted(filter(None, found), key=last_begun)]

    def damaged_runs(self) -> list[Path]:
        """Files of runs that nothing can restore: which stages they refer to is not known."""
        names = [name for name in self._run_names() if self._raw_run(name) is None]
        return [self.reports / name / _RUN for name in names]

    def run(self, name: str | None = None) -> Run:
        """A run by id, prefix of an id, or name (its newest run); the newest of all by default.

        Raises:
            StoreError: there is none, or a prefix fits several.
        """
        # by its whole id it is found without reading all the others
        if name and (self.reports / name / _RUN).is_file() and (run := self._read_run(name)):
            return run
        runs = self.runs()
        if not runs:
            raise StoreError(f"no ladder in {self.root} yet; start one with: bitladder run digits")
        if name is None:
            return runs[-1]
        if exact := [r for r in runs if r.run == name] or [r for r in runs if r.name == name][-1:]:
            return exact[0]
        begins = [r for r in runs if r.run.startswith(name)]
        if len(begins) == 1:
            return begins[0]
        listed = ", ".join(r.run for r in (begins or runs))
        problem = "fits several runs" if begins else "is no run here"
        raise StoreError(f"{name!r} {problem}: {listed}")

    def state(self, key: str) -> tuple[State, str | None]:
        """Where a stage stands, and why it failed if it did. From the files, not the index."""
        if (self.stages / key / MANIFEST).is_file():
            return "done", None
        part = self.stages / f"{key}.part"
        if self.holder(key):
            return "running", None
        if (part / _ERROR).is_file():
            try:
                return "failed", str(read_json(part / _ERROR).get("error"))
            except TornFileError:
                return "failed", "the note of the failure is damaged"
        if (part / CHECKPOINT).is_file():
            return "interrupted", None
        return "to do", None

    def rung_states(self, run: Run) -> list[tuple[State, str | None]]:
        """Where each rung of a run stands, and why it failed if it did: trained, then packed."""
        return [self._rung(*keys) for keys in zip(run.trained, run.packed, strict=True)]

    def _rung(self, trained: str, packed: str) -> tuple[State, str | None]:
        if (found := self.state(trained))[0] != "done":
            return found
        found = self.state(packed)
        return ("interrupted", None) if found[0] == "to do" else found

    def _run_names(self) -> list[str]:
        if not self.reports.is_dir():
            return []
        named = {p.parent.name for p in self.reports.glob(f"*/{_RUN}")}
        return sorted(named | set(self._ask(Index.run_names)))

    def _read_run(self, name: str) -> Run | None:
        raw = self._raw_run(name)
        return None if raw is None else Run.from_dict(raw)

    def _raw_run(self, name: str) -> dict[str, Any] | None:
        """From its file; from the index if the file is torn, which is then written again."""
        path = self.reports / name / _RUN
        try:
            return read_run_file(path)
        except (OSError, TornFileError):
            pass
        raw = self._ask(lambda index: index.run(name) if index.exists() else None)
        if raw is None:
            return None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, raw)
        except OSError:
            pass  # a read-only store
        return raw

    # -- index -----------------------------------------------------------------------------

    @property
    def index(self) -> Index:
        """The SQL index, opened at first use and brought up to what the folders hold."""
        if self._index is None:
            return self._brought_up(Index(self.root, self.url))
        return self._index

    def _ask(self, act: Callable[[Index], T]) -> T:
        """Does something with the index; where there is no space for it, with one in memory."""
        try:
            return act(self.index)
        except OSError:
            return act(self._brought_up(Index(self.root, memory=True)))

    def _brought_up(self, index: Index) -> Index:
        self._index = index
        index.synchronise(self.keys(), self.read)
        written = {path.parent.name for path in self.reports.glob(f"*/{_RUN}")}
        for name in sorted(written - set(index.run_names())):
            if run := self._read_run(name):
                self._enter(run, index)
        return index

    def _enter(self, run: Run, index: Index) -> None:
        index.add_run(run.as_dict())
        index.set_states(run.run, self.rung_states(run))

    def results(self, run: Run) -> list[dict[str, Any]]:
        """A run's rows in ladder order, its unfinished and failed stages included."""
        self._ask(lambda index: index.set_states(run.run, self.rung_states(run)))
        return self._ask(lambda index: index.results(run.run))

    def _make(self) -> None:
        try:
            self.stages.mkdir(parents=True, exist_ok=True)
            self.reports.mkdir(parents=True, exist_ok=True)
            probe = self.stages / f".probe-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise StoreError(store_problem(self.root, error)) from None

    def leftovers(self) -> list[Path]:
        """Files that a killed process was writing, over an hour ago, outside any stage."""
        found = [*self.stages.glob(".probe-*"), *self.reports.glob(f"*/{TEMPORARY}")]
        return sorted(path for path in found if time.time() - path.stat().st_mtime > 3600)

    def remove(self, path: Path) -> int:
        """Deletes a folder or file of the store; gives back the bytes that this has freed.

        What belongs to a stage that a process holds stays.
        """
        key = path.name.partition(".")[0]
        if path.parent != self.stages or not key:
            return delete(path)
        lock = self._lock(key)
        held = lock.try_to_hold()
        if held is None:
            return 0
        try:
            freed = delete(path)
            if not any((self.stages / name).exists() for name in (key, f"{key}.part")):
                lock.path.unlink(missing_ok=True)
            return freed
        finally:
            lock.release(held)

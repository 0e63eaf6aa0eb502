"""The store: a folder per stage, an index over them, and the runs that refer to them.

results.db                 an index; rebuilt from the rest when missing or torn
stages/<key>/              a committed stage: never changes
stages/<key>.part/         work in progress
stages/<key>.bad-<n>/      set aside: damaged, or made from a parent that has since changed
reports/<run>/run.json     a run: its config and its stages' keys
"""

from __future__ import annotations

import errno
import json
import logging
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from .errors import Interrupted, StoreError
from .files import TornFileError, read_json, sha256_of, sync_folder, write_json
from .record import CHECKPOINT, MANIFEST, METRICS, StageRecord, read_record
from .spec import Plan
from .store_index import Index

log = logging.getLogger(__name__)
State = Literal["done", "running", "failed", "interrupted", "to do"]
_HOLDER, _ERROR, _RUN = "holder.json", "error.json", "run.json"


@dataclass(frozen=True)
class Run:
    """A registered ladder: what `run.json` holds."""

    run: str
    name: str
    created: str
    config: Mapping[str, Any]
    stages: tuple[Mapping[str, Any], ...]  # name, key, spec, teacher, parent


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
        self._url = url
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

    def keys(self) -> list[str]:
        """Keys of all committed stages."""
        if not self.stages.is_dir():
            return []
        return sorted(p.name for p in self.stages.iterdir() if p.is_dir() and "." not in p.name)

    def workdir(self, key: str) -> Path:
        """The folder where a stage's work happens; it may hold a checkpoint from before."""
        folder = self.stages / f"{key}.part"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _ERROR).unlink(missing_ok=True)
        return folder

    def commit(self, record: StageRecord) -> StageRecord:
        """Makes a stage's work final: the manifest last, everything synced, then the rename."""
        part = self.stages / f"{record.key}.part"
        log.debug("phase commit %s", record.key)
        write_json(part / MANIFEST, record.as_dict())
        self._finish_commit(record.key)
        self.index.add_stage(record)
        return record

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

    def fail(self, key: str, error: str) -> None:
        """Notes why a stage stopped, beside its work."""
        try:
            write_json(self.workdir(key) / _ERROR, {"error": error, "time": now()})
        except OSError as problem:  # no space or a read-only store: the error itself is said anyway
            log.warning("could not note the failure in the store: %s", problem)

    # -- locks -----------------------------------------------------------------------------

    @contextmanager
    def lock(
        self, key: str, *, waiting: Callable[[str], None], stop: Callable[[], int | None]
    ) -> Iterator[None]:
        """Holds a stage: one process trains it, the others wait. Dies with its holder (flock).

        Args:
            waiting: called once, with the holder in words, when another process has the stage.
            stop: looked at while waiting.

        Raises:
            Interrupted: `stop` gave a signal's number.
        """
        self._make()
        lock = FileLock(self.stages / f"{key}.lock")
        told = False
        while not lock.is_locked:
            try:
                lock.acquire(timeout=0.3 if told else 0)
            except Timeout:
                if not told:
                    waiting(self.holder(key) or "another process")
                    told = True
                if (number := stop()) is not None:
                    raise Interrupted(number) from None
        try:
            if not (self.stages / key).is_dir():
                holder = {"pid": os.getpid(), "host": platform.node(), "since": now()}
                write_json(self.workdir(key) / _HOLDER, holder)
            yield
        finally:
            (self.stages / f"{key}.part" / _HOLDER).unlink(missing_ok=True)
            lock.release()

    def holder(self, key: str) -> str | None:
        """The process that has a stage, in words; None if nobody has it."""
        path = self.stages / f"{key}.lock"
        if not path.exists():
            return None
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except (Timeout, OSError):
            pass
        else:
            lock.release()
            return None
        try:
            facts = read_json(self.stages / f"{key}.part" / _HOLDER)
            return f"process {facts['pid']} on {facts['host']}"
        except (OSError, TornFileError, KeyError):
            return "another process"

    # -- runs ------------------------------------------------------------------------------

    def register(self, plan: Plan) -> Run:
        """Writes a run down before anything of it is trained."""
        stages = tuple(
            {
                "name": s.name,
                "key": s.key,
                "spec": s.spec.as_dict(),
                "teacher": s.teacher,
                "parent": s.parent,
            }
            for s in plan.stages
        )
        known = self._read_run(plan.run)
        created = known.created if known else now()
        run = Run(plan.run, plan.name, created, plan.config.model_dump(mode="json"), stages)
        self._make()
        folder = self.reports / run.run
        folder.mkdir(parents=True, exist_ok=True)
        fresh = {**run.__dict__, "stages": list(stages), "touched": now()}
        write_json(folder / _RUN, fresh)
        self.index.add_run(run.__dict__)
        return run

    def runs(self) -> list[Run]:
        """All runs, the newest last."""
        found = [self._read_run(name) for name in self._run_names()]
        return sorted((r for r in found if r), key=lambda r: (self._touched(r.run), r.run))

    def run(self, name: str | None = None) -> Run:
        """A run by id, prefix of an id, or name (its newest run); the newest of all by default.

        Raises:
            StoreError: there is none, or a prefix fits several.
        """
        runs = self.runs()
        if not runs:
            raise StoreError(f"no ladder in {self.root} yet; start one with: bitladder run digits")
        if name is None:
            return runs[-1]
        exact = [r for r in runs if r.run == name] or [r for r in runs if r.name == name][-1:]
        if exact:
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

    def progress(self, key: str) -> dict[str, Any]:
        """The last epoch's line of a stage in progress; empty if there is none."""
        path = self.stages / f"{key}.part" / METRICS
        try:
            return dict(json.loads(path.read_text().strip().rpartition("\n")[2]))
        except (OSError, ValueError):
            return {}

    def _run_names(self) -> list[str]:
        if not self.reports.is_dir():
            return []
        named = {p.parent.name for p in self.reports.glob(f"*/{_RUN}")}
        return sorted(named | set(self.index.run_names()))

    def _read_run(self, name: str) -> Run | None:
        """From its file; from the index if the file is torn, which is then written again."""
        path = self.reports / name / _RUN
        try:
            raw = read_json(path)
            return Run(**{k: raw[k] for k in Run.__dataclass_fields__} | {"stages": _tuple(raw)})
        except (OSError, TornFileError, KeyError, TypeError):
            pass
        raw_run = self.index.run(name) if self.index.exists() else None
        if raw_run is None:
            return None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, raw_run)
        except OSError:
            pass  # a read-only store
        return Run(**raw_run | {"stages": _tuple(raw_run)})

    def _touched(self, name: str) -> str:
        try:
            return str(read_json(self.reports / name / _RUN).get("touched", ""))
        except (OSError, TornFileError):
            return ""

    # -- index -----------------------------------------------------------------------------

    @property
    def index(self) -> Index:
        """The SQL index, opened at first use and brought up to what the folders hold."""
        if self._index is None:
            self._index = Index(self.root, self._url)
            self._index.synchronise(self.keys(), self.read)
            for path in self.reports.glob(f"*/{_RUN}") if self._index.exists() else ():
                if path.parent.name not in self._index.run_names():
                    run = self._read_run(path.parent.name)
                    if run is not None:
                        self._index.add_run(run.__dict__)
        return self._index

    def results(self, run: Run) -> list[dict[str, Any]]:
        """A run's rows in ladder order, its unfinished and failed stages included."""
        states = [self.state(str(stage["key"])) for stage in run.stages]
        self.index.set_states(run.run, states)
        return self.index.results(run.run)

    def _make(self) -> None:
        try:
            self.stages.mkdir(parents=True, exist_ok=True)
            self.reports.mkdir(parents=True, exist_ok=True)
            probe = self.stages / f".probe-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise StoreError(store_problem(self.root, error)) from None

    def remove(self, path: Path) -> int:
        """Deletes a folder or file of the store; gives back its size in bytes."""
        if path.is_file():
            size = path.stat().st_size
            path.unlink()
            return size
        size = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
        shutil.rmtree(path)
        return size


def store_problem(root: Path, error: OSError) -> str:
    """What a failed write means for a user, and the way out."""
    if error.errno == errno.ENOSPC:
        return (
            f"no space left for the store {root}; free some (see: bitladder clean) and go on with: "
            "bitladder resume"
        )
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"the store {root} cannot be written ({error.strerror}); give another with --store"
    return f"the store {root} cannot be used: {error.strerror or error}"


def now() -> str:
    """The time in UTC, to the microsecond, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def _tuple(raw: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    return tuple(dict(stage) for stage in raw["stages"])

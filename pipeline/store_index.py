"""The SQL index over a store: `runs`, `run_stages`, `stages`, `artifacts`, and the view `results`.

It holds nothing that the folders do not hold, so a torn one is thrown away and built again.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock
from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Connection,
    Engine,
    Float,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    delete,
    event,
    insert,
    inspect,
    select,
    text,
)
from sqlalchemy.exc import ArgumentError, DatabaseError
from sqlalchemy.pool import NullPool

from .derived import pack_spec
from .errors import StoreError
from .record import StageRecord
from .spec import model_text

log = logging.getLogger(__name__)
SCHEMA_VERSION = 3
_metadata = MetaData()

# Columns of a stage, in the order of every report. What a stage does not have is null.
STAGE_COLUMNS: dict[str, type] = {
    "weight_bits": int,
    "activation_bits": int,
    "weight_quantizer": str,
    "activation_quantizer": str,
    "epochs": int,
    "seed": int,
    "train_loss": float,
    "val_top1": float,
    "test_top1": float,
    "test_top5": float,
    "deployed_top1": float,
    "flips": int,
    "max_levels": int,
    "weight_levels": int,
    "activation_levels": int,
    "ideal_bytes": int,
    "packed_bytes": int,
    "compression": float,
    "bitops": float,
    "seconds": float,
    "images_per_second": float,
    "device": str,
    "model": str,
    "teacher_chosen": str,  # the key of the stage that `teacher: best` came to
}
PACKED_COLUMNS = ("deployed_top1", "flips", "packed_bytes", "compression")  # of another stage
_TYPES: dict[type, Any] = {int: BigInteger, float: Float, str: String}

_meta = Table("meta", _metadata, Column("schema_version", Integer, primary_key=True))
_runs = Table(
    "runs",
    _metadata,
    Column("run", String, primary_key=True),
    Column("name", String, nullable=False),
    Column("created", String, nullable=False),
    Column("config", JSON, nullable=False),
)
_run_stages = Table(
    "run_stages",
    _metadata,
    Column("run", ForeignKey("runs.run"), primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("name", String, nullable=False),
    Column("key", String, nullable=False),
    Column("packed", String, nullable=False),  # the key of the stage that packs it
    Column("teacher", String),
    Column("parent", String),
    Column("spec", JSON, nullable=False),
    Column("state", String, nullable=False),
    Column("error", Text),
)
_stages = Table(
    "stages",
    _metadata,
    Column("key", String, primary_key=True),
    Column("kind", String, nullable=False),
    *(Column(name, _TYPES[kind]) for name, kind in STAGE_COLUMNS.items()),
    Column("sha256", String, nullable=False),
    Column("created", String, nullable=False),
    Column("record", JSON, nullable=False),
)
_artifacts = Table(
    "artifacts",
    _metadata,
    Column("stage", ForeignKey("stages.key"), primary_key=True),
    Column("path", String, primary_key=True),
    Column("kind", String, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("sha256", String, nullable=False),
)
_SHOWN = ", ".join(f"{'p' if c in PACKED_COLUMNS else 's'}.{c}" for c in STAGE_COLUMNS)
_RESULTS = f"""CREATE VIEW results AS
SELECT r.run, r.name AS stage, r.position, r.state, {_SHOWN},
       r.teacher, r.parent, r.key, s.sha256, s.created, r.error
FROM run_stages r
LEFT JOIN stages s ON s.key = r.key
LEFT JOIN stages p ON p.key = r.packed"""


class Index:
    """The tables, opened or built anew."""

    def __init__(self, root: Path, url: str | None = None, *, memory: bool = False) -> None:
        self._file = None if url else root / "results.db"
        self._url = url or f"sqlite:///{self._file}"
        self._engine: Engine | None = self._open(memory=True) if memory else None

    def exists(self) -> bool:
        """Whether there is something to read."""
        return self._engine is not None or self._file is None or self._file.exists()

    @property
    def engine(self) -> Engine:
        """A checked connection pool; a torn SQLite file is replaced."""
        if self._engine is None:
            with self._alone():
                self._engine = self._open_or_rebuild()
        return self._engine

    def _open_or_rebuild(self) -> Engine:
        try:
            return self._open()
        except DatabaseError as error:
            if self._no_space(error):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None
            if self._file is not None and _says(error, _READ_ONLY):
                return self._open(memory=True)
            if self._file is None or not _says(error, _DAMAGED):
                reason = str(error.orig or error)
                raise StoreError(f"the results database does not answer: {reason}") from None
            log.warning("results.db is damaged and is built again from the stage folders")
            for path in self._file.parent.glob(self._file.name + "*"):
                path.unlink()
            return self._open()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One process at a time makes or mends the tables."""
        if self._file is None:
            yield
            return
        lock = FileLock(self._file.with_suffix(".lock"))
        try:
            lock.acquire()
        except OSError:  # a read-only store: nothing will be made or mended
            yield
            return
        try:
            yield
        finally:
            lock.release()

    def _open(self, *, memory: bool = False) -> Engine:
        if memory:
            from sqlalchemy.pool import StaticPool

            engine = create_engine("sqlite://", poolclass=StaticPool)
        elif self._file is None:
            engine = _connect(self._url)
        else:
            engine = create_engine(self._url, poolclass=NullPool, connect_args={"timeout": 60})
            event.listen(engine, "connect", _use_wal)
        with engine.begin() as connection:
            if engine.dialect.name == "sqlite":
                verdict = connection.execute(text("PRAGMA quick_check")).scalar()
                if verdict != "ok":
                    raise DatabaseError("quick_check", {}, Exception(verdict))
            tables = inspect(connection)
            if tables.has_table("meta"):
                found = connection.execute(select(_meta.c.schema_version)).scalar()
                if found is not None and found > SCHEMA_VERSION:
                    raise StoreError(
                        f"{self._url} was written by a newer Bitladder (schema {found}, this one "
                        f"has {SCHEMA_VERSION}): upgrade Bitladder, or give another --store"
                    )
                if found == SCHEMA_VERSION and "results" in tables.get_view_names():
                    return engine
            taken = [t.name for t in _metadata.sorted_tables if tables.has_table(t.name)]
            if taken and not tables.has_table("meta"):
                raise StoreError(
                    f"{self._url} has tables of somebody else ({', '.join(taken)}): give a "
                    "database of its own with --database"
                )
            # no schema, or an older one: an index has nothing to migrate that it cannot rebuild
            connection.execute(text("DROP VIEW IF EXISTS results"))
            _metadata.drop_all(connection)
            _metadata.create_all(connection)
            connection.execute(text(_RESULTS))
            connection.execute(insert(_meta).values(schema_version=SCHEMA_VERSION))
        return engine

    @contextmanager
    def _begin(self) -> Iterator[Connection]:
        """A transaction; no space for it is an `OSError`, as it is for a file."""
        try:
            with self.engine.begin() as connection:
                yield connection
        except DatabaseError as error:
            if self._no_space(error):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None
            raise StoreError(f"the results database does not answer: {error.orig}") from None

    def _no_space(self, error: DatabaseError) -> bool:
        # on a full disk SQLite calls some of its failures "disk I/O error", as on a torn file
        if self._file is None or not _says(error, ("disk is full", "disk i/o")):
            return False
        return shutil.disk_usage(self._file.parent).free < 2**20

    def synchronise(self, keys: Iterable[str], read: Callable[[str], StageRecord | None]) -> None:
        """Adds stages that the folders have and the index lacks, and drops those that are gone."""
        if not self.exists() and not list(keys):
            return
        with self._begin() as connection:
            known = set(connection.execute(select(_stages.c.key)).scalars())
        there = set(keys)
        for key in there - known:
            if record := read(key):
                self.add_stage(record)
        if gone := known - there:
            self.remove_stages(gone)

    def add_stage(self, record: StageRecord) -> None:
        """Writes a stage and its files, done in every run; a second time changes nothing."""
        known = {"model": model_text(record.network), **record.metrics}
        row = {name: known.get(name) for name in STAGE_COLUMNS}
        with self._begin() as connection:
            connection.execute(delete(_artifacts).where(_artifacts.c.stage == record.key))
            connection.execute(delete(_stages).where(_stages.c.key == record.key))
            connection.execute(
                insert(_stages).values(
                    key=record.key,
                    kind=record.spec.kind,
                    sha256=record.sha256,
                    created=record.created,
                    record=record.as_dict(),
                    **row,
                )
            )
            done = _run_stages.update().where(_run_stages.c.key == record.key)
            connection.execute(done.values(state="done", error=None))
            for name, facts in record.files.items():
                connection.execute(
                    insert(_artifacts).values(
                        stage=record.key,
                        path=f"stages/{record.key}/{name}",
                        kind=name.partition(".")[0],
                        bytes=facts["bytes"],
                        sha256=facts["sha256"],
                    )
                )

    def remove_stages(self, keys: Collection[str]) -> None:
        """Takes stages and their files out; they are to do in every run."""
        with self._begin() as connection:
            undone = _run_stages.update().where(_run_stages.c.key.in_(keys))
            connection.execute(undone.values(state="to do", error=None))
            connection.execute(delete(_artifacts).where(_artifacts.c.stage.in_(keys)))
            connection.execute(delete(_stages).where(_stages.c.key.in_(keys)))

    def add_run(self, run: Mapping[str, Any]) -> None:
        """Writes a run and its stages' places; states follow with `set_states`."""
        with self._begin() as connection:
            connection.execute(delete(_run_stages).where(_run_stages.c.run == run["run"]))
            connection.execute(delete(_runs).where(_runs.c.run == run["run"]))
            plain = {k: run[k] for k in ("run", "name", "created", "config")}
            connection.execute(insert(_runs).values(**plain))
            for position, stage in enumerate(run["stages"]):
                connection.execute(
                    insert(_run_stages).values(
                        run=run["run"],
                        position=position,
                        state="to do",
                        packed=pack_spec(stage["key"]).key,
                        **stage,
                    )
                )

    def set_states(self, run: str, states: Iterable[tuple[str, str | None]]) -> None:
        """Writes where a run's stages stand, in ladder order."""
        with self._begin() as connection:
            for position, (state, error) in enumerate(states):
                connection.execute(
                    _run_stages.update()
                    .where(_run_stages.c.run == run, _run_stages.c.position == position)
                    .values(state=state, error=error)
                )

    def run_names(self) -> list[str]:
        """Ids of all runs in the index."""
        if not self.exists():
            return []
        with self._begin() as connection:
            return list(connection.execute(select(_runs.c.run)).scalars())

    def run(self, name: str) -> dict[str, Any] | None:
        """A run as `run.json` would hold it."""
        with self._begin() as connection:
            row = connection.execute(select(_runs).where(_runs.c.run == name)).mappings().first()
            if row is None:
                return None
            columns = ("name", "key", "spec", "teacher", "parent")
            stages = connection.execute(
                select(*(_run_stages.c[c] for c in columns))
                .where(_run_stages.c.run == name)
                .order_by(_run_stages.c.position)
            ).mappings()
            return {**row, "stages": [dict(s) for s in stages]}

    def keys_of_kind(self, kind: str) -> list[str]:
        """The keys of all stages of a kind, the oldest first."""
        query = select(_stages.c.key).where(_stages.c.kind == kind).order_by(_stages.c.created)
        with self._begin() as connection:
            return list(connection.execute(query).scalars())

    def results(self, run: str) -> list[dict[str, Any]]:
        """The rows of the view `results` for one run, in ladder order."""
        query = text("SELECT * FROM results WHERE run = :run ORDER BY position")
        with self._begin() as connection:
            return [dict(r) for r in connection.execute(query, {"run": run}).mappings()]


def _connect(url: str) -> Engine:
    try:
        return create_engine(url)
    except (ArgumentError, ModuleNotFoundError) as error:
        reason = f"{error}; for PostgreSQL: pip install 'bitladder[postgres]'"
        raise StoreError(f"--database {url!r} cannot be used: {reason}") from None


def _use_wal(connection: Any, _: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=NORMAL")  # an index: the folders are what must survive
    cursor.close()


_READ_ONLY = ("readonly", "read-only", "unable to open")
_DAMAGED = ("malformed", "not a database", "quick_check", "disk i/o", "corrupt")


def _says(error: DatabaseError, words: tuple[str, ...]) -> bool:
    return any(word in str(error).lower() for word in words)


__all__ = ["STAGE_COLUMNS", "Index"]

import errno
import json
import os
import shutil
import sqlite3
from contextlib import closing

import pytest
from bitladder.pipeline.errors import Interrupted, StageError, StoreError
from bitladder.pipeline.plan import make_plan
from bitladder.pipeline.record import MANIFEST, MODEL
from bitladder.pipeline.report import accuracy_report
from bitladder.pipeline.runner import open_ladder
from bitladder.pipeline.store import Store, store_problem
from sqlalchemy import Engine, create_engine, event, text

RUNGS = [
    {"weight_bits": 32, "activation_bits": 32, "epochs": 1},
    {"weight_bits": 2, "activation_bits": 2, "epochs": 1},
]


@pytest.fixture
def config(tiny):
    return tiny(ladder=RUNGS)


def hold(store, key):
    return store.lock(key, waiting=pytest.fail, stop=lambda: None)


def test_a_run_is_found_by_its_id_a_prefix_or_its_name(tiny, store):
    first = store.register(make_plan(tiny(ladder=RUNGS)))
    second = store.register(make_plan(tiny(ladder=RUNGS, seed=1)))
    other = store.register(make_plan(tiny(ladder=RUNGS, name="other")))
    assert store.run().run == other.run
    assert store.run(first.run).run == first.run
    assert store.run(first.run[:-1]).run == first.run
    assert store.run("tiny").run == second.run
    assert store.run("oth").run == other.run
    assert [run.run for run in store.runs()] == [first.run, second.run, other.run]


def test_a_run_registered_again_is_the_newest_and_keeps_its_date(tiny, store):
    plan = make_plan(tiny(ladder=RUNGS))
    first = store.register(plan)
    store.register(make_plan(tiny(ladder=RUNGS, seed=1)))
    store.register(plan)
    assert store.run() == first


def test_a_prefix_that_fits_several_runs_lists_them(tiny, store):
    runs = [store.register(make_plan(tiny(ladder=RUNGS, seed=seed))).run for seed in (0, 1)]
    with pytest.raises(StoreError) as caught:
        store.run("tin")
    assert "'tin' fits several runs" in str(caught.value)
    assert all(run in str(caught.value) for run in runs)
    with pytest.raises(StoreError, match="'nobody' is no run here"):
        store.run("nobody")


def test_an_empty_store_says_how_to_begin_and_makes_nothing(store):
    with pytest.raises(StoreError, match="bitladder run digits"):
        store.run()
    assert store.runs() == []
    assert store.keys() == []
    assert not store.root.exists()


def test_a_held_stage_names_its_holder_and_waits_for_it(store):
    key, waited = "0" * 20, []
    assert store.holder(key) is None
    with hold(store, key):
        assert store.holder(key).startswith(f"process {os.getpid()} on ")
        assert store.state(key) == ("running", None)
        with (
            pytest.raises(Interrupted),
            Store(store.root).lock(key, waiting=waited.append, stop=lambda: 2),
        ):
            pass
    assert waited == [f"process {os.getpid()} on {os.uname().nodename}"]
    assert store.holder(key) is None


def test_what_a_process_holds_is_not_removed(store):
    key = "0" * 20
    with hold(store, key):
        part = store.workdir(key)
        (part / "last.pt").write_bytes(b"123")
        assert Store(store.root).remove(part) == 0
        assert (part / "last.pt").exists()
    assert store.remove(part) == 3
    assert list(store.stages.iterdir()) == []  # the lock goes with the last of its stage


def test_a_stage_of_a_newer_version_is_neither_used_nor_set_aside(config, store, run):
    record = run(config, store)[0]
    manifest = store.stages / record.key / MANIFEST
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 99}))
    with pytest.raises(StoreError, match="newer Bitladder") as caught:
        run(config, Store(store.root))
    assert str(manifest) in str(caught.value)
    assert caught.value.exit_code == 2
    assert not list(store.stages.glob("*.bad-*"))


def test_an_index_of_a_newer_version_is_left_alone(config, store):
    store.register(make_plan(config))
    set_schema(store, 99)
    with pytest.raises(StoreError, match="newer Bitladder"):
        Store(store.root).runs()
    with closing(sqlite3.connect(store.root / "results.db")) as connection:
        assert connection.execute("SELECT schema_version FROM meta").fetchone() == (99,)


def test_an_index_of_an_older_version_is_built_again(config, store, run):
    run(config, store)
    before = store.results(store.run())
    set_schema(store, 0)
    again = Store(store.root)
    assert again.results(again.run()) == before


def set_schema(store, version):
    with closing(sqlite3.connect(store.root / "results.db")) as connection, connection:
        connection.execute("UPDATE meta SET schema_version = ?", (version,))


def test_a_run_file_that_nothing_can_restore_is_named(config, store, caplog):
    run = store.register(make_plan(config))
    (store.root / "results.db").unlink()
    path = store.reports / run.run / "run.json"
    path.write_text("{")
    assert Store(store.root).runs() == []
    assert f"{path} is damaged" in caplog.text


@pytest.mark.parametrize("root", ["/sys/bitladder", "/dev/null/store"])
def test_a_store_that_cannot_be_written_is_said_before_anything_runs(config, root):
    with pytest.raises(StoreError, match="cannot be"):
        open_ladder(config, Store(root))


def test_a_read_only_store_is_told_from_a_full_one(store):
    read_only = OSError(errno.EROFS, os.strerror(errno.EROFS))
    assert "give another with --store" in store_problem(store.root, read_only)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert "no space left" in store_problem(store.root, full)


def test_no_space_for_a_file_fails_the_stage_and_loses_nothing(
    config, store, run, events, monkeypatch
):
    def write(path, tensors):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("bitladder.pipeline.stages.train.write_tensors", write)
        with pytest.raises(StageError, match="no space left") as caught:
            run(config, store)
    assert caught.value.exit_code == 1
    assert store.state(make_plan(config).stages[0].key)[0] == "failed"
    run(config, store, events)
    started = [event.epoch for event in events if event.kind == "started"]
    assert started == [1, 0]  # the first goes on after its last epoch


@pytest.fixture
def no_room_in_sqlite(monkeypatch):
    """SQLite may not add a page, and the disk has none to give."""

    def limit(connection, _):
        (_, _, file) = connection.execute("PRAGMA database_list").fetchone()
        if file:  # none: in memory
            connection.execute("PRAGMA max_page_count = 1")

    usage = shutil.disk_usage("/")._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    event.listen(Engine, "connect", limit)
    yield
    event.remove(Engine, "connect", limit)


def test_no_space_for_the_index_stops_neither_a_ladder_nor_a_report(
    config, store, run, no_room_in_sqlite
):
    run(config, store)
    again = Store(store.root)
    assert list(accuracy_report(again)["state"]) == ["done", "done"]
    with closing(sqlite3.connect(store.root / "results.db")) as connection:
        assert connection.execute("SELECT * FROM sqlite_master").fetchall() == []


def test_what_the_index_holds_is_what_the_folders_hold(config, store, run):
    records = run(config, store)
    with closing(sqlite3.connect(store.root / "results.db")) as connection:
        files = connection.execute("SELECT path, bytes, sha256 FROM artifacts").fetchall()
        stages = dict(connection.execute("SELECT key, sha256 FROM stages").fetchall())
    known = store.run()
    derived = [store.find(key) for key in (*known.packed, *known.looks)]
    assert stages == {record.key: record.sha256 for record in (*records, *derived)}
    for path, num_bytes, _ in files:
        assert (store.root / path).stat().st_size == num_bytes
    assert {(path, sha) for path, _, sha in files if path.endswith(MODEL)} == {
        (f"stages/{record.key}/{MODEL}", record.sha256) for record in records
    }


def test_numbers_of_a_stage_killed_before_its_index_entry_are_in_the_report(tiny, store, run):
    records = run(tiny(), store)
    last = records[-1].key
    store.index.remove_stages([last])
    part = store.stages / f"{last}.part"
    (store.stages / last).rename(part)  # the manifest was written, the rename did not come
    again = Store(store.root)
    run(tiny(), again)
    assert again.results(again.run())[-1]["test_top1"] == records[-1].metrics["test_top1"]


def test_a_database_of_somebody_else_is_left_alone(tmp_path):
    url = f"sqlite:///{tmp_path}/theirs.db"
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE runs (theirs TEXT)"))
        connection.execute(text("INSERT INTO runs VALUES ('kept')"))
    with pytest.raises(StoreError, match="somebody else"):
        Store(tmp_path / "artifacts", url=url).index.run_names()
    with engine.connect() as connection:
        assert connection.execute(text("SELECT theirs FROM runs")).scalar() == "kept"
    engine.dispose()

import os
import sqlite3
from contextlib import closing

import pytest
from bitladder.pipeline.report import REPORTS, accuracy_report, reports_current, write_report
from bitladder.pipeline.store import Store


@pytest.fixture
def finished(tiny, store, run):
    """A store with one finished ladder, as another process would open it."""
    run(tiny(), store)
    return Store(store.root)


def states(store):
    with closing(sqlite3.connect(store.root / "results.db")) as connection:
        query = "SELECT state FROM run_stages ORDER BY position"
        return [state for (state,) in connection.execute(query)]


@pytest.mark.parametrize("kept", [0, 50, 0.3, 0.99])
@pytest.mark.parametrize("name", ["results.db", "results.db-wal", "results.db-shm"])
def test_a_torn_index_is_built_again_from_the_folders(finished, name, kept):
    before = finished.results(finished.run())
    with closing(sqlite3.connect(finished.root / "results.db")) as connection:
        connection.execute("SELECT * FROM runs").fetchall()  # held open, it keeps the log there
        committed = finished.keys()
        for key in committed:
            finished.index.add_stage(finished.read(key))
        files = {path.name: path.read_bytes() for path in finished.root.glob("results.db*")}
    for path in finished.root.glob("results.db*"):
        path.unlink()
    for file, data in files.items():
        (finished.root / file).write_bytes(data)
    size = len(files[name])
    os.truncate(finished.root / name, kept if isinstance(kept, int) else int(size * kept))
    again = Store(finished.root)
    assert again.results(again.run()) == before
    assert states(again) == ["done"] * 3


def test_a_torn_run_file_is_restored_from_the_index(finished):
    run = finished.run()
    path = finished.reports / run.run / "run.json"
    os.truncate(path, path.stat().st_size // 2)
    assert Store(finished.root).run() == run
    assert path.read_text().endswith("}\n")


def test_a_deleted_index_comes_back_before_any_stage_is_done(tiny, store, run):
    with pytest.raises(KeyboardInterrupt):
        run(tiny(), store, interrupt)
    for path in store.root.glob("results.db*"):
        path.unlink()
    again = Store(store.root)
    assert [row["stage"] for row in again.results(again.run())] == ["fp32", "w4a8", "w1a2"]


def interrupt(event):
    if event.kind == "started":
        raise KeyboardInterrupt


def test_the_index_knows_a_stage_as_done_once_it_is_committed(finished):
    assert states(finished) == ["done"] * 3


def test_a_stage_set_aside_is_no_longer_in_the_index(finished):
    key, before = finished.run().trained[0], len(finished.keys())
    os.truncate(finished.stages / key / "model.safetensors", 10)
    assert finished.claim(key) is None
    assert sorted(states(finished)) == ["done", "done", "to do"]
    assert len(finished.keys()) == before - 1


def test_what_a_killed_process_was_writing_is_removed_by_the_next_holder(finished):
    torn = finished.workdir("0" * 20) / ".last.pt.123.tmp"
    torn.write_bytes(b"half")
    finished.workdir("0" * 20)
    assert not torn.exists()


def test_reports_written_before_the_last_stage_are_not_current(finished):
    run = finished.run()
    assert not reports_current(finished, run)
    for name, form in REPORTS.items():
        write_report(accuracy_report(finished, run), form, finished.reports / run.run / name)
    assert reports_current(finished, run)
    os.utime(finished.reports / run.run / "report.md", (0, 0))
    assert not reports_current(finished, run)

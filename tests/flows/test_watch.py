import json
import platform
import shutil
import subprocess

import pytest
from bitladder.flows.watch import QUIET_SECONDS, Watch
from bitladder.pipeline.config_load import parse_config
from bitladder.pipeline.errors import StageError
from bitladder.pipeline.runner import open_ladder, run_ladder
from bitladder.pipeline.store import Store

CONFIG = {
    "name": "watched",
    "data": {"name": "digits", "batch_size": 256},
    "model": {"name": "tiny_convnet"},
    "train": {"epochs": 2, "calibration_batches": 1, "batch_norm_batches": 1},
    "ladder": [
        {"weight_bits": 32, "activation_bits": 32},
        {"weight_bits": 4, "activation_bits": 4},
    ],
}


class Follower:
    """Watches a ladder at each of its own events, so at instants that are known."""

    def __init__(self, store):
        self.store, self.told, self.watch, self.over = store, [], None, False

    def __call__(self, event):
        if event.kind != "step":
            self.look()

    def look(self, now=0.0):
        if self.watch is None:
            self.watch = Watch(self.store, self.store.run(), self.told.append)
        self.over = self.watch.look(now)

    @property
    def kinds(self):
        return [(event.stage, event.kind, event.epoch) for event in self.told]


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("watched"))
    follower = Follower(store)
    run_ladder(open_ladder(parse_config(CONFIG), store, follower))
    follower.look()
    return follower


@pytest.fixture
def unfinished(followed, tmp_path):
    """The same ladder as it was while its second rung was trained."""
    shutil.copytree(followed.store.root, tmp_path / "store")
    store = Store(tmp_path / "store")
    run = store.run()
    for key in (run.trained[1], run.packed[1]):
        shutil.rmtree(store.stages / key)
    part = store.stages / f"{run.trained[1]}.part"
    part.mkdir()
    (part / "last.pt").touch()
    return Follower(store), part


def test_what_a_ladder_tells_is_seen_in_its_store(followed):
    assert followed.kinds == [
        (stage, kind, epoch)
        for stage in ("fp32", "w4a4")
        for kind, epoch in [
            ("started", 0),
            ("epoch", 1),
            ("epoch", 2),
            ("finished", 0),
            ("packed", 0),
        ]
    ]
    epochs = [event for event in followed.told if event.kind == "epoch"]
    lines = (followed.store.stages / followed.watch.run.trained[0] / "metrics.jsonl").read_text()
    assert [event.accuracy for event in epochs[:2]] == [
        json.loads(line)["val_top1"] for line in lines.splitlines()
    ]
    assert followed.over
    assert not followed.watch.failed


def test_a_finished_ladder_is_over_at_once(followed):
    again = Follower(followed.store)
    again.look()
    assert again.over
    assert [event.kind for event in again.told] == ["reused", "reused"]


def test_a_killed_ladder_is_said_once_and_waited_for(unfinished):
    follower, part = unfinished
    dead = subprocess.Popen(["true"])
    dead.wait()
    note = {"pid": dead.pid, "host": platform.node(), "since": ""}
    (part / "holder.json").write_text(json.dumps(note))
    for now in (0.0, 100.0):
        follower.look(now)
    (said,) = [event.text for event in follower.told if event.kind == "message"]
    assert said.startswith(f"process {dead.pid} on {platform.node()} is gone; go on with: ")
    assert f"bitladder resume {follower.watch.run.run} --store" in said
    assert not follower.over

    run_ladder(open_ladder(parse_config(CONFIG), follower.store, follower))
    follower.look()
    assert follower.over
    assert follower.kinds[-1] == ("w4a4", "packed", 0)


def test_a_ladder_that_nobody_works_on_is_said_after_a_while(unfinished):
    follower, _ = unfinished
    run_file = follower.store.reports / follower.store.run().run / "run.json"
    raw = json.loads(run_file.read_text())
    run_file.write_text(json.dumps({**raw, "touched": "2026-01-01T00:00:00+00:00"}))
    for now in (0.0, QUIET_SECONDS - 1):
        follower.look(now)
        assert "message" not in {event.kind for event in follower.told}
    for now in (QUIET_SECONDS + 1, QUIET_SECONDS + 2):
        follower.look(now)
    (said,) = [event for event in follower.told if event.kind == "message"]
    assert (said.stage, said.text.partition(";")[0]) == ("w4a4", "nobody works on it")


def test_watching_ends_where_a_stage_fails(tmp_path):
    store = Store(tmp_path)
    follower = Follower(store)
    ladder = [{"weight_bits": 32, "activation_bits": 32, "train": {"optimizer": {"lr": 1e30}}}]
    with pytest.raises(StageError):
        run_ladder(open_ladder(parse_config({**CONFIG, "ladder": ladder}), store))
    follower.look()
    assert follower.over
    assert follower.watch.failed
    assert "the loss is nan" in follower.told[-1].text


def test_watching_takes_no_lock_and_writes_nothing(unfinished):
    follower, part = unfinished
    follower.watch = Watch(follower.store, follower.store.run(), follower.told.append)
    before = {p: p.stat().st_mtime_ns for p in follower.store.root.rglob("*")}
    locks = [p for p in before if p.suffix == ".lock"]
    held = follower.store._lock(part.name.removesuffix(".part")).try_to_hold()
    assert held is not None
    follower.look()
    held.release()
    assert locks
    assert {
        p: p.stat().st_mtime_ns for p in follower.store.root.rglob("*") if p in before
    } == before


def test_in_a_pipe_it_prints_lines_and_the_table(followed, bitladder):
    code, out, _ = bitladder("watch", "--store", followed.store.root)
    assert code == 0
    lines = out.splitlines()
    assert "1/2 fp32 was there already" in lines[0]
    assert followed.watch.run.run in lines
    assert [line.split()[:2] for line in lines[-2:]] == [["fp32", "done"], ["w4a4", "done"]]

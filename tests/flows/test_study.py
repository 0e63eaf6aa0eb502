"""`bitladder study` as a user types it: in this process, its workers in processes of their own."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from bitladder.flows import study
from bitladder.flows.study_run import StudyRun, execute, load
from bitladder.flows.trials import processes
from bitladder.pipeline.errors import Diverged
from bitladder.pipeline.record import CHECKPOINT
from bitladder.pipeline.runner import open_ladder, run_ladder
from bitladder.pipeline.store import Store
from bitladder.pipeline.study.write import FILES
from bitladder.pipeline.study_record import FILE, study_records, study_state

BASE = {
    "name": "tiny",
    "data": {"name": "digits", "batch_size": 256},
    "model": {"name": "tiny_convnet"},
    "train": {"epochs": 1, "calibration_batches": 2},
    "ladder": [
        {"weight_bits": 32, "activation_bits": 32},
        {"weight_bits": 2, "activation_bits": 2},
    ],
}
ARMS = {"kd": {}, "plain": {"set": {"distill": {"weight": 0}}}}
TINY = {
    "name": "tiny",
    "base": BASE,
    "seeds": 2,
    "arms": ARMS,
    "families": {"all": [{"arm": "kd", "against": "plain"}]},
}
# A user's network that does something to its process in its third training step.
TROUBLED = """
import os, signal
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes, in_channels, trouble=""):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(),
            nn.Flatten(), nn.Linear(4, num_classes))
        self.trouble, self.steps = trouble, 0

    def forward(self, x):
        self.steps += self.training
        if self.steps == 3 and self.trouble == "raise":
            raise ValueError("no more of this")
        if self.steps == 3 and self.trouble == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        return self.layers(x)
"""


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BITLADDER_STORE", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "troubled", raising=False)


def write(path="tiny.yaml", **changes):
    Path(path).write_text(yaml.safe_dump({**TINY, **changes}, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def finished_once(tmp_path_factory):
    root = tmp_path_factory.mktemp("finished")
    run = StudyRun(str(write(root / "tiny.yaml")), workers=2)
    study = load(run)
    store = Store(root / "artifacts")
    assert {o.state for o in execute(study, run, store).values()} == {"done"}
    return root


@pytest.fixture
def store(finished_once, tmp_path):
    """The store of a finished study, `tiny.yaml`, in the current folder."""
    shutil.copytree(finished_once, tmp_path, dirs_exist_ok=True)
    return Store("artifacts")


@pytest.fixture
def prefect_home(request, monkeypatch):
    """A PREFECT_HOME that later test runs find again: making its database takes 14 s."""
    from importlib.metadata import version

    folder = request.config.cache.mkdir(f"prefect-{version('prefect')}")
    monkeypatch.setenv("PREFECT_HOME", str(folder))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)


@pytest.fixture
def no_worker(monkeypatch):
    """Fails where a worker would be started."""

    def fail(*_args, **_options):
        pytest.fail("a worker was started")

    monkeypatch.setattr(processes.Processes, "_new_worker", fail)


def keys_of(run, arm):
    """Of each trial of an arm, the keys in ladder order."""
    return [[s.key for s in trial.plan.stages] for trial in load(run).trials if trial.arm == arm]


def weights(store):
    return {key: store.read(key).sha256 for key in list(store.keys())}


# -- running -----------------------------------------------------------------------------------


def test_two_processes_train_each_stage_once_and_the_tables_are_printed(bitladder, caplog):
    code, out, err = bitladder("study", write(), "--workers", "2", "--store", "here", "-v")
    assert code == 0, err
    assert err.count("finished, validation") == 6  # 2 x FP32, and 2 x 2-bit of each of two arms
    assert len(set(re.findall(r"done in (process \d+)", caplog.text))) == 2
    assert "kd - plain at w2a2" in out
    files = [line for line in out.splitlines() if line.startswith("here/studies/")]
    assert {"values.csv", "study.md", "study.json"} <= {Path(file).name for file in files}
    assert all(Path(file).is_file() for file in files)


def test_a_finished_study_executes_nothing_and_prints_the_same(bitladder, store, no_worker):
    before = {path: path.stat().st_mtime_ns for path in store.stages.rglob("*")}
    code, out, err = bitladder("study", "tiny.yaml", "--workers", "2")
    assert (code, err) == (0, "")
    assert "kd - plain at w2a2" in out
    assert {path: path.stat().st_mtime_ns for path in store.stages.rglob("*")} == before


def test_in_python_it_is_a_function_that_gives_a_row_for_each_trial_and_stage(store, no_worker):
    frame = study("tiny.yaml", store=store.root)
    assert list(zip(frame["arm"], frame["seed"], frame["stage"], strict=True)) == [
        (arm, seed, stage)
        for arm in ("kd", "plain")
        for seed in (0, 1)
        for stage in ("fp32", "w2a2")
    ]
    assert set(frame["state"]) == {"done"}


def test_with_one_arm_changed_only_its_stages_are_trained(bitladder, store):
    before = weights(store)
    write(arms={**ARMS, "plain": {"set": {"distill": {"weight": 0.25}}}})
    code, _, err = bitladder("study", "tiny.yaml", "--workers", "2")
    assert code == 0, err
    changed = {trial[-1] for trial in keys_of(StudyRun("tiny.yaml"), "plain")}
    assert set(store.keys()) - set(before) == changed
    assert err.count("finished, validation") == len(changed) == 2
    assert weights(store).items() >= before.items()


def test_the_number_of_workers_changes_no_bit_where_threads_are_given(bitladder, store):
    bitladder(
        *("study", "tiny.yaml", "--workers", "1", "--store", "alone"),
        *("--set", "base.runtime.threads=1"),
    )
    assert weights(Store("alone")) == weights(store)


def test_report_only_shows_what_is_there_and_runs_nothing(bitladder, store, no_worker):
    code, out, _ = bitladder("study", "tiny.yaml", "--report-only", "--store", "none")
    assert (code, out.count("is in none yet")) == (0, 1)
    assert not Path("none").exists()
    key = keys_of(StudyRun("tiny.yaml"), "plain")[1][-1]
    shutil.rmtree(store.stages / key)
    (folder,) = (store.root / "studies").iterdir()
    (folder / "report.html").write_text("of an older version")
    code, out, _ = bitladder("study", "tiny.yaml", "--report-only")
    assert code == 0
    assert "kd - plain at w2a2" in out
    assert "</html>" in (folder / "report.html").read_text()
    figures = {f"{name}.{form}" for name in ("study", "differences") for form in ("png", "svg")}
    assert {path.name for path in folder.iterdir()} == {FILE, *FILES, *figures}
    assert all(str(folder / name) in out for name in (*FILES, *figures))
    assert out.endswith("1 of 4 trials are left; go on with: bitladder study tiny.yaml\n")


# -- bad input, failure ------------------------------------------------------------------------


def test_all_mistakes_come_at_once_and_nothing_is_written(bitladder):
    write(seeds=0, arms={**ARMS, "wrong": {"set": {"trian": {}}}})
    code, _, err = bitladder("study", "tiny.yaml", "--address", "tcp://127.0.0.1:1")
    assert code == 2
    assert err.startswith("errors:\n--address: is for --runner dask and ray\n")
    assert "seeds: must be at least 1, not 0" in err
    assert "arms.wrong" in err
    assert not Path("artifacts").exists()


def test_an_arm_that_does_not_fit_its_data_is_said_before_anything_is_trained(bitladder):
    Path("seven.py").write_text(
        "from torch import nn\n\ndef net(in_channels, image_size):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * image_size**2, 7))\n"
    )
    write(arms={**ARMS, "seven": {"set": {"model": {"name": "seven:net"}}}})
    code, _, err = bitladder("study", "tiny.yaml")
    assert code == 2
    assert "arms.seven: model: seven:net" in err
    assert "10 classes" in err
    assert not Path("artifacts").exists()


def test_a_missing_package_is_said_with_the_way_to_get_it(bitladder, monkeypatch):
    monkeypatch.setattr("bitladder.flows.study_run.find_spec", lambda name: None)
    code, _, err = bitladder("study", write(), "--runner", "ray")
    assert code == 2
    assert err == "error: --runner ray: is not installed; pip install 'bitladder[ray]'\n"


@pytest.mark.parametrize(
    ("trouble", "cause"),
    [
        ("raise", "stage 'fp32' failed: ValueError: no more of this"),
        ("killed", "its process ended by SIGKILL: was there not enough memory?"),
    ],
)
def test_the_other_trials_go_on_where_one_fails(bitladder, trouble, cause):
    Path("troubled.py").write_text(TROUBLED)
    model = {"name": "troubled:Net"}
    arms = {"bad": {"set": {"model": {**model, "trouble": trouble}}}, "good": {}}
    write(base={**BASE, "model": model}, arms=arms, families={}, seeds=1)
    code, out, err = bitladder("study", "tiny.yaml", "--workers", "1")
    assert code == 1
    assert "Stage w2a2" in out
    assert f"error: 1 of 2 trials failed:\n  bad, seed 0: {cause}\n" in err
    assert err.endswith(
        "go on after mending the cause with: bitladder study tiny.yaml --workers 1\n"
    )
    done = {key for trial in keys_of(StudyRun("tiny.yaml"), "good") for key in trial}
    assert set(Store("artifacts").keys()) == done
    [record] = study_records(Store("artifacts"))
    state, counts = study_state(Store("artifacts"), record)
    assert counts["done"] == 1
    assert state == ("failed" if trouble == "raise" else "interrupted")


def test_a_diverged_trial_is_counted_and_not_tried_again(bitladder, monkeypatch):
    hot = {"rungs": {"w2a2": {"train": {"optimizer": {"lr": 1e30}}}}}
    write(arms={"kd": {}, "hot": hot}, families={"all": [{"arm": "hot", "against": "kd"}]}, seeds=1)
    code, out, err = bitladder("study", "tiny.yaml", "--workers", "1")
    assert code == 0, err
    assert "hot, seed 0 diverged: w2a2: the loss is" in err
    store, [_, hot] = Store("artifacts"), load(StudyRun("tiny.yaml")).trials
    assert store.diverged(hot.plan.stages[-1].key).startswith("the loss is")
    [row] = [line.split() for line in out.splitlines() if line.strip().startswith("hot 1")]
    assert "10.00" in row  # the chance of ten classes
    monkeypatch.setattr(processes.Processes, "_new_worker", pytest.fail)
    assert bitladder("study", "tiny.yaml")[::2] == (0, "")
    heard = []
    with pytest.raises(Diverged):  # as a ladder of its own it is tried again
        run_ladder(open_ladder(hot.config, store, heard.append))
    assert [event.kind for event in heard] == ["reused", "packed", "started", "failed"]
    assert store.diverged(hot.plan.stages[-1].key)
    with pytest.raises(Diverged):  # and in a study not, by whomever it diverged
        run_ladder(open_ladder(hot.config, store, heard.append, of_study=True))
    assert [event.kind for event in heard][4:] == ["reused"]


# -- interruption, kill ------------------------------------------------------------------------


def when_both_train(store, act):
    """Acts from another thread once two stages have a checkpoint."""

    def watch():
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if len(list(store.stages.glob(f"*.part/{CHECKPOINT}"))) >= 2:
                break
            time.sleep(0.05)
        act()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGINT, id="Ctrl-C"),
        pytest.param(signal.SIGTERM, id="SIGTERM", marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_every_trial_and_a_rerun_gives_the_bits_of_one_never_stopped(
    bitladder, number
):
    write(base={**BASE, "ladder": BASE["ladder"][:1], "train": {"epochs": 25}}, families={})
    command = ["study", "tiny.yaml", "--workers", "2", "--set", "arms={kd: {}}"]
    assert bitladder(*command, "--store", "whole")[0] == 0
    store = Store("artifacts")
    thread = when_both_train(store, lambda: os.kill(os.getpid(), number))
    code, out, err = bitladder(*command)
    thread.join()
    assert code == 128 + number
    assert out == ""
    again = "bitladder study tiny.yaml --set 'arms={kd: {}}' --workers 2"
    assert err.endswith(f"stopped, and saved; go on with: {again}\n")
    assert len(list(store.stages.glob(f"*.part/{CHECKPOINT}"))) == 2
    assert "interrupted  0 of 2 trials" in bitladder("list")[1]
    assert bitladder("resume")[1].endswith(f" is not finished; go on with: {again}\n")
    code, _, err = bitladder(*command)
    assert code == 0, err
    assert len(re.findall("goes on after epoch [1-9]", err)) == 2
    assert weights(store) == weights(Store("whole"))


@pytest.mark.parametrize(
    "runner",
    [
        "processes",
        pytest.param("dask", marks=[pytest.mark.slow, pytest.mark.flow]),
        pytest.param("ray", marks=[pytest.mark.slow, pytest.mark.flow]),
    ],
)
def test_five_seconds_after_kill_9_no_process_of_a_study_lives(prefect_home, runner):
    write(base={**BASE, "train": {"epochs": 5000}})
    command = [sys.executable, "-m", "bitladder.flows", "study", "tiny.yaml", "--workers", "2"]
    command += ["--runner", runner]
    store = Store("artifacts")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as running:
        when_both_train(store, lambda: None).join()
        tree = descendants(running.pid)
        assert len(tree) >= 2
        running.kill()
        killed = time.monotonic()
        running.stdout.read()  # returns when nobody holds the other end any more
        while any(map(is_alive, tree)) and time.monotonic() - killed < 10:
            time.sleep(0.05)
        assert time.monotonic() - killed < 5


def descendants(pid):
    children = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(folder.name))
    found, todo = [], [pid]
    while todo:
        todo += (own := children.get(todo.pop(), []))
        found += own
    return found


def is_alive(pid):
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


# -- clusters ----------------------------------------------------------------------------------


@pytest.mark.flow
@pytest.mark.parametrize("runner", ["dask", "ray"])
def test_a_cluster_runs_trials_on_two_workers_and_gives_the_same_bits(
    bitladder, store, prefect_home, runner, monkeypatch
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = [sys.executable, "-W", "error", "-m", "bitladder.flows", "study", "tiny.yaml", "-v"]
    command += ["--workers", "2", "--runner", runner, "--store", "cluster"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("finished, validation") == 6
    workers = re.findall(r"done in process (\d+)", done.stderr)
    assert (len(workers), len(set(workers))) == (4, 2)
    assert not any(is_alive(int(pid)) for pid in workers)
    assert weights(Store("cluster")) == weights(store)
    assert "kd - plain at w2a2" in done.stdout


# -- the store ---------------------------------------------------------------------------------


def test_clean_keeps_the_stages_of_a_study_and_list_shows_it_on_a_line(bitladder, store):
    assert bitladder("clean", "--yes")[1] == "nothing to remove\n"
    _, out, _ = bitladder("list")
    header, line = out.splitlines()
    assert header.split()[:3] == ["study", "state", "done"]
    assert line.split()[:6] == [load(StudyRun("tiny.yaml")).id, "done", "4", "of", "4", "trials"]
    [file] = store.root.glob("studies/*/study.json")
    file.write_text("{")  # whose stages would seem to be nobody's
    assert bitladder("clean", "--yes")[1] == "nothing to remove\n"
    shutil.rmtree(file.parent)
    assert bitladder("clean", "--yes")[1].startswith(f"{store.stages}/")
    assert store.keys() == []


def test_a_study_keeps_its_date_and_the_command_that_was_given_last(store):
    [first] = study_records(store)
    run = StudyRun("tiny.yaml", workers=1)
    execute(load(run), run, store)
    [again] = study_records(store)
    assert again.created == first.created
    assert json.loads(next(store.root.glob("studies/*/study.json")).read_text())["trials"]
    assert again.command == "bitladder study tiny.yaml --workers 1"

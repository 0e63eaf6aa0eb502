"""How the trials of a study are given out, watched, stopped and cleared away."""

import io
import os
import re
import subprocess
import sys
import time

import pytest
from bitladder.flows.trials.cluster_worker import stop_without
from bitladder.flows.trials.dispatch import Task, next_task, settled
from bitladder.flows.trials.pace import Pace
from bitladder.flows.trials.progress import Lines, Rows
from bitladder.flows.trials.reaper import reap, reaped
from bitladder.flows.trials.run_trial import Outcome, Request
from bitladder.pipeline.config_load import parse_config
from bitladder.pipeline.events import Event
from bitladder.pipeline.store import Store
from bitladder.pipeline.study import Trial
from filelock import FileLock
from rich.console import Console
from rich.progress import Progress


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "artifacts")
    store.stages.mkdir(parents=True)
    return store


def task(number, seed, weight=0.5):
    """A trial of two stages, of which those with the same seed share the first."""
    config = parse_config(
        {
            "name": "tiny",
            "seed": seed,
            "data": {"name": "digits"},
            "model": {"name": "tiny_convnet"},
            "distill": {"weight": weight},
            "ladder": [
                {"weight_bits": 32, "activation_bits": 32, "epochs": 4},
                {"weight_bits": 2, "activation_bits": 2, "epochs": 6},
            ],
        }
    )
    request = Request("tiny", config.model_dump(mode="json"), 1, "artifacts", None)
    return Task(number, Trial(f"kd-{weight}", seed, None, config), request)


ONE, SAME_SEED, OTHER_SEED = task(0, seed=0), task(1, seed=0, weight=0.25), task(2, seed=1)


def done(store, key):
    (store.stages / key).mkdir()


def test_trials_share_what_does_not_tell_them_apart():
    assert ONE.keys[0] == SAME_SEED.keys[0]
    assert len({ONE.keys[1], SAME_SEED.keys[1], *OTHER_SEED.keys}) == 4


def test_a_trial_whose_next_stage_another_one_trains_comes_after_those_that_can_begin(store):
    waiting = [SAME_SEED, OTHER_SEED]
    assert next_task(waiting, [], store) is SAME_SEED
    assert next_task(waiting, [ONE], store) is OTHER_SEED
    assert next_task([SAME_SEED], [ONE], store) is None
    done(store, ONE.keys[0])
    assert next_task(waiting, [ONE], store) is SAME_SEED


def test_a_trial_whose_next_stage_another_process_trains_waits_for_it_only_if_nothing_else_can(
    store,
):
    def begin(task):
        # another open file of the lock is to the kernel what another process is
        return store.lock(task.keys[0], waiting=pytest.fail, stop=lambda: None)

    with begin(ONE):
        assert next_task([ONE, OTHER_SEED], [], store) is OTHER_SEED
        assert next_task([ONE], [OTHER_SEED], store) is None
        assert next_task([ONE], [], store) is ONE


def test_a_trial_is_settled_when_all_is_there_or_a_stage_diverged(store):
    assert settled(ONE, store) is None
    done(store, ONE.keys[0])
    assert settled(ONE, store) is None
    store.fail(ONE.keys[1], "the loss is nan", diverged=True)
    assert settled(ONE, store) == Outcome("diverged", "w2a2: the loss is nan")
    store.fail(SAME_SEED.keys[1], "no space left")
    assert settled(SAME_SEED, store) is None
    done(store, SAME_SEED.keys[1])
    assert settled(SAME_SEED, store) == Outcome("done")


def heard(task, position, kind, fraction=0.0):
    stage = task.plan.stages[position]
    return Event(kind, stage.name, position, 2, epoch=1, epochs=4, fraction=fraction)


def test_the_time_left_counts_each_stage_once_and_not_what_was_there():
    now = [0.0]
    pace = Pace([ONE, SAME_SEED], {OTHER_SEED.keys[0]}.__contains__, lambda: now[0])
    assert pace.seconds_left is None
    now[0] = 20.0
    pace.heard(ONE, heard(ONE, 0, "started", 0.5))  # two of four epochs were done before
    pace.heard(ONE, heard(ONE, 0, "finished", 1.0))
    assert pace.seconds_left == pytest.approx(20 / 2 * (6 + 6))
    pace.ended(SAME_SEED)
    assert pace.seconds_left == pytest.approx(20 / 2 * 6)
    pace.heard(ONE, heard(ONE, 1, "step", 0.5))
    assert pace.seconds_left == pytest.approx(20 / 5 * 3)


def test_a_log_has_a_line_for_each_stage_and_trial_and_few_of_training():
    lines = []
    watcher = Lines(lines.append, Pace([ONE], lambda key: False), 1, 3)
    watcher.started(ONE)
    for kind in ("started", *["step", "epoch"] * 50, "finished"):
        watcher.heard(ONE, heard(ONE, 0, kind, 0.5))
    watcher.ended(ONE, Outcome("failed", "no space left\nfree some"))
    assert [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in lines] == [
        "trial 1/3 kd-0.5, seed 0: 1/2 fp32 goes on after epoch 1/4",
        "trial 1/3 kd-0.5, seed 0: 1/2 fp32 finished",
        "trial 1/3 kd-0.5, seed 0 failed: no space left",
    ]


@pytest.mark.parametrize("width", [40, 80, 120])
def test_on_a_terminal_each_trial_that_runs_has_one_line_and_the_study_another(width):
    console = Console(file=io.StringIO(), width=width, force_terminal=True)
    from bitladder.flows.trials.progress import columns

    progress = Progress(*columns(), console=console, auto_refresh=False, expand=True)
    watcher = Rows(progress, Pace([ONE, OTHER_SEED], lambda key: False), 2, 4)
    for each in (ONE, OTHER_SEED):
        watcher.started(each)
        watcher.heard(each, heard(each, 1, "epoch", 0.5))
    text = ["".join(s.text for s in line) for line in console.render_lines(progress)]
    shown = [line.strip() for line in text if line.strip()]
    assert len(shown) == 3
    assert shown[0].startswith("2 of 4 trials")
    assert shown[1].startswith("trial 1/4 kd-0.5")
    assert ("2/2 w2a2" in shown[1]) == (width > 40)
    watcher.ended(ONE, Outcome("done"))
    watcher.ended(OTHER_SEED, Outcome("interrupted"))
    assert "trial 1/4 kd-0.5, seed 0 done" in console.file.getvalue()


def test_without_its_lease_a_trial_stops(tmp_path, monkeypatch):
    monkeypatch.setattr("bitladder.flows.trials.cluster_worker.LOOK_SECONDS", 0.0)
    path = tmp_path / ".1.running"
    with FileLock(path):
        stop = stop_without(path)
        assert stop() is None
    assert stop() == 15
    assert stop_without(tmp_path / "gone")() == 15


def test_what_a_killed_process_began_in_a_cluster_is_ended_and_nothing_else():
    sleeping = [sys.executable, "-c", "import time; time.sleep(60)"]
    with subprocess.Popen(sleeping) as other:
        with reaped(), subprocess.Popen(sleeping) as ours:
            time.sleep(0.2)
            assert reap(os.environ["BITLADDER_CLUSTER"]) == 1
            assert ours.wait(5) == -9
        assert "BITLADDER_CLUSTER" not in os.environ
        assert other.poll() is None
        other.kill()

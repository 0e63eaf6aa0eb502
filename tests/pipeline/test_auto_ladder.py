import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise

import pytest
import yaml
from bitladder.pipeline.auto_ladder import End, course, is_over, next_rung, possible_rungs
from bitladder.pipeline.auto_plan import plan_so_far
from bitladder.pipeline.config import AutoConfig
from bitladder.pipeline.config_load import parse_config
from bitladder.pipeline.errors import ConfigError
from bitladder.pipeline.plan import make_plan
from bitladder.pipeline.report import accuracy_report, render
from bitladder.pipeline.runner import open_ladder
from bitladder.pipeline.store import Store
from hypothesis import given
from hypothesis import strategies as st

POINTS = {"budget": 0.03, "step_budget": 0.01}


def rules(weight_bits=1, activation_bits=1, **changes):
    return AutoConfig(
        weight_bits=weight_bits, activation_bits=activation_bits, **{**POINTS, **changes}
    )


def names(found):
    return [rung.name for rung in found.rungs]


# -- the rule, over made-up accuracies ------------------------------------------------------------


def test_without_losses_it_goes_straight_down_to_the_target():
    found = course(rules(), [0.99] * 5)
    assert names(found) == ["fp32", "w8a8", "w4a4", "w2a2", "w1a1"]
    assert found.end.result == "w1a1"
    assert "the target w1a1 is reached" in found.end.reason


@pytest.mark.parametrize(
    ("target", "way"),
    [
        ((1, 2), ["w8a8", "w4a4", "w2a2", "w1a2"]),
        ((1, 32), ["w8a32", "w4a32", "w2a32", "w1a32"]),
        ((3, 3), ["w8a8", "w4a4", "w3a3"]),
        ((8, 8), ["w8a8"]),
        ((2, 16), ["w8a16", "w4a16", "w2a16"]),
    ],
)
def test_each_half_stops_at_its_own_target(target, way):
    assert names(course(rules(*target), [0.99] * (len(way) + 1))) == ["fp32", *way]


def test_a_step_that_loses_too_much_gets_a_middle_rung_and_is_tried_again_from_there():
    found = course(rules(), [0.99, 0.99, 0.985, 0.97, 0.98, 0.975])
    assert names(found) == ["fp32", "w8a8", "w4a4", "w2a2", "w3a3", "w2a2-2", "w1a1"]
    assert found.rungs[4].kept[-1] == "w4a4"  # not from the rung that lost too much
    assert found.rungs[5].kept[-1] == "w3a3"
    assert "1.50 points below w4a4, more than the 1.00 of a step; w3a3 comes" in found.notes[3]
    assert found.notes[4].startswith("put between w4a4 and w2a2; 0.50 points below w4a4: kept")
    assert found.notes[5].startswith("again, from w3a3; 0.50 points below w3a3: kept")


def test_where_there_is_no_middle_half_of_the_step_comes_first():
    three_bits_did_not_do = [0.99, 0.99, 0.985, 0.965, 0.983, 0.97]
    assert next_rung(rules(), three_bits_did_not_do).name == "w2a3"  # weights first
    assert next_rung(rules(), [0.99, 0.99, 0.985, 0.98, 0.90]).name == "w2a1"  # activations first


def test_a_middle_rung_that_is_not_kept_gives_way_to_half_of_the_step_from_the_same_rung():
    values = [0.99, 0.99, 0.985, 0.90, 0.91, 0.92]  # w2a2, then w3a3, then w3a4 between that
    found = course(rules(insertions=16), values)
    assert names(found)[3:] == ["w2a2", "w3a3", "w3a4", "w2a4"]
    assert found.rungs[-1].kept[-1] == "w4a4"


def test_a_second_try_that_is_no_better_leaves_the_first_in_its_place():
    found = course(rules(), [0.99, 0.99, 0.985, 0.97, 0.98, 0.965])
    assert found.rungs[-1].name == "w1a1"
    assert found.rungs[-1].kept[-1] == "w2a2"
    assert "the new start does not help" in found.notes[5]


def test_a_rung_over_the_step_budget_is_kept_where_nothing_can_come_between():
    found = course(rules(1, 2), [0.99, 0.99, 0.985, 0.98, 0.965])
    assert found.end.result == "w1a2"
    assert "nothing more can come between; kept" in found.notes[-1]


def test_it_ends_above_the_rung_that_spends_the_budget():
    found = course(rules(1, 2), [0.99, 0.99, 0.985, 0.98, 0.955])
    assert found.end.result == "w2a2"
    assert "w1a2 loses more than 3.00 points; the result is w2a2" in found.end.reason
    assert "1.00 points below fp32" in found.end.reason
    assert "not kept; the ladder ends" in found.notes[-1]


def test_it_inserts_no_more_rungs_than_allowed():
    values = [0.99, 0.99, 0.985, 0.965]
    assert next_rung(rules(insertions=1), values).name == "w3a3"
    found = course(rules(insertions=0), values)
    assert found.rungs[-1].name == "w1a1"
    assert "no insertion is left; kept" in found.notes[3]


def test_a_loss_of_exactly_the_budget_is_within_it():
    assert course(rules(8, 8, budget=0.01), [0.99, 0.98]).end.result == "w8a8"


def test_a_step_may_lose_half_of_the_budget_unless_told_otherwise():
    assert rules(step_budget=None, budget=0.04).step == 0.02


targets = st.sampled_from([(1, 1), (1, 2), (2, 1), (1, 32), (3, 5), (2, 2), (4, 16)])


@given(targets, st.integers(0, 6), st.lists(st.floats(0.9, 1.0), min_size=40, max_size=40))
def test_whatever_comes_out_it_ends_within_the_budget(target, insertions, values):
    auto = rules(*target, insertions=insertions)
    found = course(auto, values)
    ran = names(found)
    assert isinstance(found.end, End)
    assert len(ran) <= 5 + 2 * insertions
    assert len(set(ran)) == len(ran)
    assert {rung.widths for rung in found.rungs} <= set(possible_rungs(auto))
    assert values[0] - values[ran.index(found.end.result)] <= auto.budget + 1e-6
    for rung in found.rungs:
        way = [next(r.widths for r in found.rungs if r.name == n) for n in rung.kept]
        assert all(rung.widths[0] <= w[0] and rung.widths[1] <= w[1] for w in way)


@given(targets, st.lists(st.floats(0.9, 1.0), min_size=30, max_size=30))
def test_what_was_done_does_not_change_as_more_becomes_known(target, values):
    whole = course(rules(*target), values).rungs
    for known, rung in enumerate(whole):
        assert next_rung(rules(*target), values[:known]) == rung


# -- config ---------------------------------------------------------------------------------------

AUTO = {"weight_bits": 2, "activation_bits": 2, "budget": 0.4, "step_budget": 0.1}


def test_a_rung_has_the_sections_above_and_over_them_its_own_settings(tiny):
    auto = {**AUTO, "weight_bits": 1, "rungs": {"w1*": {"epochs": 7}, "w?a2": {"teacher": "fp32"}}}
    config = tiny(ladder="auto", auto=auto, train={"epochs": 3})
    rungs = config.auto.rungs
    assert [rungs[name].train.epochs for name in ("fp32", "w2a2", "w1a2")] == [3, 3, 7]
    assert [rungs[name].distill.teacher for name in ("w4a4", "w1a2")] == ["previous", "fp32"]
    decay = {name: rung.train.optimizer.weight_decay for name, rung in rungs.items()}
    assert decay["w1a2"] == 0  # latent weights at one bit
    assert decay["w2a2"] == 1e-4


def test_a_stored_automatic_config_gives_itself_again(tiny):
    config = tiny(ladder="auto", auto={**AUTO, "rungs": {"w2*": {"quantizer": "dorefa"}}})
    stored = json.loads(json.dumps(config.model_dump(mode="json")))
    assert stored["ladder"] == "auto"
    assert parse_config(stored) == config


def test_every_mistake_in_the_automatic_section_is_said_at_once(tiny):
    auto = {
        "weight_bits": 9,
        "activation_bits": 2,
        "budget": 2,
        "insertions": -1,
        "speed": 1,
        "rungs": {"w4a4": {"init": "scratch", "quantizer": "lsqq"}, "w2a2": 5},
    }
    with pytest.raises(ConfigError) as caught:
        tiny(ladder="auto", auto=auto, total_epochs=10)
    errors = {line.partition(": ")[0]: line for line in caught.value.errors}
    assert "0.02 is 2 points" in errors["auto.budget"]
    assert "no width 9" in errors["auto.weight_bits"]
    assert "unknown key 'init'" in errors["auto.rungs.w4a4.init"]
    assert "auto.insertions" in errors
    assert "unknown key" in errors["auto.speed"]
    assert "must be a mapping" in errors["auto.rungs.w2a2"]
    assert "lsqq" in errors["auto.rungs.w4a4.quantizer.weight"]
    assert "list of rungs" in errors["total_epochs"]


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"ladder": "auto"}, r"^auto: is missing; give target and budget, such as \{weight_bits"),
        ({"auto": AUTO}, "^auto: is for ladder: auto"),
        ({"ladder": "auto", "auto": {**AUTO, "step_budget": 0.5}}, "more than the budget, 0.4"),
        (
            {"ladder": "auto", "auto": {**AUTO, "weight_bits": 32, "activation_bits": 16}},
            r"^auto\.activation_bits: the target is wider than 8 bits in both",
        ),
        (
            {"ladder": "auto", "auto": {**AUTO, "rungs": {"w1*": {"epochs": 2}}}},
            r"^auto\.rungs\.w1\*: fits no rung; there may be: fp32, w8a32, w8a8",
        ),
        (
            {"ladder": "auto", "auto": {**AUTO, "rungs": {"*": {"teacher": "none", "epochs": 0}}}},
            r"^auto\.rungs\.fp32\.epochs: 0 imports",
        ),
    ],
)
def test_a_mistaken_automatic_ladder_is_refused(tiny, changes, error):
    with pytest.raises(ConfigError, match=error):
        tiny(**changes)


def test_a_mistake_of_every_rung_is_said_once(tiny):
    with pytest.raises(ConfigError) as caught:
        tiny(ladder="auto", auto=AUTO, distill={"loss": "klr"})
    assert len([line for line in caught.value.errors if "klr" in line]) == 1


# -- plans ----------------------------------------------------------------------------------------


class Recorded:
    """A record of which only the accuracy is looked at."""

    def __init__(self, top1):
        self.metrics = {"val_top1": top1}


def planned(config, values):
    """The plan when the stages so far have come to these accuracies."""
    coming = iter(values)
    return plan_so_far(config, lambda key: next((Recorded(v) for v in coming), None))


VALUES = [0.99, 0.98, 0.97, 0.70, 0.95, 0.90]  # w3a3 comes between, then w2a2 again


def test_its_stages_are_those_of_a_list_with_the_same_rungs(tiny):
    plan = planned(tiny(ladder="auto", auto=AUTO), VALUES)
    assert [s.name for s in plan.stages][3:] == ["w2a2", "w3a3", "w2a2-2"]
    rungs = [{"weight_bits": b, "activation_bits": b} for b in (32, 8, 4, 3, 2)]
    listed = {stage.key for stage in make_plan(tiny(ladder=rungs)).stages}
    assert listed == {s.key for s in plan.stages if s.name != "w2a2"}
    straight = {stage.key for stage in make_plan(tiny(ladder=[*rungs[:3], rungs[4]])).stages}
    assert straight == {s.key for s in plan.stages[:4]}


def test_dense_teachers_are_the_rungs_that_were_kept(tiny):
    plan = planned(tiny(ladder="auto", auto=AUTO, distill={"teacher": "dense"}), VALUES)
    assert plan.stages[-1].teacher == "fp32, w8a8, w4a4, w3a3"


def test_a_teacher_s_name_means_the_try_that_was_kept(tiny):
    rungs = {"w1a2": {"teacher": ["previous", "w2a2"]}, "w2*": {"teacher": ["fp32", "previous"]}}
    auto = {**AUTO, "weight_bits": 1, "rungs": rungs}
    plan = planned(tiny(ladder="auto", auto=auto), [*VALUES[:5], 0.75])  # 0.2 below w3a3
    found = {stage.name: stage.teacher for stage in plan.stages}
    assert found == {
        "fp32": None,
        "w8a8": "fp32",
        "w4a4": "w8a8",
        "w2a2": "fp32, w4a4",
        "w3a3": "w4a4",
        "w2a2-2": "fp32, w3a3",
        "w2a3": "fp32, w3a3",
    }
    plan = planned(tiny(ladder="auto", auto=auto), VALUES)
    assert plan.stages[-1].name == "w1a2"
    assert plan.stages[-1].teacher == "w2a2-2"  # not the first try, which was not kept


def test_a_teacher_that_only_comes_where_a_step_loses_much_is_refused(tiny):
    with pytest.raises(ConfigError) as caught:
        tiny(ladder="auto", auto={**AUTO, "rungs": {"w2a2": {"teacher": ["w3a3", "w4a4"]}}})
    (error,) = caught.value.errors
    assert error.startswith("auto.rungs.w2a2.distill.teacher: 'w3a3' may not come")
    assert error.endswith("those that always come are fp32, w8a8, w4a4, w2a2")


def test_a_run_keeps_its_id_while_it_grows_and_has_another_for_other_rules(tiny):
    config = tiny(ladder="auto", auto=AUTO)
    plans = [planned(config, VALUES[:known]) for known in range(len(VALUES) + 1)]
    assert len({plan.run for plan in plans}) == 1
    assert [plan.complete for plan in plans] == [False] * len(VALUES) + [True]
    for before, after in pairwise(plans):
        assert after.stages[: len(before.stages)] == before.stages
    others = [{**AUTO, "budget": 0.3}, {**AUTO, "rungs": {"w3a3": {"epochs": 9}}}]
    runs = {planned(tiny(ladder="auto", auto=auto), []).run for auto in others}
    assert len(runs | {plans[0].run}) == 3


# -- runs -----------------------------------------------------------------------------------------

# The rung of 2 bits starts from 4 with a step too small to learn anything with: 3 comes between.
RUNGS = {"w2a2": {"epochs": 1, "train": {"optimizer": {"lr": 1e-9}, "batch_norm_batches": 0}}}
GROWING = {
    "ladder": "auto",
    "auto": {**AUTO, "step_budget": 0.02, "budget": 1.0, "insertions": 1, "rungs": RUNGS},
}


def hashes(records):
    return [record.sha256 for record in records]


class KilledError(BaseException):
    """Stands for a kill: nothing is left to do anything about it."""


@pytest.fixture
def whole(tiny, run, tmp_path):
    return hashes(run(tiny(**GROWING), Store(tmp_path / "whole")))


def test_it_runs_what_it_plans_and_reports_what_it_did_and_why(tiny, store, run, events):
    records = run(tiny(**GROWING), store, events)
    assert events.trained == ["fp32", "w8a8", "w4a4", "w2a2", "w3a3", "w2a2-2"]
    frame = accuracy_report(store)
    assert list(frame["stage"]) == events.trained
    assert list(frame["val_top1"]) == [record.metrics["val_top1"] for record in records]
    notes = dict(zip(frame["stage"], frame["note"], strict=True))
    assert "w3a3 comes between" in notes["w2a2"]
    assert "put between w4a4 and w2a2" in notes["w3a3"]
    assert "the ladder ends: the target w2a2 is reached" in notes["w2a2-2"]
    for form in ("table", "markdown", "html", "csv", "json"):
        assert notes["w3a3"] in render(frame, form).decode()
    again = run(tiny(**GROWING), Store(store.root), events)
    assert len(events.trained) == 6
    assert hashes(again) == hashes(records)
    assert [e.stages for e in events if e.kind == "started"] == [0] * 6
    assert {e.stages for e in events if e.kind == "reused"} == {6}


MOMENTS = [
    (1, "started"),
    (1, "finished"),
    (2, "message"),
    (2, "reused"),
    (3, "message"),
    (4, "finished"),
    (5, "started"),
    (5, "message"),
]


def test_a_growing_ladder_killed_at_any_moment_ends_as_if_it_had_not_been(tiny, store, run, whole):
    config = tiny(**GROWING)
    for position, moment in MOMENTS:

        def kill(event, position=position, moment=moment):
            if (event.position, event.kind) == (position, moment):
                raise KilledError

        with pytest.raises(KilledError):
            run(config, Store(store.root), kill)
        assert len(store.run().stages) in (position + 1, position + 2)
    assert hashes(run(config, Store(store.root))) == whole
    assert len(list(store.reports.iterdir())) == 1


def test_between_two_rungs_a_run_is_not_over_though_all_of_it_is_done(tiny, store, run):
    def kill(event):
        if (event.position, event.kind) == (1, "finished"):
            raise KilledError

    with pytest.raises(KilledError):
        run(tiny(**GROWING), store, kill)
    found = store.run()
    assert {store.state(str(stage["key"]))[0] for stage in found.stages} == {"done"}
    assert not is_over(found, store.read)
    run(tiny(**GROWING), store)
    assert is_over(store.run(), store.read)


def test_a_damaged_rung_is_redone_and_what_follows_from_it_stays_registered(tiny, store, run):
    records = run(tiny(**GROWING), store)
    path = store.stages / records[1].key / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    ladder = open_ladder(tiny(**GROWING), Store(store.root))
    assert [stage.name for stage in ladder.plan.stages] == ["fp32", "w8a8"]
    assert [stage["key"] for stage in store.run().stages] == [record.key for record in records]
    assert hashes(run(tiny(**GROWING), Store(store.root))) == hashes(records)


def cli(*words, **options):
    command = [sys.executable, "-m", "bitladder.flows", *words, "--runner", "plain"]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def test_a_kill_and_bitladder_resume_give_what_an_uninterrupted_run_gives(tiny, tmp_path, whole):
    (tmp_path / "auto.yaml").write_text(yaml.safe_dump(tiny(**GROWING).model_dump(mode="json")))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    first = cli("run", "auto.yaml", cwd=tmp_path, env=environment)
    store, deadline = Store(tmp_path / "artifacts"), time.monotonic() + 120
    while len(store.keys()) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    assert 4 <= len(store.keys()) < 9
    out, err = cli("resume", cwd=tmp_path, env=environment).communicate()
    assert "w3a3 comes between" in out, err
    found = Store(tmp_path / "artifacts")
    assert hashes(found.find(str(stage["key"])) for stage in found.run().stages) == whole

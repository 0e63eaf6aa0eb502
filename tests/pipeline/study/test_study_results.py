import pytest
from bitladder.pipeline.study import results
from bitladder.pipeline.study.results import COLUMNS

ARMS = {"ladder": {}, "direct": {"only": ["fp32", "w1a2"]}}


def of(frame, arm, seed=0):
    rows = frame[(frame["arm"] == arm) & (frame["seed"] == seed)]
    return rows.set_index("stage")


def test_there_is_a_row_per_trial_and_stage_in_their_order(study, store):
    frame = results(study(arms=ARMS), store)
    assert tuple(frame.columns) == COLUMNS
    assert list(frame["arm"]) == ["ladder"] * 8 + ["direct"] * 4
    assert list(frame["stage"][:4]) == ["fp32", "w4a8", "w2a2", "w1a2"]
    assert list(frame["seed"]) == [0] * 4 + [1] * 4 + [0] * 2 + [1] * 2
    assert set(frame["state"]) == {"to do"}
    assert frame["test_top1"].isna().all()
    assert list(frame["weight_bits"][:4]) == [32, 4, 2, 1]
    assert not store.root.exists()


def test_a_stage_that_arms_share_is_done_in_all_of_them(study, store, finish):
    made = study(arms=ARMS)
    finish(made.trials[0], "fp32", 0.9, val=0.8)
    frame = results(made, store)
    assert list(of(frame, "ladder")["state"]) == ["done", "to do", "to do", "to do"]
    assert of(frame, "direct").loc["fp32", "test_top1"] == 0.9
    assert of(frame, "direct").loc["fp32", "val_top1"] == 0.8
    assert of(frame, "direct", seed=1).loc["fp32", "state"] == "to do"
    assert set(of(frame, "ladder")["fp32_top1"]) == {0.9}


def test_costs_are_summed_over_the_quantized_rungs_up_to_a_stage(study, store, finish):
    made = study(arms=ARMS)
    for stage in ("fp32", "w4a8", "w2a2"):
        finish(made.trials[0], stage, 0.9, seconds=2.5)
    ladder = of(results(made, store), "ladder")
    assert list(ladder["epochs"]) == [0, 1, 4, 9]
    assert list(ladder["teacher_forwards"]) == [0, 1, 4, 9]
    assert list(ladder["seconds"][:3]) == [0.0, 2.5, 5.0]
    assert ladder["seconds"].isna().tolist() == [False, False, False, True]


def test_a_stage_costs_what_it_rests_on_and_the_same_in_every_arm(study, store, finish):
    each = {name: {"init": "fp32"} for name in ("w4a8", "w2a2", "w1a2")}
    alone = {"set": {"distill": {"teacher": "none"}}}
    made = study(
        arms={"each": {**alone, "rungs": each}, "direct": {**alone, **ARMS["direct"]}}, seeds=1
    )
    for trial in made.trials:
        for stage in trial.plan.stages:
            finish(trial, stage.name, 0.9, seconds=2.5)
    frame = results(made, store)
    each, direct = of(frame, "each"), of(frame, "direct")
    assert each.loc["w1a2", "key"] == direct.loc["w1a2", "key"]
    assert list(each["epochs"]) == [0, 1, 3, 5]
    assert list(each["seconds"]) == [0.0, 2.5, 2.5, 2.5]
    assert list(each["teacher_forwards"]) == [0, 0, 0, 0]
    assert direct.loc["w1a2", "epochs"] == 5
    assert (set(each["trial_epochs"]), set(direct["trial_epochs"])) == ({9}, {5})


@pytest.mark.parametrize(
    ("distill", "forwards"),
    [
        ({"teacher": "none"}, [0, 0, 0, 0]),
        ({"teacher": "fp32"}, [0, 1, 4, 9]),
        ({"teacher": "dense"}, [0, 1, 1 + 2 * 3, 7 + 3 * 5]),
        ({"teacher": "dense", "drop": 1}, [0, 1, 1 + 3, 4 + 2 * 5]),
        ({"teacher": "best"}, [0, 1, 4, 9]),
    ],
)
def test_each_teacher_of_an_epoch_counts(study, store, distill, forwards):
    made = study(arms={"ladder": {"set": {"distill": distill}}}, seeds=1)
    assert list(results(made, store)["teacher_forwards"]) == forwards


def test_a_diverged_stage_and_all_below_it_count_as_chance(study, store, finish):
    made = study(arms=ARMS)
    finish(made.trials[0], "fp32", 0.9)
    finish(made.trials[0], "w4a8", 0.89)
    store.fail(made.trials[0].plan.stages[2].key, "the loss is nan", diverged=True)
    ladder = of(results(made, store), "ladder")
    assert list(ladder["state"]) == ["done", "done", "diverged", "diverged"]
    assert list(ladder["test_top1"]) == [0.9, 0.89, 0.1, 0.1]
    assert list(ladder["val_top1"][2:]) == [0.1, 0.1]
    assert list(ladder["diverged_at"][2:]) == ["w2a2", "w2a2"]
    assert ladder.loc["w2a2", "error"] == "the loss is nan"
    assert list(ladder["test_images"]) == [360] * 4
    assert of(results(made, store), "direct").loc["w1a2", "state"] == "to do"


def test_a_stage_that_does_not_rest_on_the_diverged_one_keeps_what_it_has(study, store, finish):
    each = {name: {"init": "fp32"} for name in ("w4a8", "w2a2", "w1a2")}
    alone = {"set": {"distill": {"teacher": "none"}}}
    arms = {"each": {**alone, "rungs": each}, "direct": {**alone, **ARMS["direct"]}}
    made = study(arms=arms, seeds=1)
    finish(made.trials[0], "fp32", 0.9)
    store.fail(made.trials[0].plan.stages[1].key, "the loss is nan", diverged=True)
    assert list(of(results(made, store), "each")["test_top1"]) == [0.9, 0.1, 0.1, 0.1]
    finish(made.trials[1], "w1a2", 0.7)  # the same stage, by the other arm
    found = of(results(made, store), "each")
    assert list(found["test_top1"]) == [0.9, 0.1, 0.1, 0.7]
    assert list(found["state"]) == ["done", "diverged", "diverged", "done"]


def test_a_first_stage_that_diverged_has_the_chance_of_its_data(study, store):
    made = study(arms=ARMS, seeds=1)
    store.fail(made.trials[0].plan.stages[0].key, "the loss is inf", diverged=True)
    frame = results(made, store)
    assert set(frame["state"]) == {"diverged"}  # the arms share it
    assert set(frame["test_top1"]) == {0.1}


def test_a_stage_that_failed_otherwise_has_no_value(study, store, finish):
    made = study(arms=ARMS)
    finish(made.trials[0], "fp32", 0.9)
    store.fail(made.trials[0].plan.stages[1].key, "no space left")
    ladder = of(results(made, store), "ladder")
    assert list(ladder["state"]) == ["done", "failed", "to do", "to do"]
    assert ladder.loc["w4a8", "error"] == "no space left"
    assert ladder["test_top1"].isna().tolist() == [False, True, True, True]


def test_a_stage_that_really_ran_is_found(study, store, run):
    made = study(arms={"one": {"only": ["fp32"], "rungs": {"fp32": {"epochs": 1}}}}, seeds=1)
    (record,) = run(made.trials[0].config, store)
    (row,) = results(made, store).to_dict("records")
    assert row["state"] == "done"
    assert row["test_top1"] == record.metrics["test_top1"]
    assert (row["test_images"], row["key"]) == (360, record.key)

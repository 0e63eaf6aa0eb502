import json
import pickle

import pytest
from bitladder.pipeline.config_load import load_config
from bitladder.pipeline.errors import ConfigError
from bitladder.pipeline.plan import make_plan
from bitladder.pipeline.study import load_study

LADDER = {"ladder": {}}


def configs(study):
    return {trial.arm: trial.config for trial in reversed(study.trials)}  # of the first seed


def rungs(config):
    return [(stage.name, stage.train.epochs, stage.init) for stage in config.ladder]


def mistakes(make, **sections):
    with pytest.raises(ConfigError) as caught:
        make(**sections)
    return caught.value.errors


def test_trials_come_arm_by_arm_and_in_each_seed_by_seed(study):
    made = study(arms={"ladder": {}, "direct": {"only": ["fp32", "w2a2"]}}, seeds=[4, 7])
    assert [(t.arm, t.seed, t.fold) for t in made.trials] == [
        ("ladder", 4, None),
        ("ladder", 7, None),
        ("direct", 4, None),
        ("direct", 7, None),
    ]
    assert [t.config.seed for t in made.trials] == [4, 7, 4, 7]
    assert made.trials[1].name == "ladder, seed 7"


def test_folds_make_a_trial_of_each(study):
    made = study(arms=LADDER, seeds=1, folds=3)
    assert [t.fold for t in made.trials] == [0, 1, 2]
    assert [t.config.data.options for t in made.trials] == [
        {"fold": fold, "folds": 3} for fold in range(3)
    ]
    assert len({t.plan.stages[0].key for t in made.trials}) == 3
    assert made.trials[2].name == "ladder, seed 0, fold 2"


def test_an_arm_without_changes_is_the_base(study):
    made = study(base="digits", arms=LADDER, seeds=[0])
    keys = [stage.key for stage in made.trials[0].plan.stages]
    assert keys == [stage.key for stage in make_plan(load_config("digits")).stages]


def test_arms_with_a_common_prefix_share_its_stages(study):
    made = study(
        arms={
            "ladder": {},
            "last": {"rungs": {"w1a2": {"epochs": 6}}},
            "direct": {"only": ["fp32", "w1a2"]},
        },
        seeds=2,
    )
    keys = {stage.key for trial in made.trials for stage in trial.plan.stages}
    assert len(keys) == 2 * (4 + 1 + 1)


def test_another_last_rung_changes_only_its_own_key(study):
    before = study(arms=LADDER).trials[0].plan.stages
    after = study(arms=LADDER, rungs={"w1a2": {"epochs": 9}}).trials[0].plan.stages
    assert [a.key == b.key for a, b in zip(before, after, strict=True)] == [True, True, True, False]


def test_what_is_set_stands_over_the_base_and_under_a_rungs_own_words(study):
    made = study(
        arms={"ladder": {"set": {"train": {"epochs": 7, "schedule": "linear"}}}},
        set={"train": {"optimizer": {"lr": 0.5}}, "data": {"batch_size": 64}},
    )
    config = configs(made)["ladder"]
    assert [stage.train.epochs for stage in config.ladder] == [9, 7, 3, 5]
    assert {stage.train.optimizer.lr for stage in config.ladder} == {0.5}
    assert {stage.train.schedule.name for stage in config.ladder} == {"linear"}
    assert config.data.batch_size == 64


def test_a_rung_is_changed_by_name_over_its_own_words(study):
    change = {"w2a2": {"teacher": "fp32", "quantizer": "dorefa"}, "w1a2": {"epochs": 8}}
    config = configs(study(arms={"ladder": {"rungs": change}}))["ladder"]
    assert [stage.train.epochs for stage in config.ladder] == [9, 1, 3, 8]
    assert [s.distill.teacher for s in config.ladder] == [
        "previous",
        "previous",
        "fp32",
        "previous",
    ]
    assert config.ladder[2].quantizer.weight.name == "dorefa"


def test_a_ladder_in_an_arm_takes_rungs_of_the_base_by_name_and_new_ones(study):
    new = {"name": "w2a1", "weight_bits": 2, "activation_bits": 1, "epochs": 2}
    ladder = ["fp32", "w2a2", new, "w1a2"]
    config = configs(study(arms={"two-steps": {"ladder": ladder}}))["two-steps"]
    assert rungs(config) == [
        ("fp32", 9, "previous"),
        ("w2a2", 3, "previous"),
        ("w2a1", 2, "previous"),
        ("w1a2", 5, "previous"),
    ]


def test_each_width_alone_can_share_one_budget(study):
    portfolio = {
        "set": {"total_epochs": 12},
        "rungs": {n: {"epochs": None, "init": "fp32", "teacher": "none"} for n in ("w2a2", "w1a2")},
        "only": ["fp32", "w2a2", "w1a2"],
    }
    own = {name: {"epochs": 2} for name in ("w4a8", "w2a2", "w1a2")}
    config = configs(study(arms={"portfolio": portfolio}, rungs=own))["portfolio"]
    assert sum(stage.train.epochs for stage in config.ladder[1:]) == 12
    assert [stage.init for stage in config.ladder[1:]] == ["fp32", "fp32"]


def test_equal_compute_is_the_last_rung_for_as_long_as_the_ladder(study):
    made = study(arms={"ladder": {}, "long": {"control": "equal_compute", "of": "ladder"}})
    long, ladder = configs(made)["long"], configs(made)["ladder"]
    assert rungs(long) == [("fp32", 9, "previous"), ("w1a2", 1 + 3 + 5, "fp32")]
    assert long.ladder[1].distill.teacher == "none"
    assert long.ladder[1].quantizer == ladder.ladder[3].quantizer
    assert long.ladder[1].train.optimizer == ladder.ladder[3].train.optimizer
    assert made.trials[0].plan.stages[0].key == made.trials[2].plan.stages[0].key


def test_a_control_may_stand_for_a_rung_on_the_way(study):
    long = {"control": "equal_compute", "of": "ladder", "stage": "w2a2"}
    made = study(arms={"ladder": {}, "long": long})
    assert rungs(configs(made)["long"]) == [("fp32", 9, "previous"), ("w2a2", 4, "fp32")]


def test_a_control_has_the_teacher_that_is_set_for_it(study):
    long = {"control": "equal_compute", "of": "ladder", "set": {"distill": {"teacher": "fp32"}}}
    made = study(arms={"ladder": {}, "long": long})
    assert configs(made)["long"].ladder[1].distill.teacher == "fp32"


def test_what_is_set_for_a_control_goes_over_the_settings_of_its_rung(study):
    words = {"train": {"optimizer": "adam"}, "quantizer": "dorefa"}
    long = {"control": "equal_compute", "of": "ladder", "set": words}
    config = configs(study(arms={"ladder": {}, "long": long}))["long"]
    assert config.ladder[1].train.optimizer.name == "adam"
    assert config.ladder[1].train.optimizer.lr == 0.1
    assert config.ladder[1].train.epochs == 9
    assert config.ladder[1].quantizer.activation.name == "dorefa"
    assert config.ladder[0] == configs(study(arms=LADDER))["ladder"].ladder[0]


def test_restarts_are_fresh_starts_of_one_width_at_the_ladders_steps(study):
    made = study(arms={"ladder": {}, "again": {"control": "restarts", "of": "ladder"}})
    config = configs(made)["again"]
    assert rungs(config) == [
        ("fp32", 9, "previous"),
        ("w1a2-part-1", 1, "fp32"),
        ("w1a2-part-2", 3, "previous"),
        ("w1a2", 5, "previous"),
    ]
    assert {(s.weight_bits, s.activation_bits) for s in config.ladder[1:]} == {(1, 2)}
    assert {s.distill.teacher for s in config.ladder[1:]} == {"none"}


def test_a_control_of_a_changed_arm_has_that_arms_settings(study):
    arms = {
        "ladder": {},
        "wide": {"set": {"train": {"optimizer": {"lr": 0.9}}}, "only": ["fp32", "w4a8", "w2a2"]},
        "long": {"control": "equal_compute", "of": "wide"},
    }
    config = configs(study(arms=arms))["long"]
    assert rungs(config)[1] == ("w2a2", 4, "fp32")
    assert config.ladder[1].train.optimizer.lr == 0.9


EACH = {name: {"init": "fp32"} for name in ("w4a8", "w2a2", "w1a2")}
SMALL = {"name": "tiny_convnet", "width": 4}


def control_of(make, kind, ladder, **arm):
    arms = {"ladder": ladder, "control": {"control": kind, "of": "ladder", **arm}}
    return configs(make(arms=arms))["control"]


@pytest.mark.parametrize(("teacher", "epochs"), [("none", 5), ("fp32", 5), ("previous", 1 + 3 + 5)])
def test_a_control_counts_the_rungs_that_its_own_one_rests_on(study, teacher, epochs):
    ladder = {"set": {"distill": {"teacher": teacher}}, "rungs": EACH}
    own = {"distill": {"teacher": "fp32"}, "bin_regularization": {"weight": 1.0}}  # or it is ladder
    config = control_of(study, "equal_compute", ladder, set=own)
    assert rungs(config) == [("fp32", 9, "previous"), ("w1a2", epochs, "fp32")]


def test_a_control_leaves_out_what_only_a_teacher_can_give(study):
    features = {"name": "attention_transfer", "layers": ["act1"]}
    teachers = {"teacher": "dense", "drop": 1, "features": features}
    config = control_of(study, "equal_compute", {"set": {"distill": teachers}})
    assert config.ladder[-1].distill.teacher == "none"
    assert config.ladder[-1].distill.features is None


@pytest.mark.parametrize("kind", ["equal_compute", "restarts"])
def test_a_control_starts_from_the_full_precision_rung_that_the_ladder_starts_from(study, kind):
    more = {"name": "more", "weight_bits": 32, "activation_bits": 32, "epochs": 2}
    config = control_of(study, kind, {"ladder": ["fp32", more, "w4a8", "w2a2"]})
    assert [(name, init) for name, _, init in rungs(config)[:2]] == [
        ("fp32", "previous"),
        ("more", "previous"),
    ]
    assert rungs(config)[2][2] == "more"


def test_a_control_of_a_smaller_network_starts_from_that_networks_own_rung(study):
    wide = {"weight_bits": 32, "activation_bits": 32}
    small = {**wide, "model": SMALL, "init": "scratch"}
    ladder = [
        {**wide, "name": "big", "epochs": 9},
        {**small, "name": "small", "teacher": "big", "epochs": 4},
        {**small, "name": "four", "weight_bits": 4, "activation_bits": 4, "init": "small"},
        {**small, "name": "two", "weight_bits": 2, "activation_bits": 2, "init": "four"},
    ]
    config = control_of(study, "equal_compute", {"ladder": ladder})
    assert rungs(config) == [("big", 9, "previous"), ("small", 4, "scratch"), ("two", 2, "small")]
    assert config.ladder[1].distill.teacher == "big"
    assert config.ladder[2].model == config.ladder[1].model


def test_a_control_of_a_ladder_without_full_precision_starts_as_that_does(study):
    ladder = {"only": ["w4a8", "w2a2"], "rungs": {"w4a8": {"init": "scratch"}}}
    config = control_of(study, "restarts", ladder)
    assert rungs(config) == [("w2a2-part-1", 1, "scratch"), ("w2a2", 3, "previous")]


def test_epochs_of_another_network_are_not_added_up(study):
    small = {"weight_bits": 2, "activation_bits": 2, "model": SMALL, "init": "scratch"}
    ladder = {"ladder": ["fp32", "w4a8", {**small, "name": "small", "teacher": "w4a8"}]}
    long = {"control": "equal_compute", "of": "ladder"}
    (error,) = mistakes(study, arms={"ladder": ladder, "long": long})
    assert error.startswith("arms.long.stage: rests on quantized rungs of another network (w4a8)")


def test_the_id_is_of_what_is_trained_and_not_of_how_it_is_written(study):
    arms = {"ladder": {}, "direct": {"only": ["fp32", "w1a2"]}}
    plain = study(arms=arms, seeds=2)
    family = {"claim": [{"arm": "ladder", "against": "direct"}]}
    assert plain.id == study(arms=arms, seeds=[0, 1], families=family).id
    assert plain.id.startswith("small-")
    assert len({plain.id, study(arms=arms, seeds=3).id, study(arms=LADDER).id}) == 3


def test_settings_on_the_command_line_are_of_the_study(study):
    made = study(["seeds=1", "set.train.epochs=4"], arms=LADDER)
    assert len(made.trials) == 1
    assert made.trials[0].config.ladder[1].train.epochs == 4


def test_a_base_is_a_file_beside_the_study(tmp_path):
    base = {"name": "b", "ladder": [{"weight_bits": 8, "activation_bits": 8}]}
    (tmp_path / "base.yaml").write_text(json.dumps(base))
    path = tmp_path / "s.yaml"
    path.write_text("{name: s, base: base.yaml, seeds: 1, arms: {one: {}}}")
    assert [s.name for s in load_study(path).trials[0].config.ladder] == ["w8a8"]


def test_comparisons_are_of_the_last_rungs_unless_a_stage_is_named(study):
    made = study(
        arms={"ladder": {}, "short": {"only": ["fp32", "w2a2"]}},
        families={
            "a": [{"arm": "ladder", "against": "short"}],
            "b": [{"arm": "ladder", "against": "short", "stage": "w2a2"}],
            "c": [{"arm": "ladder", "against": "short", "stage": "w1a2", "against_stage": "w2a2"}],
        },
    )
    assert [(c.family, c.stage, c.against_stage) for c in made.comparisons] == [
        ("a", "w1a2", "w2a2"),
        ("b", "w2a2", "w2a2"),
        ("c", "w1a2", "w2a2"),
    ]


def test_a_trial_goes_through_a_pipe(study):
    trial = study(arms=LADDER).trials[0]
    again = pickle.loads(pickle.dumps(trial))
    assert again == trial
    assert again.plan == trial.plan


def test_every_mistake_of_a_study_is_told_at_once_with_its_path(study):
    errors = mistakes(
        study,
        seeds=0,
        arms={
            "ladder": {},
            "typo": {"sett": {}},
            "lr": {"set": {"train": {"optimizer": {"lr": -1}}}},
            "rung": {"rungs": {"w3a3": {"epochs": 1}}},
            "inside": {"rungs": {"w2a2": {"epochs": -1}}},
            "only": {"only": ["fp16"]},
            "seeded": {"set": {"seed": 3}},
            "long": {"control": "equal_compute", "of": "nobody"},
            "free": {"control": "restarts", "of": "ladder", "set": {"train": {"epochs": 1}}},
            "later": {"of": "ladder"},
        },
        families={
            "claim": [
                {"arm": "ladder", "against": "ladder"},
                {"arm": "ladder", "against": "nobody"},
                {"arm": "ladder", "against": "later", "stage": "w7a7"},
                {"arm": "ladder"},
            ],
            "empty": [],
        },
        choose={"among": ["ladder"]},
    )
    for start in (
        "seeds: must be at least 1",
        "arms.typo.sett: unknown key",
        "arms.lr.set.train.optimizer.lr: ",
        "arms.rung.rungs.w3a3: unknown rung",
        "arms.inside.rungs.w2a2.train.epochs: ",
        "arms.only.only: unknown rung 'fp16'",
        "arms.seeded.set.seed: ",
        "arms.long.of: 'nobody' is no arm",
        "arms.free.set.train.epochs: ",
        "arms.later.of: is for controls",
        "families.claim.0.against: 'ladder' is compared with itself",
        "families.claim.1.against: unknown arm 'nobody'",
        "families.claim.2.stage: unknown rung of 'ladder'",
        "families.claim.3.against: is missing",
        "families.empty: ",
        "choose.among: ",
    ):
        assert any(error.startswith(start) for error in errors), (start, errors)


@pytest.mark.parametrize(
    ("sections", "start"),
    [
        ({"base": "digitz"}, "base: unknown config 'digitz'"),
        ({"base": {"ladder": []}}, "base: ladder: has no stage"),
        ({"set": {"model": {"name": "nothing"}}}, "set.model: "),
        ({"set": {"ladder": []}}, "set.ladder: "),
        ({"seeds": []}, "seeds: has none"),
        ({"seeds": [1, 1]}, "seeds: one stands there twice"),
        ({"seeds": [-1]}, "seeds.0: "),
        ({"folds": 1}, "folds: "),
        ({"arms": {}}, "arms: has no arm"),
        ({"name": "a b"}, "name: "),
        ({"set": {"data": {"fold": 1}}, "folds": 5}, "folds: arm 'ladder' has data.fold"),
        ({"arms": {"ladder": {"control": "longer", "of": "x"}}}, "arms.ladder.control: "),
        (
            {"arms": {**LADDER, "c": {"control": "restarts", "of": "ladder", "set": {"seed": 1}}}},
            "arms.c.set.seed: ",
        ),
        (
            {"arms": {**LADDER, "c": {"control": "restarts", "of": "ladder", "stage": "fp32"}}},
            "arms.c.stage: 'fp32' is full precision",
        ),
        ({"base": {"ladder": "auto", "name": "x"}}, "base: ladder: 'auto' finds its rungs"),
    ],
)
def test_a_mistake_has_its_path(study, sections, start):
    errors = mistakes(study, **{"arms": LADDER, **sections})
    assert any(error.startswith(start) for error in errors), errors


def test_folds_of_data_that_have_none_are_refused(study):
    data = {"data": {"name": "fashion_mnist", "batch_size": 8}}
    (error,) = mistakes(study, arms=LADDER, set=data, folds=5)
    assert error.startswith("folds: data set 'fashion_mnist' has no option fold")
    assert "digits" in error


def test_two_arms_that_train_the_same_are_refused(study):
    (error,) = mistakes(study, arms={"ladder": {}, "again": {"set": {"train": {"epochs": 1}}}})
    assert error.startswith("arms.again: trains the same stages as arms.ladder (fp32, w4a8")


def test_a_comparison_of_one_and_the_same_stage_is_refused(study):
    same = [{"arm": "ladder", "against": "direct", "stage": "fp32"}]
    arms = {"ladder": {}, "direct": {"only": ["fp32", "w1a2"]}}
    (error,) = mistakes(study, arms=arms, families={"claim": same})
    assert "are the same stage" in error


def test_a_control_of_a_control_is_refused(study):
    long = {"control": "equal_compute", "of": "ladder"}
    arms = {"ladder": {}, "long": long, "longer": {**long, "of": "long"}}
    (error,) = mistakes(study, arms=arms)
    assert error.startswith("arms.longer.of: 'long' is a control itself")


def test_a_study_that_does_not_exist_is_told_with_those_that_do():
    with pytest.raises(ConfigError, match="unknown study 'nothing'"):
        load_study("nothing")


def test_a_folder_of_its_name_does_not_hide_a_shipped_study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "averaging").mkdir()
    assert load_study("averaging").name == "averaging"

from dataclasses import replace

import pytest
from bitladder.pipeline.config_load import parse_config
from bitladder.pipeline.errors import ConfigError
from bitladder.pipeline.parents import Parents, parents_of, teachers_among
from bitladder.pipeline.plan import make_plan
from bitladder.pipeline.record import StageRecord
from bitladder.pipeline.spec import StageSpec

FP32 = {"weight_bits": 32, "activation_bits": 32}
W8 = {"weight_bits": 8, "activation_bits": 8}
W4 = {"weight_bits": 4, "activation_bits": 4}
W2 = {"weight_bits": 2, "activation_bits": 2}
WIDE = {"name": "tiny_convnet", "width": 16}


def last(tiny, *rungs, **changes):
    """What the last of the rungs stands on, by name."""
    config = tiny(ladder=list(rungs), **changes)
    found = parents_of(config, len(rungs) - 1)
    names = [stage.name for stage in config.ladder]
    init = None if found.init is None else names[found.init]
    return init, [names[position] for position in found.teachers], found.chooses


def errors_of(tiny, *rungs, **changes):
    with pytest.raises(ConfigError) as caught:
        tiny(ladder=list(rungs), **changes)
    return caught.value.errors


@pytest.mark.parametrize(
    ("teacher", "teachers", "chooses"),
    [
        ("previous", ["w4a4"], False),
        ("fp32", ["fp32"], False),
        ("dense", ["fp32", "w8a8", "w4a4"], False),
        ("best", ["fp32", "w8a8", "w4a4"], True),
        ("none", [], False),
        ("w8a8", ["w8a8"], False),
        (["w4a4", "fp32"], ["fp32", "w4a4"], False),
        (["previous", "w4a4"], ["w4a4"], False),
    ],
)
def test_a_rung_has_the_teachers_that_it_names(tiny, teacher, teachers, chooses):
    found = last(tiny, FP32, W8, W4, {**W2, "teacher": teacher})
    assert found == ("w4a4", teachers, chooses)


def test_the_default_of_all_rungs_may_be_any_teacher(tiny):
    stages = make_plan(tiny(ladder=[FP32, W8, W4], distill={"teacher": "dense"})).stages
    assert [stage.teacher for stage in stages] == [None, "fp32", "fp32, w8a8"]


@pytest.mark.parametrize(
    ("init", "parent"), [("previous", "w8a8"), ("fp32", "fp32"), ("scratch", None), ("w8a8",) * 2]
)
def test_a_rung_starts_from_the_rung_that_it_names(tiny, init, parent):
    assert last(tiny, FP32, W8, {**W4, "init": init})[0] == parent


def test_words_see_only_rungs_of_the_same_network(tiny):
    big = {**FP32, "name": "big", "model": WIDE}
    small, big4 = {**FP32, "name": "small"}, {**W4, "name": "big4", "model": WIDE}
    assert last(tiny, big, small) == (None, [], False)
    assert last(tiny, big, small, big4) == ("big", ["big"], False)
    assert last(tiny, big, small, big4, {**W2, "teacher": "fp32"}) == ("small", ["small"], False)
    assert last(tiny, big, small, big4, {**W2, "teacher": "dense"}) == ("small", ["small"], False)
    four = [big, small, W8, big4, {**W2, "teacher": "best"}]
    assert last(tiny, *four) == ("w8a8", ["small", "w8a8"], True)


def test_a_rung_of_another_network_is_a_teacher_by_its_name(tiny):
    big = {**FP32, "name": "big", "model": WIDE}
    student = {**FP32, "init": "scratch", "teacher": "big"}
    assert last(tiny, big, student) == (None, ["big"], False)
    assert last(tiny, big, student, {**W4, "teacher": ["big", "fp32"]})[1] == ["big", "fp32"]


def test_a_rung_of_another_network_called_fp32_is_no_teacher_in_silence(tiny):
    unnamed = {**FP32, "model": WIDE}  # called fp32, being the first
    (error,) = errors_of(tiny, unnamed, {**FP32, "teacher": "fp32"})
    assert error.startswith("ladder.1.teacher: 'fp32' is a rung of the same model, and")
    assert "ladder.0 of that name has another one; give it a name of its own" in error
    named = {**unnamed, "name": "big"}
    assert last(tiny, named, {**FP32, "teacher": "fp32"}) == (None, [], False)


def test_options_make_another_network_and_weights_do_not(tiny, tmp_path):
    (tmp_path / "a.pt").touch()
    same = {"name": "tiny_convnet", "weights": str(tmp_path / "a.pt")}
    assert last(tiny, {**FP32, "model": same}, W4)[0] == "fp32"
    assert last(tiny, {**FP32, "model": same}, {**W4, "model": WIDE})[0] is None


def test_a_rung_with_a_weights_file_of_its_own_starts_from_that(tiny, tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.pt").write_bytes(name.encode())
    a, b = ({"name": "tiny_convnet", "weights": str(tmp_path / f"{name}.pt")} for name in "ab")
    first = {**FP32, "name": "a", "model": a, "epochs": 0}
    second = {**FP32, "name": "b", "model": b, "epochs": 0}
    assert last(tiny, first, second)[0] is None
    assert last(tiny, first, {**W4, "model": a})[0] == "a"
    specs = [stage.spec for stage in make_plan(tiny(ladder=[first, second])).stages]
    assert specs[0].key != specs[1].key
    assert all(spec.options["weights"] for spec in specs)


@pytest.mark.parametrize(
    ("weight", "features", "distilled"),
    [
        (0.0, None, False),
        ({"start": 0.0, "final": 0.0}, None, False),
        ({"start": 0.0, "final": 0.5, "warmup": 1.0}, None, False),
        ({"start": 0.0, "final": 0.5}, None, True),
        ({"start": 0.5, "final": 0.0}, None, True),
        (0.0, {"name": "attention_transfer", "weight": 0.0, "layers": ["conv2"]}, False),
        (0.0, {"name": "attention_transfer", "layers": ["conv2"]}, True),
    ],
)
def test_a_teacher_whose_losses_never_weigh_anything_is_no_teacher(
    tiny, weight, features, distilled
):
    distill = {"weight": weight, "features": features}
    assert bool(last(tiny, FP32, W4, distill=distill)[1]) == distilled


def test_roles_say_how_many_teachers_there_are():
    assert Parents(0, (1,)).roles() == {"init": 0, "teacher": 1}
    assert Parents(None, (0, 2)).roles() == {"teacher-0": 0, "teacher-1": 2}
    assert Parents(2, (0, 1), chooses=True).roles() == {
        "init": 2,
        "candidate-0": 0,
        "candidate-1": 1,
    }


@pytest.mark.parametrize("teacher", ["fp32", "dense", "best", ["fp32"]])
def test_one_teacher_has_the_same_key_however_it_was_found(tiny, teacher):
    plain = make_plan(tiny(ladder=[FP32, W4])).stages
    other = make_plan(tiny(ladder=[FP32, {**W4, "teacher": teacher}])).stages
    assert [stage.key for stage in plain] == [stage.key for stage in other]


def test_a_loss_that_never_weighs_anything_is_not_in_the_key(tiny):
    def key(**distill):
        features = {"name": "attention_transfer", "layers": ["conv2"]}
        distill = {"features": features, **distill}
        return make_plan(tiny(ladder=[FP32, {**W4, "distill": distill}])).stages[1].key

    plain = key(weight=0.0)
    assert key(weight=0.0, temperature=4.0) == plain
    assert key(weight=0.0, loss="dist") == plain
    assert key(weight=0.1) not in (plain, key(weight=0.1, temperature=4.0))


def test_dense_best_and_each_number_of_dropped_teachers_have_keys_of_their_own(tiny):
    def key(**distill):
        return make_plan(tiny(ladder=[FP32, W8, {**W4, "distill": distill}, W2])).stages[2].key

    dense = key(teacher="dense")
    assert len({dense, key(teacher="best"), key(teacher="fp32"), key()}) == 4
    assert key(teacher="dense", drop=1) != dense
    assert key(teacher="dense", drop=2) == key(teacher="dense", drop=1)  # one is always kept


def test_the_plan_says_the_teachers_in_words(tiny):
    rungs = [FP32, W8, {**W4, "teacher": "best"}, {**W2, "teacher": ["w4a4", "w8a8"]}]
    stages = make_plan(tiny(ladder=rungs)).stages
    assert [stage.teacher for stage in stages] == [None, "fp32", "best of fp32, w8a8", "w8a8, w4a4"]
    keys = [stage.key for stage in stages]
    assert stages[2].spec.parents == {
        "init": keys[1],
        "candidate-0": keys[0],
        "candidate-1": keys[1],
    }
    assert stages[3].spec.parents == {
        "init": keys[2],
        "teacher-0": keys[1],
        "teacher-1": keys[2],
    }


def test_each_rung_has_its_own_network_in_its_key(tiny):
    big, small = {**FP32, "name": "big", "model": WIDE}, {**FP32, "teacher": "none"}
    specs = [stage.spec for stage in make_plan(tiny(ladder=[big, small])).stages]
    assert [spec.options["model"]["options"] for spec in specs] == [{"width": 16}, {}]
    alone = make_plan(tiny(ladder=[small])).stages[0]
    assert alone.key == specs[1].key
    plain = make_plan(tiny(ladder=[FP32], model=WIDE)).stages[0]
    assert plain.key == specs[0].key


def record(name, val_top1):
    return StageRecord(
        key=name,
        spec=StageSpec("train", {}, {}),
        parents={},
        files={},
        network={},
        metrics={"val_top1": val_top1},
        environment={},
        created="",
    )


def test_the_best_candidate_is_taken_and_of_equals_the_nearest():
    above = {f"candidate-{n}": record(str(n), v) for n, v in enumerate((0.7, 0.9, 0.9, 0.8))}
    (found,), chosen = teachers_among({"init": record("parent", 1.0), **above})
    assert (found.key, chosen) == ("2", True)
    worse = replace(above["candidate-2"], metrics={"val_top1": 0.1})
    assert teachers_among(above | {"candidate-2": worse})[0][0].key == "1"


def test_more_than_ten_teachers_stay_in_ladder_order():
    above = {f"teacher-{n}": record(str(n), 0.0) for n in reversed(range(12))}
    found, chosen = teachers_among(above)
    assert [teacher.key for teacher in found] == [str(n) for n in range(12)]
    assert not chosen


def test_an_unknown_teacher_lists_the_rungs_above(tiny):
    (error,) = errors_of(tiny, FP32, W8, {**W4, "teacher": "w8a4"})
    assert error.startswith("ladder.2.teacher: unknown teacher 'w8a4'; did you mean 'w8a8'")
    assert "rungs above: fp32, w8a8" in error


def test_all_mistakes_about_parents_come_at_once(tiny):
    errors = errors_of(
        tiny,
        {**FP32, "name": "best"},
        {**W8, "teacher": "w4a4", "init": "w4a4"},
        {**W4, "teacher": ["fp33", "w9a9", "dense", "w8a8", "w8a8"], "init": "fp23"},
        {**W2, "model": WIDE, "init": "w4a4", "teacher": []},
        {**W2, "name": "scratch", "model": WIDE, "init": "fp32", "teacher": "fp32"},
    )
    text = "\n".join(errors)
    for expected in (
        "ladder.0.name: 'best' has a meaning of its own",
        "ladder.1.init: 'w4a4' does not stand above this rung; rungs above: best",
        "ladder.1.teacher: 'w4a4' does not stand above this rung",
        "ladder.2.init: unknown rung to start from 'fp23'",
        "ladder.2.teacher: 'dense' stands alone",
        "ladder.2.teacher: 'w8a8' is named twice",
        "ladder.2.teacher: unknown teacher 'fp33'",
        "ladder.2.teacher: unknown teacher 'w9a9'",
        "ladder.3.init: 'w4a4' has another network",
        "give init: scratch (and teacher: w4a4",
        "ladder.3.teacher: the list is empty",
        "ladder.4.name: 'scratch' has a meaning",
        "ladder.4.init: 'fp32' needs a rung above",
        "and the same model; a rung of another model is given by its name",
    ):
        assert expected in text, text


def test_a_teacher_above_the_ladder_may_be_the_first_imported_rung(tiny, tmp_path):
    (tmp_path / "big.pt").touch()
    model = {**WIDE, "weights": str(tmp_path / "big.pt")}
    big = {**FP32, "name": "big", "model": model, "epochs": 0}
    assert last(tiny, big, FP32, W4, distill={"teacher": "big"})[1] == ["big"]


def test_an_imported_rung_names_a_file(tiny, tmp_path):
    big = {**FP32, "name": "big", "model": WIDE, "epochs": 0}
    (error,) = errors_of(tiny, FP32, big)
    assert error.startswith("ladder.1.epochs: 0 imports a trained network, and ladder.1.model.weig")
    (error,) = errors_of(tiny, FP32, {**big, "model": {**WIDE, "weights": "no.pt"}})
    assert error == "ladder.1.model.weights: no such file: no.pt"
    (tmp_path / "big.pt").touch()
    named = {**WIDE, "weights": str(tmp_path / "big.pt")}
    (error,) = errors_of(tiny, FP32, {**big, "model": named, "init": "scratch"})
    assert "take init out" in error
    assert tiny(ladder=[FP32, {**big, "model": named}])


def test_a_model_of_a_rung_may_be_one_name_and_is_checked_like_the_ladders_own(tiny):
    config = tiny(ladder=[FP32, {**FP32, "model": "preact_resnet8"}])
    assert config.ladder[1].model.name == "preact_resnet8"
    assert parse_config(config.model_dump(mode="json")) == config
    (error,) = errors_of(tiny, FP32, {**FP32, "model": {"name": "tiny_convnet", "widht": 3}})
    assert error.startswith("ladder.1.model.widht: unknown option")
    assert "ladder.1.model: " in errors_of(tiny, FP32, {**FP32, "model": "preact_resnet9"})[0]
    (error,) = errors_of(tiny, FP32, {**FP32, "model": {"width": 3}})
    assert error.startswith("ladder.1.model.name: is missing")


def test_a_teacher_that_is_neither_a_name_nor_a_list_of_names_is_refused(tiny):
    for wrong in (5, [5], {"name": "fp32"}):
        (error,) = errors_of(tiny, FP32, {**W4, "teacher": wrong})
        assert error.startswith("ladder.1.teacher: give one name, or a list of names")

import pytest
from bitladder.pipeline.config_section import Component
from bitladder.pipeline.plan import make_plan
from bitladder.pipeline.policy import choose_quantizer
from bitladder.pipeline.spec import StageSpec

RUNGS = [
    {"weight_bits": 32, "activation_bits": 32},
    {"weight_bits": 4, "activation_bits": 4},
    {"weight_bits": 2, "activation_bits": 2},
    {"weight_bits": 1, "activation_bits": 1},
]


def keys(config):
    return [stage.key for stage in make_plan(config).stages]


def test_the_same_config_gives_the_same_plan(tiny):
    assert make_plan(tiny()).run == make_plan(tiny()).run


def test_a_changed_rung_changes_its_own_key_and_those_below(tiny):
    before = keys(tiny(ladder=RUNGS))
    after = keys(tiny(ladder=[*RUNGS[:2], {**RUNGS[2], "epochs": 5}, RUNGS[3]]))
    assert before[:2] == after[:2]
    assert before[2] != after[2]
    assert before[3] != after[3]


def test_names_and_the_runtime_do_not_enter_a_key(tiny):
    named = [{**rung, "name": f"rung-{i}"} for i, rung in enumerate(RUNGS)]
    runtime = {"threads": 1, "checkpoint_seconds": 1.0}
    assert keys(tiny(ladder=RUNGS)) == keys(tiny(name="other", ladder=named, runtime=runtime))


def test_settings_without_effect_do_not_enter_a_key(tiny):
    plain = keys(tiny(ladder=RUNGS))
    assert keys(tiny(ladder=RUNGS, bin_regularization={"warmup": 0.5})) == plain
    fp32_only = tiny(ladder=RUNGS[:1], quantizer="dorefa", distill={"temperature": 4.0})
    assert keys(fp32_only) == plain[:1]


def test_every_setting_that_has_an_effect_enters_a_key(tiny):
    plain = keys(tiny(ladder=RUNGS))
    for changes in (
        {"seed": 1},
        {"data": {"name": "digits", "batch_size": 256}},
        {"data": {"name": "digits", "batch_size": 128, "fold": 1}},
        {"model": {"name": "tiny_convnet", "width": 4}},
        {"train": {"epochs": 2}},
    ):
        other = keys(tiny(ladder=RUNGS, **changes))
        assert all(a != b for a, b in zip(plain, other, strict=True)), changes
    for changes in ({"distill": {"temperature": 2.0}}, {"policy": {"first_last_bits": 4}}):
        other = keys(tiny(ladder=RUNGS, **changes))
        assert plain[0] == other[0]
        assert all(a != b for a, b in zip(plain[1:], other[1:], strict=True)), changes


def test_auto_and_the_quantizer_it_stands_for_are_the_same(tiny):
    named = [
        RUNGS[0],
        {**RUNGS[1], "quantizer": "lsq"},
        RUNGS[2],
        {**RUNGS[3], "quantizer": "uniq"},
    ]
    assert keys(tiny(ladder=RUNGS)) == keys(tiny(ladder=named))


def test_parents_and_teachers_are_those_the_config_names(tiny):
    rungs = [*RUNGS[:2], {**RUNGS[2], "init": "fp32", "teacher": "previous"}, RUNGS[3]]
    rungs[3] = {**RUNGS[3], "init": "scratch", "teacher": "fp32"}
    stages = make_plan(tiny(ladder=rungs)).stages
    assert [s.parent for s in stages] == [None, "fp32", "fp32", None]
    assert [s.teacher for s in stages] == [None, "fp32", "w4a4", "fp32"]
    assert stages[2].spec.parents == {"init": stages[0].key, "teacher": stages[1].key}


def test_a_spec_survives_json(tiny):
    spec = make_plan(tiny(ladder=RUNGS)).stages[2].spec
    assert StageSpec.from_dict(spec.as_dict()).key == spec.key


def test_freezing_the_steps_enters_a_key_without_any_lambda_too(tiny):
    frozen = tiny(ladder=RUNGS, bin_regularization={"freeze_weight_scale": True})
    assert keys(frozen)[0] == keys(tiny(ladder=RUNGS))[0]
    assert keys(frozen)[1] != keys(tiny(ladder=RUNGS))[1]


def test_a_rule_that_sets_one_bit_takes_the_method_of_one_bit(tiny):
    rung = {**RUNGS[1], "policy": {"rules": [{"match": "conv2", "weight_bits": 1}]}}
    (_, stage) = make_plan(tiny(ladder=[RUNGS[0], rung])).stages
    assert "quantizer uniq" in stage.spec.options["versions"]


def test_a_teacher_whose_loss_weighs_nothing_is_no_teacher(tiny):
    stages = make_plan(tiny(ladder=RUNGS, distill={"weight": 0.0})).stages
    assert {stage.teacher for stage in stages} == {None}


def test_the_method_that_a_wrapper_wraps_enters_the_key(tiny):
    wrapped = {"weight": {"name": "weight_norm", "method": "lcq"}, "activation": "lsq"}
    (_, stage) = make_plan(tiny(ladder=[RUNGS[0], {**RUNGS[1], "quantizer": wrapped}])).stages
    assert "quantizer lcq" in stage.spec.options["versions"]


def test_oscillation_settings_without_effect_do_not_enter_a_key(tiny):
    plain = keys(tiny(ladder=RUNGS[:2]))
    assert keys(tiny(ladder=RUNGS[:2], oscillation={"dampening": {"aggregation": "sum"}})) == plain
    tracked = {"track": True, "max_bits": 3}  # the rung has 4 bits
    assert keys(tiny(ladder=RUNGS[:2], oscillation=tracked)) == plain
    assert keys(tiny(ladder=RUNGS[:2], oscillation={"track": True}))[1] != plain[1]


def test_first_and_last_layers_enter_a_key_as_they_come_out(tiny):
    four = keys(tiny(ladder=RUNGS[:2], policy={"first_last_bits": 4}))
    halves = {"first_last_weight_bits": 4, "first_last_activation_bits": 4}
    assert keys(tiny(ladder=RUNGS[:2], policy=halves)) == four
    named = {"first_last_bits": 4, "first_last_activation": "lsq"}  # what auto is there
    assert keys(tiny(ladder=RUNGS[:2], policy=named)) == four
    assert keys(tiny(ladder=RUNGS[:2])) != four


@pytest.mark.parametrize(("bits", "method"), [(1, "uniq"), (2, "lsq"), (16, "range_linear")])
def test_auto_is_the_method_for_the_width(bits, method):
    assert choose_quantizer(Component(name="auto"), bits).name == method

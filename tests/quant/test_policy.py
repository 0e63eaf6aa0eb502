"""Which layer is quantized how."""

from __future__ import annotations

import json

import pytest
from bitladder.quant import (
    LayerPlan,
    Probe,
    QuantizerChoice,
    QuantPolicy,
    Rule,
    plan_as_dict,
    plan_from_dict,
    probe,
)
from quant_networks import Residual, images


@pytest.fixture(scope="module")
def found() -> Probe:
    return probe(Residual(), [images()])


def widths(plan: dict[str, LayerPlan]) -> dict[str, tuple[int, int]]:
    return {name: (p.weight_bits, p.activation_bits) for name, p in plan.items()}


def test_first_and_last_layer_are_at_eight_bits_and_the_rest_as_asked(found):
    plan = QuantPolicy(4, 2).resolve(found)
    assert widths(plan) == {
        "stem": (8, 8),
        "body.conv1": (4, 2),
        "body.conv2": (4, 2),
        "body.shortcut": (4, 2),
        "head": (8, 8),
    }
    assert plan["stem"].weight[0].name == "range_linear"
    assert plan["body.conv1"].weight[0].name == "lsq"


def test_the_stem_input_is_signed_and_others_as_the_probe_saw(found):
    plan = QuantPolicy(4, 4).resolve(found)
    signed = {name: p.activation[1].signed for name, p in plan.items()}
    assert signed == {
        "stem": True,
        "body.conv1": False,
        "body.conv2": True,
        "body.shortcut": False,
        "head": False,
    }
    positive = probe(Residual(), [images().abs()])
    assert QuantPolicy(4, 4).resolve(positive)["stem"].activation[1].signed


@pytest.mark.parametrize(
    ("bits", "shortcut", "want"),
    [
        ((1, 1), "same", (8, 8)),
        ((1, 2), "same", (1, 2)),
        ((2, 2), "same", (2, 2)),
        ((1, 1), 4, (4, 4)),
        ((2, 2), 32, (32, 32)),
    ],
)
def test_shortcuts_follow_the_policy_and_take_eight_bits_at_w1a1(found, bits, shortcut, want):
    uniq = QuantizerChoice("uniq")
    policy = QuantPolicy(*bits, weight=uniq, activation=uniq, shortcut=shortcut)
    assert widths(policy.resolve(found))["body.shortcut"] == want


def test_a_float_side_has_no_quantizer_in_the_inner_layers(found):
    plan = QuantPolicy(2, 32).resolve(found)
    assert widths(plan)["body.conv1"] == (2, 32)
    assert plan["body.conv1"].activation is None
    assert widths(plan)["stem"] == (8, 8)


def test_thirty_two_bits_on_both_sides_quantize_nothing(found):
    assert set(widths(QuantPolicy(32, 32).resolve(found)).values()) == {(32, 32)}


def test_of_the_rules_that_match_the_last_wins(found):
    rules = (
        Rule("body.*", weight_bits=3, activation_bits=3),
        Rule("*.conv2", weight_bits=5, activation=QuantizerChoice("uniq")),
        Rule("nothing", weight_bits=8),
    )
    plan = QuantPolicy(4, 4, rules=rules).resolve(found)
    assert widths(plan)["body.conv1"] == (3, 3)
    assert widths(plan)["body.conv2"] == (5, 4)
    assert plan["body.conv2"].activation[0].name == "uniq"


def test_a_rule_reaches_the_first_layer(found):
    plan = QuantPolicy(4, 4, rules=(Rule("stem", weight_bits=4, activation_bits=32),)).resolve(
        found
    )
    assert widths(plan)["stem"] == (4, 32)
    assert plan["stem"].weight[0].name == "lsq"


def test_a_plan_survives_json(found):
    policy = QuantPolicy(
        2, 32, weight=QuantizerChoice("lsq", {"per_channel": True, "grad_scale": "none"})
    )
    plan = policy.resolve(found)
    assert plan_from_dict(json.loads(json.dumps(plan_as_dict(plan)))) == plan


def test_all_refusals_come_at_once_each_with_its_layer_and_the_way_out(found):
    with pytest.raises(ValueError, match="uniq") as error:
        QuantPolicy(1, 4).resolve(found)
    assert "body.conv1" in str(error.value)
    assert "body.conv2" in str(error.value)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (QuantizerChoice("lqs"), "did you mean 'lsq'"),
        (QuantizerChoice("lsq", {"per_chanel": True}), "per_channel"),
    ],
)
def test_an_unknown_method_or_option_names_the_known_ones(found, choice, message):
    with pytest.raises(ValueError, match=message):
        QuantPolicy(4, 4, weight=choice).resolve(found)


def test_a_width_that_does_not_exist_is_refused(found):
    with pytest.raises(ValueError, match="no width of 9 bits; known: 1, 2"):
        QuantPolicy(9, 4).resolve(found)


def test_signed_activations_say_which_method_can(found):
    policy = QuantPolicy(4, 4, activation=QuantizerChoice("dorefa"))
    with pytest.raises(ValueError, match=r"body\.conv2.*lsq"):
        policy.resolve(found)
    rules = (Rule("body.conv2", activation=QuantizerChoice("lsq")),)
    plan = QuantPolicy(4, 4, activation=QuantizerChoice("dorefa"), rules=rules).resolve(found)
    assert plan["body.conv1"].activation[0].name == "dorefa"
    assert plan["body.conv2"].activation[0].name == "lsq"

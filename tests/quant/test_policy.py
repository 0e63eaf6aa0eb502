"""Which layer is quantized how."""

from __future__ import annotations

import json

import pytest
import torch
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
from torch import Tensor, nn


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


class Kinds(nn.Module):
    """A layer of each kind, one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.depthwise = nn.Conv2d(8, 16, 3, groups=8)
        self.grouped = nn.Conv2d(16, 8, 1, groups=2)
        self.pointwise = nn.Conv2d(8, 8, 1)
        self.up = nn.ConvTranspose2d(8, 6, 2, groups=2)
        self.mix = nn.Linear(6, 6)
        self.downsample = nn.Sequential(nn.Conv2d(6, 6, 1, stride=2))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pointwise(self.grouped(self.depthwise(self.stem(x))))
        x = self.mix(self.up(x).movedim(1, -1)).movedim(-1, 1)
        return self.head(self.downsample(x).mean((2, 3)))


@pytest.fixture(scope="module")
def kinds() -> Probe:
    return probe(Kinds(), [images()])


@pytest.mark.parametrize(
    ("kind", "layers"),
    [
        ("Conv2d", {"stem", "depthwise", "grouped", "pointwise", "downsample.0"}),
        ("Linear", {"mix", "head"}),
        ("ConvTranspose2d", {"up"}),
        ("transposed", {"up"}),
        ("depthwise", {"depthwise"}),
        ("grouped", {"depthwise", "grouped", "up"}),
        ("pointwise", {"pointwise", "downsample.0"}),
        ("shortcut", {"downsample.0"}),
        ("convolution", {"stem", "depthwise", "grouped", "pointwise", "up", "downsample.0"}),
    ],
)
def test_a_rule_reaches_the_layers_of_its_kind(kinds, kind, layers):
    plan = QuantPolicy(4, 4, rules=(Rule(kind=kind, weight_bits=5),)).resolve(kinds)
    assert {name for name, p in plan.items() if p.weight_bits == 5} == layers


def test_a_rule_with_a_name_and_a_kind_wants_both(kinds):
    plan = QuantPolicy(4, 4, rules=(Rule("*wise", kind="depthwise", weight_bits=5),)).resolve(kinds)
    assert [name for name, p in plan.items() if p.weight_bits == 5] == ["depthwise"]


def test_an_unknown_kind_names_the_known_ones():
    with pytest.raises(ValueError, match="did you mean 'depthwise'"):
        Rule(kind="depth-wise")


def test_rules_that_fit_no_layer_are_found(kinds):
    rules = (Rule("stem"), Rule("layer1.*"), Rule("mix", kind="Conv2d"))
    assert QuantPolicy(4, 4, rules=rules).unused_rules(kinds) == [1, 2]


def test_a_site_says_where_the_channels_stand_and_how_many_there_are(kinds):
    plan = QuantPolicy(4, 4).resolve(kinds)
    axes = {name: p.activation[1].axis for name, p in plan.items()}
    assert axes == dict.fromkeys(plan, 1) | {"mix": -1, "head": -1}
    assert plan["up"].weight[1].channels == 3  # of one group
    assert plan["up"].activation[1].channels == 8
    assert plan["depthwise"].weight[1].channels == 16


def test_a_plan_recorded_before_sites_had_an_axis_is_read(found):
    record = plan_as_dict(QuantPolicy(4, 4).resolve(found))
    for layer in record.values():
        for half in layer.values():
            del half["axis"]
    assert plan_from_dict(record)["stem"] == QuantPolicy(4, 4).resolve(found)["stem"]


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({"first_last_bits": 32}, (32, 32)),
        ({"first_last_weight_bits": 4}, (4, 8)),
        ({"first_last_activation_bits": 32}, (8, 32)),
        ({"first_last_bits": 2, "first_last_weight": QuantizerChoice("lsq")}, (2, 2)),
    ],
)
def test_first_and_last_layer_have_widths_of_their_own(found, options, want):
    plan = QuantPolicy(4, 4, **options).resolve(found)
    assert widths(plan)["stem"] == widths(plan)["head"] == want
    assert widths(plan)["body.conv1"] == (4, 4)


def test_a_shortcut_whose_width_the_method_does_not_have_takes_that_of_the_edges(found):
    binary = QuantizerChoice("xnor")
    policy = QuantPolicy(1, 1, weight=binary, activation=QuantizerChoice("uniq"))
    plan = policy.resolve(found)
    assert widths(plan)["body.shortcut"] == (8, 8)
    assert plan["body.shortcut"].weight[0].name == "range_linear"
    assert plan["body.shortcut"].activation[0].name == "uniq"
    assert plan["body.conv1"].weight[0] == binary


def test_a_model_with_nothing_to_quantize_is_refused_and_says_what_it_has():
    model = nn.Sequential(nn.Embedding(5, 4), nn.LSTM(4, 3))
    empty = probe(model, [torch.zeros(2, 3, dtype=torch.int64)])
    with pytest.raises(ValueError, match=r"nothing to quantize.*0 \(Embedding.*1 \(LSTM"):
        QuantPolicy(4, 4).resolve(empty)
    with pytest.raises(ValueError, match="no weights"):
        QuantPolicy(4, 4).resolve(probe(nn.ReLU(), [images()]))
    assert QuantPolicy(32, 32).resolve(empty) == {}

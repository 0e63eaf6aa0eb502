import itertools
import json

import pytest
import torch
from bitladder.models.tapped import Outputs
from bitladder.pipeline import teachers as teachers_module
from bitladder.pipeline.config import BinRegularizationConfig, OscillationConfig, TrainConfig
from bitladder.pipeline.config_distill import DistillConfig, ScheduledWeight
from bitladder.pipeline.config_load import parse_config
from bitladder.pipeline.errors import ConfigError, Interrupted
from bitladder.pipeline.features import build_features
from bitladder.pipeline.learner import Learner, Objective
from bitladder.pipeline.losses import LOSSES, Step
from bitladder.pipeline.network import load_network
from bitladder.pipeline.plan import make_plan
from bitladder.pipeline.runner import open_ladder, run_ladder, run_stage
from bitladder.pipeline.schedule import weight_at
from bitladder.pipeline.store import Store
from bitladder.pipeline.teachers import dropped_teachers, teach
from safetensors.torch import load_file
from stop_after import StopAfter
from torch import nn

FP32 = {"weight_bits": 32, "activation_bits": 32}
W4A4 = {"weight_bits": 4, "activation_bits": 4}
HINTS = {"name": "fitnets", "layers": ["act1", "conv2"], "weight": 0.5}


def net(width=4, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, 6, generator=generator), torch.tensor([0, 1, 2, 0, 1])


def learner_of(batch, teachers, **distill):
    config = DistillConfig(**distill)
    student, features = net(), None
    if config.features is not None:
        features = build_features(
            config.features, student=student, teachers=teachers, images=batch[0], seed=0
        )
    bins, oscillation = BinRegularizationConfig(), OscillationConfig()
    return Learner(student, Objective(TrainConfig(), config, bins, oscillation, features))


def terms_of(batch, teachers, progress=0.0, left_out=frozenset(), **distill):
    learner = learner_of(batch, teachers, **distill)
    layers = learner.objective.taps(progress)[1]
    outputs = teach(teachers, batch[0], layers=layers, left_out=left_out)
    return learner(*batch, outputs, progress)


def test_the_loss_of_several_teachers_is_the_mean_over_them(batch):
    teachers = [net(seed=n).eval() for n in (1, 2, 3)]
    alone = [terms_of(batch, [teacher])["distillation"] for teacher in teachers]
    together = terms_of(batch, teachers)["distillation"]
    torch.testing.assert_close(together, torch.stack(alone).mean())
    kept = terms_of(batch, teachers, left_out=frozenset({1}))["distillation"]
    torch.testing.assert_close(kept, (alone[0] + alone[2]) / 2)


def test_a_teacher_that_is_left_out_is_not_run(batch):
    runs = []
    teachers = [net(seed=n).eval() for n in (1, 2)]
    for number, teacher in enumerate(teachers):
        teacher.register_forward_hook(lambda *_, n=number: runs.append(n))
    found = teach(teachers, batch[0], left_out=frozenset({0}))
    assert runs == [1]
    assert found[0] is None
    assert not found[1].logits.requires_grad


def test_each_teacher_has_a_projection_of_its_own_for_each_layer(batch):
    teachers = [net(width=7, seed=1).eval(), net(width=5, seed=2).eval()]
    features = {"name": "fitnets", "layers": ["1", "2"], "weight": 1.0}
    learner = learner_of(batch, teachers, features=features)
    assert {
        name: tuple(p.shape) for name, p in learner.objective.features.projections().items()
    } == {
        f"teacher-{n}.{layer}->{layer}.{part}": shape
        for n, width in enumerate((7, 5))
        for layer in "12"
        for part, shape in (("weight", (width, 4, 1, 1)), ("bias", (width,)))
    }
    second = [None, *teach(teachers[1:], batch[0], layers=["1", "2"])]
    learner(*batch, second, 0.0)["total"].backward()
    used = [p.grad is not None for p in learner.objective.features.losses[0].parameters()]
    assert not any(used)
    assert all(p.grad is not None for p in learner.objective.features.losses[1].parameters())


def test_feature_losses_add_up_over_layers_and_count_by_their_weight(batch):
    teachers = [net(seed=1).eval()]
    at = {"name": "attention_transfer", "weight": 100.0}
    one, two, both = (
        terms_of(batch, teachers, features={**at, "layers": layers})
        for layers in (["1"], ["2"], ["1", "2"])
    )
    torch.testing.assert_close(both["features"], one["features"] + two["features"])
    expected = 0.5 * both["cross_entropy"] + 0.5 * both["distillation"] + 100 * both["features"]
    torch.testing.assert_close(both["total"], expected)


def test_a_moving_weight_shifts_from_the_labels_to_the_teacher(batch):
    teachers = [net(seed=1).eval()]
    weight = {"start": 0.0, "final": 0.8, "warmup": 0.5}
    start, middle = (terms_of(batch, teachers, p, weight=weight) for p in (0.25, 0.75))
    assert "distillation" not in start
    torch.testing.assert_close(start["total"], start["cross_entropy"])
    expected = 0.6 * middle["cross_entropy"] + 0.4 * middle["distillation"]
    torch.testing.assert_close(middle["total"], expected)


def test_teachers_and_layers_are_needed_only_while_they_weigh_something(batch):
    features = {
        "name": "fitnets",
        "layers": ["1"],
        "teacher_layers": ["2"],
        "weight": {"start": 0.0, "final": 3.0, "warmup": 0.5},
    }
    learner = learner_of(batch, [net(seed=1).eval()], weight=0.0, features=features)
    assert not learner.objective.follows(0.25)
    assert learner.objective.taps(0.25) == ((), ())
    assert learner.objective.follows(0.75)
    assert learner.objective.taps(0.75) == (("1",), ("2",))
    assert set(learner(*batch, (), 0.25)) == {"cross_entropy", "total"}


@pytest.mark.parametrize(
    ("weight", "values"),
    [
        (0.3, [0.3, 0.3, 0.3]),
        (ScheduledWeight(start=2.0, final=0.0), [2.0, 1.0, 0.0]),
        (ScheduledWeight(start=2.0, final=4.0, warmup=0.5), [2.0, 2.0, 4.0]),
    ],
)
def test_a_weight_is_constant_or_goes_by_cosine(weight, values):
    assert [weight_at(weight, p) for p in (0.0, 0.5, 1.0)] == pytest.approx(values)


def test_one_teacher_without_features_is_the_weighted_sum_bit_for_bit(batch):
    teacher = net(seed=1).eval()
    terms = terms_of(batch, [teacher], weight=0.3)
    step = Step(net()(batch[0]), batch[1], teacher(batch[0]).detach())
    hard, soft = (LOSSES[name].factory()(step) for name in ("cross_entropy", "kl"))
    assert torch.equal(terms["total"], torch.zeros(()) + (1 - 0.3) * hard + 0.3 * soft)


def test_who_is_dropped_depends_on_seed_and_step_alone_and_meets_all():
    drawn = [dropped_teachers(4, 2, seed=1, step=step) for step in range(60)]
    assert drawn == [dropped_teachers(4, 2, seed=1, step=step) for step in range(60)]
    assert drawn != [dropped_teachers(4, 2, seed=2, step=step) for step in range(60)]
    assert set(drawn) == {frozenset(pair) for pair in itertools.combinations(range(4), 2)}


@pytest.mark.parametrize(("count", "drop", "left"), [(3, 0, 0), (3, 5, 2), (1, 1, 0), (0, 1, 0)])
def test_one_teacher_is_always_kept(count, drop, left):
    assert len(dropped_teachers(count, drop, seed=0, step=0)) == left


def test_a_layer_of_features_that_a_network_lacks_is_told_before_anything_is_written(
    tiny, tmp_path
):
    own = {"name": "fitnets", "layers": ["act1", "layer1"], "teacher_layers": ["con1", "act1"]}
    config = tiny(ladder=[FP32, {**W4A4, "distill": {"features": own}}])
    with pytest.raises(ConfigError) as caught:
        open_ladder(config, tmp_path / "artifacts")
    told = "\n".join(caught.value.errors)
    assert "ladder.1.distill.features.layers: tiny_convnet: unknown layer 'layer1'" in told
    at = "ladder.1.distill.features.teacher_layers"
    assert f"{at}: tiny_convnet: unknown layer 'con1'; did you mean 'conv1'?" in told
    assert not (tmp_path / "artifacts").exists()


def wide_and_narrow(tiny, **changes):
    """A wide teacher, and below it the same network narrow, which is another one."""
    wide = {**FP32, "name": "wide", "model": {"name": "tiny_convnet", "width": 12}, "epochs": 1}
    narrow = {**FP32, "name": "narrow", "teacher": "wide"}
    rungs = [wide, narrow, {**W4A4, "name": "low", "teacher": "wide", "epochs": 1}]
    return tiny(ladder=rungs, distill={"features": HINTS}, **changes)


def hashes(records):
    return [{name: file["sha256"] for name, file in r.files.items()} for r in records]


def weights_of(records):
    """Of the files only those with tensors: metrics.jsonl tells the time."""
    return [{n: h for n, h in files.items() if n.endswith("tensors")} for files in hashes(records)]


def test_hints_between_widths_train_projections_and_resume_to_the_same_bits(tiny, run, tmp_path):
    config = wide_and_narrow(tiny)
    store = Store(tmp_path / "whole")
    records = run(config, store)
    assert ["projections.safetensors" in r.files for r in records] == [False, True, True]
    learned = load_file(store.stages / records[1].key / "projections.safetensors")
    assert {name: tuple(t.shape) for name, t in learned.items()} == {
        "act1->act1.weight": (12, 8, 1, 1),
        "act1->act1.bias": (12,),
        "conv2->conv2.weight": (24, 16, 1, 1),
        "conv2->conv2.bias": (24,),
    }
    assert all(t.abs().sum() > 0 for t in learned.values())  # biases begin at 0
    student = load_network(store, records[1], torch.device("cpu")).state_dict()
    assert not [name for name in student if "features" in name]
    lines = (store.stages / records[1].key / "metrics.jsonl").read_text().splitlines()
    first, last = (json.loads(line)["train_features"] for line in lines)
    assert last < first
    ladder = open_ladder(config, tmp_path / "stopped")
    run_stage(ladder, ladder.plan.stages[0], lambda: None)
    with pytest.raises(Interrupted):
        run_stage(ladder, ladder.plan.stages[1], StopAfter(15))  # in its second epoch
    assert weights_of(run_ladder(ladder)) == weights_of(records)


def test_a_dense_ladder_with_dropped_teachers_resumes_to_the_same_bits(
    tiny, run, tmp_path, monkeypatch
):
    asked = []

    def spy(teachers, x, *, layers, left_out):
        asked.append((len(teachers), len(left_out)))
        return teach(teachers, x, layers=layers, left_out=left_out)

    monkeypatch.setattr(teachers_module, "teach", spy)
    rungs = [FP32, {"weight_bits": 8, "activation_bits": 8}, W4A4, {**W4A4, "name": "last"}]
    config = tiny(
        ladder=rungs,
        distill={"teacher": "dense", "drop": 1, "loss": "dist", "features": HINTS},
        train={"epochs": 1},
    )
    records = run(config, Store(tmp_path / "whole"))
    assert sorted(set(asked)) == [(1, 0), (2, 1), (3, 1)]
    ladder = open_ladder(config, tmp_path / "stopped")
    with pytest.raises(Interrupted):
        [run_stage(ladder, s, StopAfter(6 if s.name == "last" else 99)) for s in ladder.plan.stages]
    assert weights_of(run_ladder(ladder)) == weights_of(records)


def test_weights_and_features_enter_the_key_only_where_they_act(tiny):
    rungs = [FP32, W4A4]

    def keys(**distill):
        return [stage.key for stage in make_plan(tiny(ladder=rungs, distill=distill)).stages]

    plain = keys()
    assert keys(drop=0, features=None) == plain
    assert keys(features={**HINTS, "weight": 0.0}) == plain
    assert keys(weight={"start": 0.5, "final": 0.5}) == plain
    assert keys(weight={"start": 0.5, "final": 0.0, "warmup": 1.0}) == plain
    hints = keys(features=HINTS)
    assert hints[0] == plain[0]
    assert keys(features={**HINTS, "teacher_layers": HINTS["layers"]}) == hints
    others = [
        keys(weight={"start": 0.5, "final": 0.0}),
        keys(features={**HINTS, "weight": {"start": 0.5, "final": 0.0}}),
        keys(features={**HINTS, "layers": ["act1"]}),
        keys(features={**HINTS, "name": "attention_transfer"}),
        keys(features={**HINTS, "name": "attention_transfer", "power": 1.0}),
    ]
    assert len({key[1] for key in [plain, hints, *others]}) == 2 + len(others)


def errors_of(ladder=(FP32, W4A4), **distill):
    raw = {
        "name": "t",
        "model": {"name": "tiny_convnet"},
        "ladder": list(ladder),
        "distill": distill,
    }
    with pytest.raises(ConfigError) as caught:
        parse_config(raw)
    return caught.value.errors


def test_a_loss_of_the_other_kind_is_refused_with_the_way_out():
    assert "give it as distill.features: {name: fitnets" in errors_of(loss="fitnets")[0]
    (error,) = errors_of(features={"name": "kl", "layers": ["a"]}, ladder=[FP32])
    assert error.startswith("ladder.0.distill.features.name: 'kl' compares logits")
    assert "distill.loss: kl" in error


def test_all_mistakes_of_distillation_come_at_once_with_their_paths():
    features = {"name": "attention_transfer", "layers": ["act1"], "power": 0.0}
    found = errors_of(loss="dist", beta=-1.0, drop=1, features=features)
    assert found == [
        "distill: beta must not be below 0, not -1.0",
        "distill.features: power must be at least 1, not 0.0",
        "distill.drop: needs several teachers, dense or a list of names, not 'previous'",
    ]


def test_a_mistake_is_said_of_the_rungs_or_of_the_section_above_them_as_it_was_written():
    own = {**W4A4, "distill": {"loss": "dist", "gamma": -1.0}}
    assert errors_of((FP32, W4A4, own), loss="dist", beta=-1.0) == [
        "distill: beta must not be below 0, not -1.0",
        "ladder.2.distill: beta must not be below 0, not -1.0",
    ]
    (error,) = errors_of((FP32, {**W4A4, "teacher": "w9a9"}))
    assert error.startswith("ladder.1.teacher: unknown teacher 'w9a9'")


@pytest.mark.parametrize(
    ("distill", "message"),
    [
        ({"weight": 2.0}, "distill.weight: input should be less than or equal to 1, not 2.0"),
        ({"weight": {"start": 0.1, "final": 1.5}}, "distill.weight: must stay between 0 and 1"),
        ({"weight": {"start": 0.1, "fin": 1.0}}, "distill.weight.fin: unknown key"),
        ({"features": {"name": "fitnets"}}, "distill.features.layers: is missing"),
        (
            {"features": {"name": "fitnets", "layers": ["a"], "teacher_layers": ["b", "c"]}},
            "distill.features: give a teacher layer for each of the 1 layers, not 2",
        ),
        ({"features": {"name": "fitnets", "layers": "a"}}, "give a list, such as [a]"),
        ({"teacher": None}, "give one name, or a list of names; the word none for no teacher"),
        ({"features": {"name": "fitnet", "layers": ["a"]}}, "did you mean 'fitnets'?"),
        ({"features": {**HINTS, "powr": 2.0}}, "distill.features.powr: unknown option"),
        ({"features": HINTS, "teacher": "none"}, "give features: null"),
        ({"teacher": "dense", "drop": 1}, "drop: 1 of 1 teachers leaves none"),
    ],
)
def test_a_mistake_in_distillation_is_named(distill, message):
    assert message in "\n".join(errors_of(**distill))


def test_another_feature_loss_in_a_rung_looks_at_the_same_layers(tiny):
    above = {"name": "attention_transfer", "layers": ["act1"], "weight": 9.0, "power": 3.0}
    rung = {**W4A4, "distill": {"features": "fitnets"}}
    found = tiny(distill={"features": above}, ladder=[FP32, rung]).ladder[1].distill.features
    assert (found.name, found.layers, found.weight) == ("fitnets", ("act1",), 9.0)
    assert found.options == {}


def test_a_moving_weight_and_features_survive_being_stored(tiny):
    weight = {"start": 0.0, "final": 1.0}
    config = tiny(distill={"weight": weight, "features": {**HINTS, "weight": weight}})
    assert parse_config(config.model_dump(mode="json")) == config


def test_outputs_have_no_features_unless_asked(batch):
    assert isinstance(teach([net()], batch[0])[0], Outputs)
    assert teach([net()], batch[0])[0].features == {}

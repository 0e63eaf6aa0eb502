import pytest
from bitladder.pipeline.config import ModelConfig
from bitladder.pipeline.config_load import load_config, parse_config, shipped_configs
from bitladder.pipeline.errors import ConfigError
from bitladder.pipeline.policy import policy_of
from bitladder.quant import QuantizerChoice

BASE = {
    "name": "t",
    "data": {"name": "digits"},
    "model": {"name": "tiny_convnet"},
    "ladder": [
        {"weight_bits": 32, "activation_bits": 32, "epochs": 2},
        {"weight_bits": 4, "activation_bits": 4},
    ],
}


def errors_of(raw):
    with pytest.raises(ConfigError) as caught:
        parse_config(raw)
    return caught.value.errors


def rungs(*changes):
    return {**BASE, "ladder": [{**BASE["ladder"][0]}, *changes]}


@pytest.mark.parametrize("name", list(shipped_configs()))
def test_every_shipped_config_loads(name):
    assert load_config(name).ladder


def test_a_folder_of_its_name_does_not_hide_a_shipped_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    assert load_config("digits").name == "digits"
    (tmp_path / "digits").rmdir()
    (tmp_path / "digits").write_text(
        "name: mine\nladder: [{weight_bits: 32, activation_bits: 32}]\n"
    )
    assert load_config("digits").name == "mine"  # a file of that name is the user's


def test_a_rung_says_only_what_differs():
    train = {"epochs": 7, "optimizer": {"lr": 0.5, "weight_decay": 0.125}}
    own = {"weight_bits": 2, "activation_bits": 8, "train": {"optimizer": {"lr": 0.25}}}
    config = parse_config({**rungs(own), "train": train})
    assert config.ladder[1].train.epochs == 7
    assert config.ladder[1].train.optimizer.lr == 0.25
    assert config.ladder[1].train.optimizer.weight_decay == 0.125
    assert config.ladder[0].train.epochs == 2
    assert [stage.name for stage in config.ladder] == ["fp32", "w2a8"]


def test_another_loss_does_not_inherit_the_options_of_the_first():
    own = {"weight_bits": 4, "activation_bits": 4, "distill": {"loss": "dist"}}
    config = parse_config({**rungs(own), "distill": {"loss": "kl", "temperature": 2.0}})
    assert config.ladder[1].distill.options == {}
    assert config.ladder[0].distill.options == {"temperature": 2.0}


def test_a_quantizer_may_be_one_name_or_one_for_each_half():
    one = parse_config(rungs({"weight_bits": 4, "activation_bits": 4, "quantizer": "dorefa"}))
    assert one.ladder[1].quantizer.weight.name == one.ladder[1].quantizer.activation.name
    halves = {"weight": {"name": "lsq", "per_channel": True}, "activation": "dorefa"}
    two = parse_config(rungs({"weight_bits": 4, "activation_bits": 4, "quantizer": halves}))
    assert two.ladder[1].quantizer.weight.options == {"per_channel": True}
    assert two.ladder[1].quantizer.activation.name == "dorefa"


def test_all_mistakes_come_at_once_with_their_paths():
    raw = {
        **rungs({"weight_bits": 9, "activation_bits": 4}, {"weight_bits": 4, "epochs": "ten"}),
        "sed": 1,
        "train": {"optimizer": {"lr": "fast"}},
        "model": {"name": "tiny_convnet", "widht": 4},
        "data": {"name": "digit"},
    }
    text = "\n".join(errors_of(raw))
    for path in (
        "ladder.1.weight_bits:",
        "ladder.2.activation_bits: is missing",
        "ladder.2.epochs:",
        "unknown key 'sed'; did you mean 'seed'?",
        "train.optimizer.lr:",
        "model.widht: unknown option",
        "data: unknown data set 'digit'; did you mean 'digits'?",
    ):
        assert path in text, text


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({**BASE, "ladder": []}, "ladder: has no stage"),
        ({k: v for k, v in BASE.items() if k != "ladder"}, "ladder: is missing"),
        ({**BASE, "ladder": {"a": 1}}, "ladder: must be a list"),
        (rungs("w4a4"), "ladder.1: must be a mapping"),
        (rungs({"weight_bits": 4, "activation_bits": 4, "epoch": 3}), "did you mean 'epochs'?"),
        (rungs({"weight_bits": 4, "activation_bits": 4, "quantizer": "lqs"}), "mean 'lsq'?"),
        (rungs({"weight_bits": 1, "activation_bits": 1, "quantizer": "lsq"}), "uniq"),
        (rungs({"weight_bits": True, "activation_bits": 4}), "ladder.1.weight_bits"),
        (rungs({"weight_bits": 4, "activation_bits": 4, "epochs": -1}), "ladder.1.epochs"),
        ({**BASE, "seed": float("nan")}, "seed: must be a finite number"),
        ({**BASE, "name": "a/b"}, "name:"),
        ({**BASE, "model": {"name": "tiny_convnet", "weights": "no.pt"}}, "no such file: no.pt"),
        (
            rungs({"weight_bits": 4, "activation_bits": 4, "name": "fp32"}),
            "ladder.1.name: 'fp32' is used twice",
        ),
    ],
)
def test_a_mistake_is_named(raw, message):
    assert message in "\n".join(errors_of(raw))


def test_a_teacher_that_does_not_exist_is_named():
    rung = {"weight_bits": 8, "activation_bits": 8, "teacher": "fp32"}
    assert "'fp32' needs a rung above" in errors_of({**BASE, "ladder": [rung]})[0]


def test_what_a_run_stores_loads_again_as_the_same_config():
    config = load_config("digits", ["ladder.3.bin_regularization={weight: 1.0}", "seed=3"])
    assert parse_config(config.model_dump(mode="json")) == config


def test_a_mistake_above_the_ladder_is_said_once():
    found = errors_of({**BASE, "train": {"optimizer": {"lr": -1.0}}})
    assert len(found) == 1
    assert found[0].startswith("train.optimizer.lr:")


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"epoch": 5}, "train.epoch: unknown key; did you mean 'epochs'?"),
        ({"optimizer": {"lrr": 0.1}}, "train.optimizer.lrr: unknown key; did you mean 'lr'?"),
        ({"schedule": {"colour": 1}}, "train.schedule.colour: unknown key; known: name, warmup"),
        ({"policy": {}}, "train.policy: unknown key; policy stands beside train, not in it"),
    ],
)
def test_an_unknown_key_in_a_section_is_told_with_the_way_out(train, message):
    assert errors_of({**BASE, "train": train})[0].startswith(message)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"optimizer": {"name": "adam", "momentum": 0.3}}, "adam has no momentum"),
        ({"schedule": {"milestones": [0.5]}}, "cosine has no milestones"),
        ({"quantizer_parameters": {"lr": 0.1, "lr_factor": 0.5}}, "give lr or lr_factor, not both"),
        (5, "train:"),
    ],
)
def test_a_setting_that_would_be_ignored_is_refused(train, message):
    rung = {"weight_bits": 4, "activation_bits": 4, "epochs": 1, "train": train}
    assert message in "\n".join(errors_of(rungs(rung)))


def test_absolute_rates_of_quantizer_parameters_survive_being_stored():
    config = parse_config({**BASE, "train": {"quantizer_parameters": {"lr": 0.1}}})
    assert parse_config(config.model_dump(mode="json")) == config


def test_text_that_means_no_elsewhere_is_not_taken_for_a_truth_value():
    quantizer = {"weight": {"name": "lsq", "per_channel": "no"}}
    rung = {"weight_bits": 4, "activation_bits": 4, "quantizer": quantizer}
    assert "ladder.1.quantizer.weight.per_channel:" in errors_of(rungs(rung))[0]
    assert "data.crop:" in errors_of({**BASE, "data": {"name": "digits", "crop": "1"}})[0]


def test_another_loss_or_optimizer_keeps_what_all_of_its_kind_have():
    rung = {
        "weight_bits": 4,
        "activation_bits": 4,
        "distill": {"loss": "dist"},
        "train": {"optimizer": "adam"},
    }
    defaults = {
        "distill": {"loss": "kl", "temperature": 2.0, "weight": 0.75},
        "train": {"optimizer": {"name": "sgd", "lr": 0.001, "momentum": 0.5}},
    }
    stage = parse_config({**rungs(rung), **defaults}).ladder[1]
    assert (stage.distill.weight, stage.distill.options) == (0.75, {})
    assert (stage.train.optimizer.name, stage.train.optimizer.lr) == ("adam", 0.001)


def test_naming_the_part_that_is_there_by_default_keeps_its_settings():
    rung = {
        "weight_bits": 4,
        "activation_bits": 4,
        "distill": {"loss": "kl"},
        "train": {"optimizer": "sgd", "schedule": "cosine"},
    }
    defaults = {
        "distill": {"temperature": 2.0},
        "train": {"optimizer": {"momentum": 0.5}, "schedule": {"final": 0.1}},
    }
    stage = parse_config({**rungs(rung), **defaults}).ladder[1]
    assert stage.distill.options == {"temperature": 2.0}
    assert stage.train.optimizer.momentum == 0.5
    assert stage.train.schedule.final == 0.1


def test_another_loss_keeps_what_is_said_of_the_teachers_themselves():
    rung = {"weight_bits": 4, "activation_bits": 4, "distill": {"loss": "dist"}}
    said = {"teacher_precision": "bf16", "fold_batch_norm": True}
    stage = parse_config({**rungs(rung), "distill": {"temperature": 2.0, **said}}).ladder[1]
    assert stage.distill.teacher_precision == "bf16"
    assert stage.distill.fold_batch_norm


def test_no_teacher_may_be_one_word():
    rung = {"weight_bits": 4, "activation_bits": 4}
    for word in ("none", None):
        assert parse_config({**rungs(rung), "distill": word}).ladder[1].distill.teacher == "none"


def test_the_loss_of_the_labels_is_none_of_a_teacher():
    (error,) = errors_of({**BASE, "distill": {"loss": "cross_entropy"}})
    assert "give weight: 0" in error


def test_an_option_at_its_default_makes_no_other_network():
    plain = ModelConfig(name="preact_resnet8")
    assert plain.same_network(ModelConfig(name="preact_resnet8", width=16))
    assert not plain.same_network(ModelConfig(name="preact_resnet8", width=8))


def test_a_loss_that_cannot_be_built_is_refused_with_the_rest():
    assert "temperature must be above 0" in errors_of({**BASE, "distill": {"temperature": 0.0}})[0]


def test_first_and_last_layer_take_methods_and_widths_of_their_own():
    policy = {
        "first_last_weight_bits": 2,
        "first_last_activation_bits": 32,
        "first_last_weight": "lsq",
        "rules": [{"kind": "depthwise", "weight_bits": 8}],
    }
    rung = {"weight_bits": 4, "activation_bits": 4, "policy": policy}
    config = parse_config(rungs(rung))
    resolved = policy_of(config.ladder[1])
    assert (resolved.first_last_weight_bits, resolved.first_last_activation_bits) == (2, 32)
    assert resolved.first_last_weight == QuantizerChoice("lsq")
    assert resolved.rules[0].kind == "depthwise"
    assert parse_config(config.model_dump(mode="json")) == config


def test_all_mistakes_of_a_policy_come_at_once_with_their_paths():
    policy = {
        "first_last_bits": 2,
        "first_last_activation": "dorefa",
        "rules": [
            {"kind": "depthwis", "weight_bits": 8},
            {"match": "conv2", "weight_bits": 1},
            {"match": "conv2", "activation": {"name": "lsq", "per_chanel": True}},
        ],
    }
    rung = {"weight_bits": 4, "activation_bits": 4, "quantizer": "lsq", "policy": policy}
    found = "\n".join(errors_of(rungs(rung)))
    for message in (
        "policy.first_last_weight: range_linear needs 3 bits or more, not 2; use uniq or lsq",
        "policy.first_last_activation: ",
        "policy.rules.0.kind: unknown kind of layer 'depthwis'; did you mean 'depthwise'?",
        "policy.rules.1.weight_bits: ",
        "policy.rules.2.activation.per_chanel: unknown option",
    ):
        assert f"ladder.1.{message}" in found, found


def test_a_rule_for_no_layers_in_particular_is_refused():
    policy = {"rules": [{"weight_bits": 2}]}
    rung = {"weight_bits": 4, "activation_bits": 4, "policy": policy}
    assert "give match, a glob" in "\n".join(errors_of(rungs(rung)))


def test_a_method_for_signed_activations_alone_is_left_to_the_probe():
    methods = {"weight": "uniq", "activation": "reactnet"}
    rung = {"weight_bits": 1, "activation_bits": 1, "quantizer": methods}
    assert parse_config(rungs(rung)).ladder[1].quantizer.activation.name == "reactnet"
    wide = {"weight_bits": 2, "activation_bits": 2, "quantizer": methods | {"weight": "lsq"}}
    (error,) = errors_of(rungs(wide))
    assert error.startswith("ladder.1.quantizer.activation: reactnet")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "nope"}, "unknown quantizer 'nope'"),
        ({"method": "lsq", "options": {"foo": 1}}, "unknown option of quantizer 'lsq' 'foo'"),
        ({"method": "bwn"}, "bwn has 1 bit only, not 4"),
        ({"options": {"init": 5}}, "weight.options.init: input should be"),
        ({"method": "weight_norm", "options": {"method": "lcq", "options": {"a": 1}}}, "'a'"),
    ],
)
def test_a_wrapped_method_is_checked_with_the_config(options, message):
    quantizer = {"weight": {"name": "weight_norm", **options}, "activation": "lsq"}
    (error,) = errors_of(rungs({"weight_bits": 4, "activation_bits": 4, "quantizer": quantizer}))
    assert error.startswith("ladder.1.quantizer.weight")
    assert message in error


def test_options_that_contradict_each_other_are_found_with_the_config():
    lsq = {"name": "lsq", "per_channel": True}
    (error,) = errors_of(
        rungs(
            {
                "weight_bits": 4,
                "activation_bits": 4,
                "quantizer": {"weight": lsq, "activation": lsq},
            }
        )
    )
    assert "an activation has one scale" in error

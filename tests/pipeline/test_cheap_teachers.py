"""Teachers in bfloat16 and with folded batch norm, and what that changes."""

import json

import pytest
import torch
from bitladder.models import build_model
from bitladder.models.tapped import tapped
from bitladder.pipeline.cheap_teachers import ready_teachers, to_bfloat16
from bitladder.pipeline.config_distill import DistillConfig
from bitladder.pipeline.data import DATASETS
from bitladder.pipeline.errors import StageError
from bitladder.pipeline.plan import make_plan
from bitladder.pipeline.store import Store
from bitladder.quant import (
    QUANTIZERS,
    QuantizerChoice,
    QuantPolicy,
    bake,
    calibrate,
    quantize_model,
    reestimate_batch_norm,
)
from bitladder.quant.core import Quantizer
from torch import nn

FP32 = {"weight_bits": 32, "activation_bits": 32}
W8 = {"weight_bits": 8, "activation_bits": 8}
W4 = {"weight_bits": 4, "activation_bits": 4}
CHEAP = {"teacher_precision": "bf16", "fold_batch_norm": True}
HINTS = {"name": "fitnets", "layers": ["act1"]}


@pytest.fixture(scope="module")
def data():
    return DATASETS["digits"].factory()


@pytest.fixture(scope="module")
def images(data):
    return next(data.validation.evaluation_batches(64, "cpu"))[0]


def network(name="tiny_convnet", **options):
    size = {"num_classes": 10, "in_channels": 1, "image_size": 8}
    return build_model(name, **size, options=options).eval()


def rung(images, bits=8, name="tiny_convnet", method="uniq", **options):
    """A quantized teacher, as it is loaded."""
    choice = QuantizerChoice(method)
    policy = QuantPolicy(bits, bits, weight=QuantizerChoice("uniq"), activation=choice)
    model = quantize_model(network(name, **options), policy, inputs=images)
    calibrate(model, [images])
    reestimate_batch_norm(model, [images])
    return bake(model)


def ready(networks, data, **distill):
    return ready_teachers(
        networks,
        DistillConfig(**distill),
        data,
        augment=True,
        batch_size=100,
        seed=3,
        device=torch.device("cpu"),
    )


def test_teachers_as_they_are_say_exactly_what_their_networks_do(data, images):
    model = rung(images)
    teachers, changed = ready([model], data)
    assert changed == ()
    assert torch.equal(teachers(images, 0)[0].logits, model(images))


def test_a_bfloat16_teacher_gives_float32_near_to_what_it_gave(data, images):
    model = rung(images)
    before = tapped(model, images, ["act1"])
    teachers, (changed,) = ready([model], data, teacher_precision="bf16")
    (outputs,) = teachers(images, 0, layers=["act1"])
    assert outputs.logits.dtype == outputs.features["act1"].dtype == torch.float32
    scale = float(before.logits.std())
    torch.testing.assert_close(outputs.logits, before.logits, rtol=0.0, atol=0.1 * scale)
    assert not torch.equal(outputs.logits, before.logits)
    assert changed.bf16
    assert (changed.folded, changed.norms, changed.images) == (0, 2, len(data.validation))


def test_scales_and_batch_norm_stay_in_float32_and_the_rest_does_not(images):
    model = rung(images)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    to_bfloat16(model)
    wide = (Quantizer, nn.BatchNorm2d)
    for name, module in model.named_modules():
        for key, tensor in module.state_dict(prefix=f"{name}.").items():
            if isinstance(module, wide) and tensor.is_floating_point():
                assert torch.equal(tensor, state[key]), key  # not rounded on the way
    assert model.conv1.layer.weight.dtype == torch.bfloat16
    assert model.fc.layer.weight.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in model.parameters())


SIGNS = {"bireal", "reactnet", "xnor"}  # have one bit, of signed values


@pytest.mark.parametrize(
    "method", [n for n in QUANTIZERS if "activation" in QUANTIZERS[n].factory.targets]
)
def test_every_activation_quantizer_runs_in_bfloat16(method, data, images):
    if method in SIGNS:
        model = rung(images, 1, "preact_resnet8", method, block="bireal")
    else:
        model = rung(images, 4, method=method)
    before = model(images)
    teachers, _ = ready([model], data, teacher_precision="bf16")
    logits = teachers(images, 0)[0].logits
    alike = torch.corrcoef(torch.stack([logits.flatten(), before.flatten()]))[0, 1]
    assert alike > (0.7 if method in SIGNS else 0.98)  # untrained: many signs of values near 0


def test_autocast_around_a_student_does_not_reach_its_teachers(data, images):
    model = rung(images)
    teachers, _ = ready([model], data)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(teachers(images, 0)[0].logits, teachers(images, 0)[0].logits)
        assert teachers(images, 0)[0].logits.dtype == torch.float32
        inside = teachers(images, 0)[0].logits
    assert torch.equal(inside, teachers(images, 0)[0].logits)


def test_folding_is_counted_and_changes_little(data, images):
    models = [rung(images), rung(images, name="preact_resnet8")]
    before = [model(images) for model in models]
    teachers, changed = ready(models, data, fold_batch_norm=True)
    assert [(each.folded, each.norms) for each in changed] == [(2, 2), (3, 7)]
    for own, outputs in zip(before, teachers(images, 0), strict=True):
        close = torch.isclose(outputs.logits, own, rtol=0.0, atol=0.05 * float(own.std()))
        assert close.double().mean() > 0.95
    assert str(changed[0]).startswith("2 of 2 batch norms folded; ")


def test_flips_are_the_share_of_validation_images_that_change_class(data, images):
    def classes(model):
        batches = data.validation.evaluation_batches(512, "cpu")
        return torch.cat([model(x).argmax(1) for x, _ in batches])

    model = rung(images, bits=2)
    before = classes(model)
    _, (changed,) = ready([model], data, fold_batch_norm=True, teacher_precision="bf16")
    batches = data.validation.evaluation_batches(512, "cpu")
    after = torch.cat([model(x.bfloat16()).argmax(1) for x, _ in batches])
    assert changed.flips == float((before != after).double().mean())
    assert f"; {100 * changed.flips:.2f} % of {len(before)} validation images" in str(changed)


def test_the_layers_of_feature_losses_are_not_folded(data, images):
    model = rung(images)
    wanted = tapped(model, images, ["conv1"]).features["conv1"]
    features = {"name": "fitnets", "layers": ["conv1"]}
    teachers, (changed,) = ready([model], data, fold_batch_norm=True, features=features)
    assert changed.folded == 1
    torch.testing.assert_close(
        teachers(images, 0, layers=["conv1"])[0].features["conv1"], wanted, rtol=1e-4, atol=1e-4
    )


class InFloat(nn.Module):
    """Makes a float32 tensor of its own, which bfloat16 weights do not take."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        return self.fc(x.flatten(1) + torch.ones(64))


def test_a_network_that_does_not_run_in_bfloat16_is_told_with_the_way_out(data):
    with pytest.raises(ValueError, match=r"not run in bfloat16 \(.*give teacher_precision: fp32"):
        ready([InFloat().eval()], data, teacher_precision="bf16")


def test_what_was_done_to_the_teachers_is_told_and_recorded(tiny, run, store, events):
    config = tiny(ladder=[FP32, W8, {**W4, "teacher": "dense"}], distill=CHEAP)
    records = run(config, store, events)
    told = [event.text for event in events if event.kind == "message"]
    assert [text.partition(" of 2 batch norms folded, in bfloat16; ")[0] for text in told] == [
        "the teacher: 2",
        "teacher 0: 2",
        "teacher 1: 2",
    ]
    assert "cheap_teachers" not in records[0].metrics
    done = json.loads((store.stages / records[2].key / "stage.json").read_text())["metrics"]
    assert [each["folded"] for each in done["cheap_teachers"]] == [2, 2]
    assert all(0 <= each["flips"] < 0.1 for each in done["cheap_teachers"])


def test_a_cheap_teacher_changes_the_student_a_little(tiny, run, tmp_path):
    losses = []
    for number, distill in enumerate(({}, CHEAP)):
        records = run(tiny(ladder=[FP32, W4], distill=distill), Store(tmp_path / str(number)))
        losses.append(records[1].metrics["train_loss"])
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


@pytest.mark.parametrize(
    "option", [{"teacher_precision": "bf16"}, {"fold_batch_norm": True}, {"cache_teacher": True}]
)
def test_what_makes_a_teacher_cheap_enters_the_key_of_who_it_teaches_only(tiny, option):
    still = {"train": {"epochs": 1, "augment": False}}

    def keys(**changes):
        rungs = [FP32, {**W8, "teacher": "none"}, {**W4, "teacher": "fp32", "init": "fp32"}]
        return [stage.key for stage in make_plan(tiny(ladder=rungs, **still, **changes)).stages]

    before, after = keys(), keys(distill=option)
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, True, False]
    off = {"teacher_precision": "fp32", "fold_batch_norm": False, "cache_teacher": False}
    assert keys(distill=off) == before


def test_a_stage_whose_teacher_does_not_run_in_bfloat16_fails_with_the_way_out(
    tiny, run, store, tmp_path, monkeypatch
):
    (tmp_path / "in_float_net.py").write_text(
        "import torch\nfrom torch import nn\n\n\nclass Net(nn.Module):\n"
        "    def __init__(self, num_classes, in_channels, image_size):\n"
        "        super().__init__()\n"
        "        self.fc = nn.Linear(image_size**2, num_classes)\n\n"
        "    def forward(self, x):\n"
        "        return self.fc(x.flatten(1) + torch.ones(x[0].numel()))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    config = tiny(model={"name": "in_float_net:Net"}, ladder=[FP32, W8], distill=CHEAP)
    with pytest.raises(StageError, match="teacher_precision: fp32"):
        run(config, store)

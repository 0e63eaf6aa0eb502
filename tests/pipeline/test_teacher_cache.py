"""Logits of teachers that are kept for a whole stage."""

import pytest
import torch
from bitladder.pipeline import distill_check
from bitladder.pipeline.cheap_teachers import ready_teachers
from bitladder.pipeline.config_distill import DistillConfig
from bitladder.pipeline.config_load import parse_config
from bitladder.pipeline.data import DATASETS, TensorSplit
from bitladder.pipeline.data.augment import Augmentation
from bitladder.pipeline.errors import ConfigError, Interrupted, StageError
from bitladder.pipeline.runner import open_ladder, run_ladder, run_stage
from bitladder.pipeline.store import Store
from bitladder.pipeline.teacher_cache import CachedLogits
from bitladder.pipeline.teachers import Teachers
from stop_after import StopAfter
from torch import nn

FP32 = {"weight_bits": 32, "activation_bits": 32}
W8 = {"weight_bits": 8, "activation_bits": 8}
W4 = {"weight_bits": 4, "activation_bits": 4}
STILL = {"epochs": 2, "optimizer": {"lr": 0.1}, "calibration_batches": 2, "augment": False}
CACHED = {"distill": {"cache_teacher": True}, "train": STILL}
RUN = {"batch_size": 100, "seed": 3, "device": torch.device("cpu")}


@pytest.fixture(scope="module")
def data():
    return DATASETS["digits"].factory()


def teacher(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval().requires_grad_(False)


def cached(data, networks, **distill):
    config = DistillConfig(cache_teacher=True, **distill)
    return ready_teachers(networks, config, data, augment=False, **RUN)[0]


def epochs(data, count, start=0):
    """All batches of some epochs with their step's number."""
    per_epoch = data.train.num_batches(100)
    for epoch in range(start, count):
        batches = data.train.batches(100, seed=3, epoch=epoch, augment=False, device="cpu")
        for batch, (x, _) in enumerate(batches):
            yield epoch * per_epoch + batch, x


def test_what_is_cached_is_what_each_teacher_says_of_every_batch(data):
    networks = [teacher(0), teacher(1)]
    kept, asked = cached(data, networks), Teachers(networks)
    assert len(kept) == len(asked) == 2
    assert list(kept) == []  # nothing runs in a step
    for step, x in epochs(data, 2):
        for one, other in zip(kept(x, step), asked(x, step), strict=True):
            torch.testing.assert_close(one.logits, other.logits)


def test_it_can_begin_in_mid_epoch_and_go_back(data):
    kept, batches = cached(data, [teacher()]), dict(epochs(data, 3))
    for step in (20, 3, max(batches)):
        torch.testing.assert_close(kept(batches[step], step)[0].logits, teacher()(batches[step]))


def test_a_teacher_that_is_left_out_says_nothing(data):
    kept = cached(data, [teacher(0), teacher(1)])
    step, x = next(epochs(data, 1))
    one, other = kept(x, step, left_out=frozenset({0}))
    assert one is None
    torch.testing.assert_close(other.logits, teacher(1)(x))


def test_cached_logits_can_be_saved_for_a_backward_pass(data):
    step, x = next(epochs(data, 1))
    (outputs,) = cached(data, [teacher()])(x, step)
    weight = torch.ones((), requires_grad=True)
    (outputs.logits * weight).sum().backward()
    torch.testing.assert_close(weight.grad, outputs.logits.sum())


def test_the_order_of_an_epoch_is_that_of_its_batches():
    images = torch.zeros(41, 1, 4, 4, dtype=torch.uint8)
    split = TensorSplit(images, torch.arange(41), mean=(0.0,), std=(1.0,))
    batches = split.batches(8, seed=1, epoch=2, augment=False, device="cpu")
    order = split.order(8, seed=1, epoch=2)
    assert len(order) == 40  # a batch of one is left out
    assert torch.equal(torch.cat([labels for _, labels in batches]), order)
    table = CachedLogits([torch.arange(41.0)[:, None]], split, batch_size=8, seed=1)
    assert torch.equal(table.of_step(2 * 5 + 4)[0][:, 0].long(), order[32:])


def test_a_ladder_with_cached_teachers_resumes_to_the_same_bits(tiny, tmp_path):
    rungs = [FP32, W8, {**W4, "distill": {"teacher": "dense", "drop": 1}}]
    config = tiny(ladder=rungs, **CACHED)
    whole = [record.sha256 for record in run_ladder(open_ladder(config, tmp_path / "whole"))]
    ladder = open_ladder(config, tmp_path / "stopped")
    for stage in ladder.plan.stages[:2]:
        run_stage(ladder, stage, lambda: None)
    with pytest.raises(Interrupted):
        run_stage(ladder, ladder.plan.stages[2], StopAfter(15))  # in its second epoch
    assert [record.sha256 for record in run_ladder(ladder)] == whole


def test_a_cache_gives_the_accuracy_of_asking(tiny, run, tmp_path):
    losses = []
    for distill in ({}, {"cache_teacher": True}):
        config = tiny(ladder=[FP32, W4], train=STILL, distill=distill)
        record = run(config, Store(tmp_path / str(len(losses))))[1]
        losses.append(record.metrics["train_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"distill": {"cache_teacher": True}},
            "distill.cache_teacher: needs the same images in each epoch, and digits augments them "
            "(crop: 1); give train.augment: false, or take cache_teacher out",
        ),
        (
            {
                "train": {"augment": False},
                "distill": {
                    "cache_teacher": True,
                    "features": {"name": "fitnets", "layers": ["conv2"]},
                },
            },
            "distill.cache_teacher: keeps logits, and distill.features needs inner layers; take "
            "one of them out",
        ),
    ],
)
def test_what_cannot_be_cached_is_refused_with_the_config(changes, expected):
    with pytest.raises(ConfigError) as caught:
        parse_config({"name": "mine", "ladder": [FP32, W4], **changes})
    assert caught.value.errors == [expected]


@pytest.mark.parametrize(
    "changes",
    [
        {"data": {"name": "digits", "crop": 0}},
        {"train": {"augment": False}},
        {"distill": {"cache_teacher": True, "teacher": "none"}},
    ],
)
def test_a_cache_is_allowed_where_no_image_varies_or_nobody_teaches(changes):
    distill = {"cache_teacher": True}
    assert parse_config({"name": "mine", "ladder": [FP32, W4], "distill": distill, **changes})


def test_images_that_vary_though_no_option_says_so_fail_the_stage(tiny, run, store, monkeypatch):
    monkeypatch.setattr(distill_check, "_augmentation", lambda data: "")
    config = tiny(ladder=[FP32, W4], distill={"cache_teacher": True})
    with pytest.raises(StageError, match=r"give train\.augment: false, or take cache_teacher out"):
        run(config, store)


def test_a_split_knows_whether_its_images_vary(data):
    assert data.train.varies
    assert not Augmentation().varies
    assert Augmentation(flip=True).varies

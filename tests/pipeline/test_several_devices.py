import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from bitladder.models import build_model
from bitladder.models.tapped import Outputs
from bitladder.pipeline import teacher_cache
from bitladder.pipeline.config import BinRegularizationConfig, OscillationConfig, TrainConfig
from bitladder.pipeline.config_distill import DistillConfig
from bitladder.pipeline.config_load import parse_config
from bitladder.pipeline.data.augment import Augmentation
from bitladder.pipeline.data.order import Share
from bitladder.pipeline.data.split import TensorSplit
from bitladder.pipeline.distributed import own_share, synchronised
from bitladder.pipeline.errors import ConfigError, Interrupted, StageError
from bitladder.pipeline.learner import Learner, Objective
from bitladder.pipeline.machine import device_mistakes, own_threads
from bitladder.pipeline.plan import make_plan
from bitladder.pipeline.runner import open_ladder, run_ladder
from bitladder.pipeline.store import Store
from bitladder.pipeline.teacher_cache import CachedLogits
from bitladder.quant import (
    QuantizerChoice,
    QuantPolicy,
    calibrate,
    quantize_model,
    world,
)
from torch import nn

BINS = {"weight": 0.1, "activation": 0.01, "freeze_weight_scale": True, "warmup": 0.4}
CONFIG = {
    "name": "shared",
    "runtime": {"threads": 1, "device": "cpu"},
    "data": {"name": "digits", "batch_size": 301},  # not alike for two, and a smaller last batch
    "model": {"name": "dropping:Net"},
    "train": {
        "epochs": 3,
        "optimizer": {"lr": 0.1},
        "averaging": {"name": "ema"},
        "calibration_batches": 2,
        "devices": 2,
    },
    "oscillation": {"track": True},
    "bin_regularization": BINS,
    "ladder": [{"weight_bits": 4, "activation_bits": 4}],
}
# what it drops is drawn from the global generators, another one in each process
DROPPING = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, num_classes, in_channels, image_size):
        super().__init__(
            nn.Conv2d(in_channels, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Conv2d(8, 16, 3),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(64, num_classes),
        )
"""
SECONDS = 5.0  # until nothing of a process may be left
IMAGES = 7  # 4 and 3


def config(**changes):
    return parse_config({**CONFIG, **changes})


def one_rung_of(network):
    """An epoch in full precision, by two processes."""
    return config(
        model={"name": network},
        bin_regularization={},
        train={"epochs": 1, "devices": 2},
        ladder=[{"weight_bits": 32, "activation_bits": 32}],
    )


def run(settings, store, listener=lambda event: None):
    return run_ladder(open_ladder(settings, store, listener))


def ranks(parent=None):
    """The processes of a stage by their number."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            above = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            environment = dict(
                line.split(b"=", 1)
                for line in (folder / "environ").read_bytes().split(b"\0")
                if b"=" in line
            )
        except (OSError, IndexError):
            continue  # it has just ended
        if b"bitladder.pipeline.rank" in words and above == (parent or os.getpid()):
            found[int(environment[b"RANK"])] = int(folder.name)
    return found


def alive(pids):
    """Those of the processes that run."""

    def runs(pid):
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    return [pid for pid in pids if runs(pid)]


def all_end(pids):
    deadline = time.monotonic() + SECONDS
    while alive(pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(pids)


class Once:
    """A listener that does something when the stage is so far for the first time."""

    def __init__(self, kind, act):
        self.kind, self.act, self.done = kind, act, False

    def __call__(self, event):
        if event.kind == self.kind and not self.done:
            self.done = True
            self.act()


@pytest.fixture(scope="module", autouse=True)
def networks(tmp_path_factory):
    """Networks of somebody else, as files that all processes can import."""
    folder = tmp_path_factory.mktemp("networks")
    (folder / "dropping.py").write_text(DROPPING)
    (folder / "failing_on_one.py").write_text(FAILING)
    (folder / "lost_first.py").write_text(LOST_FIRST)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The record of the stage, trained by two processes to its end."""
    (record,) = run(config(), Store(tmp_path_factory.mktemp("undisturbed")))
    return record


# -- the law: two processes give the gradients of one ---------------------------------------


def split():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (IMAGES, 1, 8, 8), generator=generator, dtype=torch.uint8)
    augmentation = Augmentation(crop=1)
    return TensorSplit(
        pixels, torch.arange(IMAGES), mean=(0.5,), std=(0.3,), augmentation=augmentation
    )


def gradients_here(method, loss):
    """Of one step with bin regularization, a teacher, and batch norm as in evaluation."""
    torch.set_num_threads(1)
    share = own_share()
    batches = split().batches(IMAGES, seed=1, epoch=0, augment=True, device="cpu", share=share)
    x, targets = next(batches)
    world.set_part(len(targets), IMAGES)
    probed, _ = next(split().evaluation_batches(IMAGES, "cpu"))
    student = build_model("tiny_convnet", num_classes=10, in_channels=1, image_size=8, seed=0)
    policy = QuantPolicy(
        weight_bits=3, activation_bits=3, activation=QuantizerChoice(method), first_last_bits=8
    )
    student = quantize_model(student, policy, inputs=probed)
    calibrate(student, [probed])
    bins = BinRegularizationConfig(
        weight=0.5, activation=0.5, warmup=0.0, attach_activation_scale=True
    )
    objective = Objective(TrainConfig(), DistillConfig(loss=loss), bins, OscillationConfig())
    learner = Learner(student, objective).train()
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    run = synchronised(learner, x) if share.of > 1 else learner
    terms = run(x, targets, [Outputs(teacher_says(x))], 0.5)
    total = terms["total"]
    (total * (world.size() / world.ratio())).backward()
    value = world.summed(total.detach() / world.ratio())
    gradients = {name: p.grad for name, p in learner.named_parameters() if p.grad is not None}
    state = dict(learner.named_buffers())
    return {"value": value, "gradients": gradients, "state": state, "images": len(targets)}


def teacher_says(x):
    return torch.stack([x.mean((1, 2, 3)) * k for k in range(10)], 1)


def one_of_two(rank, folder, cases):
    store = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    torch.save([gradients_here(*case) for case in cases], folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


# the methods of the activations, and the losses, that look at more than one image
CASES = [(method, "kl") for method in ("lsq", "range_linear", "nulsq", "n2uq", "lcq", "pact")]
CASES.append(("lsq", "dist"))


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """For each case what each of two processes has."""
    folder = tmp_path_factory.mktemp("both")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bitladder.pipeline.distributed"])
    pair = [
        context.Process(target=one_of_two, args=(rank, folder, CASES), daemon=True)
        for rank in (0, 1)
    ]
    for process in pair:
        process.start()
    for process in pair:
        process.join(120)
        assert process.exitcode == 0
    told = [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]
    return dict(zip(CASES, zip(*told, strict=True), strict=True))


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_two_processes_give_the_gradients_of_one(both, case):
    alone = gradients_here(*case)
    assert [own["images"] for own in both[case]] == [4, 3]
    for own in both[case]:
        torch.testing.assert_close(own["value"], alone["value"], rtol=1e-5, atol=1e-6)
        assert own["gradients"].keys() == alone["gradients"].keys()
        for name, gradient in alone["gradients"].items():
            size = float(gradient.abs().max())
            torch.testing.assert_close(
                own["gradients"][name], gradient, rtol=1e-4, atol=1e-5 * size + 1e-9, msg=name
            )
        for name, buffer in alone["state"].items():
            torch.testing.assert_close(own["state"][name], buffer, msg=name)


def test_all_processes_apply_the_same_gradients(both):
    for first, second in both.values():
        for name, gradient in first["gradients"].items():
            assert torch.equal(gradient, second["gradients"][name])


# -- parts of a batch -----------------------------------------------------------------------


@pytest.mark.parametrize("devices", [2, 3, 5])
def test_the_shares_of_a_batch_put_together_are_the_batch_of_one_device(devices):
    settings = {"seed": 3, "epoch": 2, "augment": True, "device": "cpu"}
    pixels = torch.arange(53 * 64, dtype=torch.int64).remainder(251).to(torch.uint8)
    data = TensorSplit(
        pixels.view(53, 1, 8, 8),
        torch.arange(53),
        mean=(0.5,),
        std=(0.3,),
        augmentation=Augmentation(crop=1, flip=True),
    )
    shares = [
        list(data.batches(20, share=Share(number, devices), **settings))
        for number in range(devices)
    ]
    whole = list(data.batches(20, **settings))
    assert {len(own) for own in shares} == {data.num_batches(20, shares=devices)} == {len(whole)}
    for number, (x, y) in enumerate(whole):
        assert data.images_in(number, 20, shares=devices) == len(y)
        assert torch.equal(torch.cat([own[number][0] for own in shares]), x)
        assert torch.equal(torch.cat([own[number][1] for own in shares]), y)


def test_cached_logits_are_those_of_the_own_part_of_a_batch(monkeypatch):
    images = torch.zeros(25, 1, 4, 4, dtype=torch.uint8)
    data = TensorSplit(images, torch.arange(25), mean=(0.0,), std=(1.0,))
    table = torch.arange(25.0)[:, None]  # what the teacher says of an image is its number
    cache = CachedLogits([table], data, batch_size=10, seed=4)
    settings = {"seed": 4, "epoch": 1, "augment": False, "device": "cpu"}
    for number in (0, 1):
        monkeypatch.setattr(teacher_cache, "own_share", lambda number=number: Share(number, 2))
        batches = data.batches(10, share=Share(number, 2), **settings)
        for step, (_, labels) in enumerate(batches, start=3):
            (told,) = cache.of_step(step)
            assert torch.equal(told[:, 0], labels.float())


def test_a_last_batch_without_two_images_for_each_device_is_left_out():
    images = torch.zeros(25, 1, 4, 4, dtype=torch.uint8)
    data = TensorSplit(images, torch.zeros(25), mean=(0.0,), std=(1.0,))
    assert [data.num_batches(10, shares=n) for n in (1, 2, 3, 5)] == [3, 3, 2, 2]
    assert len(data.order(10, seed=0, epoch=0, shares=3)) == 20


# -- what a config may say ------------------------------------------------------------------


def test_one_device_is_what_a_stage_is_anyway_and_two_are_another():
    def keys(**train):
        changed = config(train={"epochs": 3, "optimizer": {"lr": 0.1}, **train})
        return [stage.key for stage in make_plan(changed).stages]

    assert keys(devices=1) == keys()
    assert keys(devices=2) != keys()
    assert keys(devices=2) != keys(devices=3)


def test_a_batch_too_small_for_the_devices_is_refused_with_the_other_mistakes():
    with pytest.raises(ConfigError) as caught:
        config(
            data={"name": "digits", "batch_size": 5},
            train={"devices": 3},
            ladder=[{"weight_bits": 4, "activation_bits": 4, "quantizer": {"weight": "nothing"}}],
        )
    assert len(caught.value.errors) == 2
    (small,) = [error for error in caught.value.errors if "devices" in error]
    assert "devices: 3 of them need a data.batch_size of at least 6" in small


def test_a_machine_without_enough_gpus_says_which_rung_wants_them(monkeypatch):
    monkeypatch.setattr(
        "bitladder.pipeline.machine.choose_device", lambda wanted: torch.device(wanted)
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_mistakes("cuda", [1, 2]) == []
    assert device_mistakes("cuda", [1, 3]) == [
        "ladder.1.train.devices: 3 are wanted, and CUDA has 2 here"
    ]
    (single,) = device_mistakes("cuda:1", [1, 2])
    assert "is one device" in single
    assert device_mistakes("cuda:1", [1, 1]) == []


def test_threads_are_shared_out_and_nobody_goes_without(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(7)), raising=False)
    assert [own_threads(n) for n in (1, 2, 7, 9)] == [7, 3, 1, 1]


# -- a stage, and what may befall it --------------------------------------------------------


def test_a_stage_on_two_devices_learns_and_says_how_it_was_trained(undisturbed):
    assert undisturbed.environment["devices"] == 2
    assert undisturbed.environment["threads"] == 1
    assert undisturbed.metrics["epochs"] == 3
    assert undisturbed.metrics["max_levels"] <= 2**8
    assert undisturbed.metrics["test_top1"] > 0.15  # chance is 0.1


def test_a_killed_rank_fails_the_stage_and_a_second_run_goes_on(undisturbed, tmp_path):
    store, settings, pids = Store(tmp_path), config(), []

    def kill():
        found = ranks()
        pids.extend(found.values())
        os.kill(found[1], signal.SIGKILL)

    with pytest.raises(StageError, match=r"rank 1 of 2: its process ended by SIGKILL"):
        run(settings, store, Once("epoch", kill))
    assert len(pids) == 2
    assert all_end(pids)
    begun = []
    (record,) = run(settings, store, begun.append)
    assert begun[0].epoch == 1  # not from the beginning
    assert record.sha256 == undisturbed.sha256


def test_sigterm_saves_and_a_second_run_ends_with_the_same_bits(undisturbed, tmp_path):
    store, settings = Store(tmp_path), config()
    term = Once("step", lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted) as caught:
        run(settings, store, term)
    assert caught.value.signal_number == signal.SIGTERM
    assert not ranks()
    (record,) = run(settings, store)
    assert record.sha256 == undisturbed.sha256


FAILING = """
import os
from torch import nn

class Net(nn.Sequential):
    def __init__(self, num_classes, in_channels, image_size):
        super().__init__(nn.Flatten(), nn.Linear(in_channels * image_size**2, num_classes))

    def forward(self, x):
        if os.environ.get("RANK") == "1" and self.training:
            raise ArithmeticError("no more numbers")
        return super().forward(x)
"""


def test_an_exception_in_one_rank_is_told_with_its_text(tmp_path):
    settings = one_rung_of("failing_on_one:Net")
    with pytest.raises(StageError, match="rank 1 of 2: ArithmeticError: no more numbers"):
        run(settings, Store(tmp_path))
    assert not ranks()


LOST_FIRST = """
import os, signal, socket, time
from torch import nn

class Net(nn.Sequential):
    def __init__(self, num_classes, in_channels, image_size):
        super().__init__(nn.Flatten(), nn.Linear(in_channels * image_size**2, num_classes))

    def forward(self, x):
        if os.environ.get("RANK") == "1" and self.training:
            for name in os.listdir("/proc/self/fd"):
                try:
                    with socket.socket(fileno=os.dup(int(name))) as end:
                        if end.family == socket.AF_INET:
                            end.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass  # no socket, or not connected
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)
"""


def test_a_rank_whose_death_another_notices_first_is_the_one_that_is_named(tmp_path):
    settings = one_rung_of("lost_first:Net")
    # by gloo's abort where it notices in time that its own end is gone
    with pytest.raises(StageError, match=r"rank 1 of 2: its process ended by SIG(KILL|ABRT)"):
        run(settings, Store(tmp_path))
    assert not ranks()


LADDER = """
import sys
from bitladder.pipeline.runner import open_ladder, run_ladder
from test_several_devices import config

settings = config(train={"epochs": 500, "devices": 2})
run_ladder(open_ladder(settings, sys.argv[1], lambda event: print(event.kind, flush=True)))
"""


def test_ranks_end_with_a_killed_parent(tmp_path):
    paths = os.pathsep.join(sys.path)
    ladder = subprocess.Popen(
        [sys.executable, "-c", LADDER, str(tmp_path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": paths},
        text=True,
    )
    assert ladder.stdout is not None
    with ladder.stdout as told:
        for line in told:
            if line.startswith(("step", "epoch")):
                break
        pids = list(ranks(ladder.pid).values())
        ladder.kill()
        ladder.wait()
        assert len(pids) == 2
        assert all_end(pids)
        told.read()  # the pipe ends: nobody holds it

"""Every shipped config loads, fits its network and its data, and its rungs train."""

import gzip
import hashlib
import math
import pickle
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from bitladder.flows.components import show_components
from bitladder.pipeline.config_load import load_config, shipped_configs
from bitladder.pipeline.plan import make_plan
from bitladder.pipeline.runner import open_ladder, run_ladder
from bitladder.pipeline.store import Store
from PIL import Image

EMBEDDED = "digits"
NAMES = list(shipped_configs())
as_shipped = cache(load_config)  # each check of a config builds its networks
OF_IMAGENET = [name for name in NAMES if name.startswith("imagenet/")]
# the others differ from these in the lengths, or in what a rung of their own tests covers
TRAINED = ["mnist", "cifar10_folder", "apot/chain", "ta/chain", "ta/hop"]
TRAINED += ["binary/bireal", "binary/react", "br/w1a2"]
SMALLER = {  # options of a network that do not change what it is made of
    "preact_resnet8": ["model.width=4"],
    "preact_resnet20": ["model.width=4"],
    "cifar_resnet20": ["model.width=4"],
    "cifar_resnet18": ["model.width=8"],
}
SMALLER_TEACHER = {"imagenet/resnet18_n2uq": ["ladder.0.model.width_per_group=4"]}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A root with a few images in the form of every set that has to be fetched."""
    root = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    _write_mnist(root / "MNIST" / "raw", random)
    _write_mnist(root / "FashionMNIST" / "raw", random)
    _write_images(root / "small", random, size=32, classes=8, train=4, test=1)
    _write_images(root / "large", random, size=70, classes=4, train=2, test=1)
    with pytest.MonkeyPatch.context() as patch:
        _write_cifar(root, random, patch)
        yield root


def _write_mnist(folder, random):
    folder.mkdir(parents=True)
    for prefix, count in (("train", 20), ("t10k", 10)):
        images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, array.ndim])
            header += b"".join(n.to_bytes(4, "big") for n in array.shape)
            path = folder / f"{prefix}-{kind}-ubyte.gz"
            path.write_bytes(gzip.compress(header + array.tobytes()))


def _write_cifar(root, random, patch):
    """Both sets, with the files' own checksums in place of the published ones."""
    from torchvision.datasets import CIFAR10, CIFAR100

    for kind, labels, classes in ((CIFAR10, "label", 10), (CIFAR100, "fine_label", 100)):
        folder = root / kind.base_folder
        folder.mkdir()

        def write(name: str, content: dict, folder: Path = folder) -> str:
            (folder / name).write_bytes(pickle.dumps(content))
            return hashlib.md5((folder / name).read_bytes()).hexdigest()

        for part, count in (("train", 20), ("test", 10)):
            pixels = random.integers(0, 256, (count, 3072), dtype=np.uint8)
            content = {"data": pixels, f"{labels}s": [i % 10 for i in range(count)]}
            patch.setattr(kind, f"{part}_list", [[part, write(part, content)]])
        names = {f"{labels}_names": [f"class {i}" for i in range(classes)]}
        meta = {"filename": "meta", "key": f"{labels}_names", "md5": write("meta", names)}
        patch.setattr(kind, "meta", meta)


def _write_images(root, random, *, size, classes, train, test):
    """Blots on noise, a colour a class."""
    for part, count in (("train", train), ("test", test)):
        for label in range(classes):
            folder = root / part / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 256, (size, size + 6, 3), dtype=np.uint8)
                image = Image.fromarray(pixels)
                image.paste((30 * label, 128, 255 - 30 * label), (8, 8, size - 8, size - 8))
                image.crop((0, 0, size, size)).save(folder / f"{index}.png")


def place(name, data):
    """What brings a config to the few images."""
    config = as_shipped(name)
    if config.data.name == EMBEDDED:
        return []
    if config.data.name != "image_folder":
        limit = ["data.limit=15"] if "limit" in config.data.options else []
        return [f"data.root={data}", "data.download=false", *limit]
    kind = "large" if name in OF_IMAGENET else "small"
    smaller = ["data.image_size=64", "data.workers=0"] if name in OF_IMAGENET else []
    return [f"data.root={data / kind}", f"data.cache={data / 'cache'}", *smaller]


def one_step_a_rung(name):
    """What makes a config train every rung for one epoch of a batch or two."""
    config = as_shipped(name)
    rungs = [f"ladder.{index}.epochs=1" for index in range(len(config.ladder))]
    small = ["train.calibration_batches=1", "train.batch_norm_batches=1", "runtime.threads=1"]
    batch = 1024 if config.data.name == EMBEDDED else 32
    return [
        *rungs,
        *small,
        f"data.batch_size={batch}",
        *SMALLER.get(config.model.name, []),
        *SMALLER_TEACHER.get(name, []),
    ]


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_fits_its_network_and_its_data(name, data, tmp_path):
    ladder = open_ladder(load_config(name, place(name, data)), Store(tmp_path))
    stages = ladder.plan.stages
    assert len({stage.key for stage in stages}) == len(ladder.plan.config.ladder)


@pytest.mark.parametrize(
    "name",
    [
        *(
            pytest.param(name, marks=pytest.mark.slow) if "resnet18" in name else name
            for name in OF_IMAGENET
        ),
        *TRAINED,
    ],
)
def test_every_rung_of_a_recipe_trains(name, data, tmp_path):
    overrides = [*place(name, data), *one_step_a_rung(name)]
    records = run_ladder(open_ladder(load_config(name, overrides), Store(tmp_path)))
    assert len(records) == len(as_shipped(name).ladder)
    for record in records:
        assert record.metrics["epochs"] == 1
        assert math.isfinite(record.metrics["train_loss"])
        assert record.metrics["test_images"] >= 4


@pytest.mark.parametrize("name", [n for n in NAMES if as_shipped(n).data.name == EMBEDDED])
def test_a_recipe_on_embedded_data_plans_as_it_is(name):
    config = as_shipped(name)
    assert make_plan(config).run.startswith(f"{config.name}-")


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("study/")])
def test_a_recipe_opens_with_its_command_what_it_is_and_what_was_measured(name):
    first, *rest = shipped_configs()[name].read_text(encoding="utf-8").splitlines()
    command, _, what = first.partition("    ")
    assert command.startswith(f"# bitladder run {name}")
    assert what
    comment = " ".join(line for line in rest if line.startswith("#"))
    told = ("Not measured here", "benchmarks/", "bitladder study")
    assert any(words in comment for words in told)


def test_the_list_of_configs_says_what_each_is_and_what_it_needs(capsys):
    show_components("configs", None, "markdown")
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    rows = {row[0].removeprefix("| "): row[1:] for row in rows if len(row) == 3}
    assert {name for name in rows if name in NAMES} == set(NAMES)
    assert rows["imagenet/mobilenet_v2"] == [
        "MobileNetV2, oscillations frozen",
        "--set data.root=FOLDER |",
    ]

"""A shipped file at work: the classes of image files."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError

from .data.augment import normalise
from .data.bundle import DataError
from .data.decode import read_all
from .data.listing import EXTENSIONS
from .derived import format_of
from .errors import ConfigError
from .packed_description import LARGEST_SIDE, PackedImages
from .packed_file import read_packed
from .runtimes import Opened, in_pytorch, needed, open_onnx

BATCH = 64


@dataclass(frozen=True)
class Prediction:
    """An image, and its likeliest classes with their probabilities, the first one first."""

    image: Path
    classes: tuple[tuple[str, float], ...]


def predict(
    file: Path, images: Sequence[Path], *, top: int = 1, trust: Collection[str] = ()
) -> list[Prediction]:
    """Classifies image files, and those in folders, with a packed or an ONNX file.

    Images are scaled to the network's size by their shorter side, and the middle is taken.

    Raises:
        ConfigError: a file that cannot be used; all of them at once.
    """
    run, facts, channels, size = _open(file, trust)
    files = _files(images)
    try:
        pixels, read = read_all(
            [str(f) for f in files], size=size, resize=True, channels=channels, on_error="fail"
        )
    except DataError as error:
        raise ConfigError([str(error)]) from None
    assert bool(read.all())
    found = []
    count = min(top, len(facts.classes))
    mean, std = torch.tensor(facts.mean), torch.tensor(facts.std)
    for first in range(0, len(files), BATCH):
        x = normalise(pixels[first : first + BATCH], mean, std)
        logits = run(x)
        if logits.shape[1] != len(facts.classes):
            message = f"it names {len(facts.classes)} classes and has {logits.shape[1]} logits"
            raise ConfigError([f"{file}: {message}; export it again"])
        shares, places = logits.softmax(1).topk(count, dim=1)
        for image, row, chosen in zip(
            files[first : first + BATCH], shares.tolist(), places.tolist(), strict=True
        ):
            named = ((facts.classes[p], share) for p, share in zip(chosen, row, strict=True))
            found.append(Prediction(image, tuple(named)))
    return found


def _open(file: Path, trust: Collection[str]) -> tuple[Opened, PackedImages, int, int]:
    """What runs the file, and the images that it takes."""
    form = format_of(file)
    if form == "onnx":
        facts, channels, size = _onnx_facts(file)
        return open_onnx(file, threads=torch.get_num_threads()), facts, channels, size
    if form == "openvino":
        raise ConfigError(
            [f"{file}: give a packed or an ONNX file of it; bitladder export makes one"]
        )
    packed = read_packed(file, trust=trust)
    network, images = packed.description.network, packed.description.images
    return in_pytorch(packed.model), images, network.in_channels, network.image_size


def _onnx_facts(file: Path) -> tuple[PackedImages, int, int]:
    onnx = needed("onnx")
    try:
        model = onnx.load(file)
        properties = {entry.key: entry.value for entry in model.metadata_props}
        facts = PackedImages.model_validate(json.loads(properties["images"]))
        shape = model.graph.input[0].type.tensor_type.shape.dim
        channels, side = shape[1].dim_value, shape[2].dim_value
        if not len(facts.mean) == len(facts.std) == channels or not 1 <= side <= LARGEST_SIDE:
            raise ValueError("its input is not made of the images that it describes")
        return facts, channels, side
    except OSError as error:
        raise ConfigError([f"{file}: {error.strerror or error}"]) from None
    except (KeyError, ValueError, IndexError, ValidationError):
        raise ConfigError(
            [f"{file}: not an ONNX file of Bitladder: bitladder export --format onnx makes one"]
        ) from None
    except Exception as error:  # protobuf's own
        raise ConfigError([f"{file}: cannot be read as ONNX: {error}"]) from None


def _files(given: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    errors = []
    for path in given:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix[1:].lower() in EXTENSIONS)
            files += inside
            errors += [] if inside else [f"{path}: no images in this folder"]
        elif path.is_file():
            files.append(path)
        else:
            errors.append(f"{path}: no such file")
    if errors:
        raise ConfigError(errors)
    return files

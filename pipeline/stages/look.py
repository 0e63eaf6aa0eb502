"""Look inside a trained network: what its quantizers do, where its teacher says otherwise."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...quant.views import layer_views
from ..data.split import Split
from ..files import write_atomic
from ..fit import EVALUATION_BATCH
from ..network import load_network, load_teacher
from ..record import LOOK, StageRecord
from .base import STAGES, StageContext, StageOutput

IMAGES, BATCH = 256, 64  # that layers are looked at with
PAIRS, EXAMPLES = 100, 12  # of what two networks say otherwise
LARGEST = 96  # pixels of an example's side


@STAGES.register("look")
def look(context: StageContext) -> StageOutput:
    """Writes the views of all layers, and how the network and its teachers classify validation."""
    record, data, device = context.parents["network"], context.data, context.device
    network, validation = load_network(context.store, record, device), data.validation
    images = min(IMAGES, len(validation))
    # the same images for every rung and seed: their histograms are comparable
    seen = validation.calibration(BATCH, IMAGES // BATCH, seed=0, augment=False, device=device)
    found: dict[str, Any] = {"images": images, "layers": layer_views(network, seen)}
    teachers = _teachers(context, record)
    found["teachers"] = []
    if teachers:
        said = _classes(network, validation, device)
        for role, teacher in teachers.items():
            asked = _classes(load_teacher(context.store, teacher, device), validation, device)
            compared = _compare(said, asked, validation)
            found["teachers"].append({"role": role, "key": teacher.key, **compared})
    found["classes"] = list(data.class_names)
    text = json.dumps(found, allow_nan=False, separators=(",", ":"))
    write_atomic(context.around.workdir / LOOK, text.encode())
    return StageOutput((LOOK,), record.network, {})


def _teachers(context: StageContext, trained: StageRecord) -> Mapping[str, StageRecord]:
    """The stages that it learned from; of candidates the one that was chosen."""
    above = {role: r for role, r in context.parents.items() if role.startswith("teacher")}
    chosen = trained.metrics.get("teacher_chosen")
    return {role: r for role, r in above.items() if chosen in (None, r.key)}


@torch.inference_mode()
def _classes(network: nn.Module, split: Split, device: torch.device) -> Tensor:
    """What a network takes each sample of a split for, (N,), on the CPU."""
    batches = split.evaluation_batches(EVALUATION_BATCH, device=device)
    return torch.cat([network(x).argmax(1) for x, _ in batches]).cpu()


def _compare(student: Tensor, teacher: Tensor, split: Split) -> dict[str, Any]:
    """How often which of two is right, what they say where they differ, and examples of it."""
    own, its = student == split.labels, teacher == split.labels
    differ = (student != teacher).nonzero()[:, 0]
    pairs, counts = torch.stack([teacher[differ], student[differ]], 1).unique(
        dim=0, return_counts=True
    )
    frequent = counts.argsort(descending=True, stable=True)[:PAIRS]
    return {
        "images": len(student),
        "both": int((own & its).sum()),
        "student": int((own & ~its).sum()),
        "teacher": int((its & ~own).sum()),
        "neither": int((~own & ~its).sum()),
        "pairs": torch.cat([pairs, counts[:, None]], 1)[frequent].tolist(),
        "examples": _examples(differ, student, teacher, split),
    }


def _examples(differ: Tensor, student: Tensor, teacher: Tensor, split: Split) -> list[Any]:
    """Images from the whole range of those on which two networks differ."""
    places = torch.linspace(0, len(differ) - 1, min(EXAMPLES, len(differ))).round().long()
    chosen = differ[places]
    examples = []
    for images, _ in split.samples(chosen, EXAMPLES, device="cpu"):
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (split.mean, split.std))
        pixels = ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
        examples += [
            {
                "png": _png(image),
                "target": int(split.labels[number]),
                "student": int(student[number]),
                "teacher": int(teacher[number]),
            }
            for image, number in zip(pixels, chosen.tolist(), strict=True)
        ]
    return examples


def _png(image: Tensor) -> str:
    """An image (C, H, W), uint8, as a PNG file in base64; large ones are made smaller."""
    from PIL import Image

    picture = Image.fromarray(image.permute(1, 2, 0).squeeze(2).contiguous().numpy())
    picture.thumbnail((LARGEST, LARGEST))
    file = io.BytesIO()
    picture.save(file, format="png")
    return base64.b64encode(file.getvalue()).decode()

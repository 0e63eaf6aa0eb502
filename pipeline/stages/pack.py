"""Pack a trained network into the file to ship, and measure what the file does."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...quant.metrics import layer_costs
from ...quant.policy import plan_from_dict
from ...quant.probing import probe
from ...quant.swap import float_state_dict
from ..errors import StageError
from ..fit import EVALUATION_BATCH
from ..network import build_network, load_network
from ..packed_description import PackedImages
from ..packed_file import read_packed, tensors_of, write_packed
from ..record import PACKED, StageRecord
from .base import STAGES, StageContext, StageOutput

MADE_OF = ("weight_bits", "activation_bits", "weight_quantizer", "activation_quantizer", "epochs")
MEASURED = ("val_top1", "test_top1", "test_images")


@STAGES.register("pack")
def pack(context: StageContext) -> StageOutput:
    """Writes the packed file, reads it back, and classifies the test set with what was read.

    Raises:
        StageError: the network from the file is not the one that was packed, bit for bit.
    """
    record, data, device = context.parents["network"], context.data, context.device
    trained = load_network(context.store, record, device)
    path = context.around.workdir / PACKED
    canonical = copy.deepcopy(trained).cpu()
    float_bytes = sum(
        4 * t.numel() for t in float_state_dict(trained).values() if t.is_floating_point()
    )
    write_packed(
        path,
        canonical,
        network=record.network,
        images=PackedImages(
            mean=list(data.mean), std=list(data.std), classes=list(data.class_names)
        ),
        made=_made(record),
    )
    name = record.network["name"]
    packed = read_packed(path, trust={name}).model  # the code made the network a moment ago
    compared = _compare(trained, canonical.to(device), packed.to(device), context)
    size = path.stat().st_size
    plain = build_network(record.network, seed=0)
    metrics = {
        **compared,
        "packed_bytes": size,
        "compression": float_bytes / size,
        "float_bytes": float_bytes,
        "parameters": sum(p.numel() for p in plain.parameters()),
        "layers": _costs(plain, record, tensors_of(path), context),
    }
    return StageOutput((PACKED,), record.network, metrics)


def _costs(
    plain: nn.Module, record: StageRecord, tensors: Mapping[str, Tensor], context: StageContext
) -> list[dict[str, Any]]:
    """What each layer costs: parameters, operations, and the bytes of its weight in the file."""
    images = next(iter(context.data.test.evaluation_batches(2, device="cpu")))
    found = probe(plain, [images])
    rows = layer_costs(found, plan_from_dict(record.network.get("quantization") or {}))
    for row in rows:
        name = row["layer"]
        row["parameters"] = sum(p.numel() for p in plain.get_submodule(name).parameters())
        parts = [f"{name}.codes", f"{name}.scale", f"{name}.codebook", f"{name}.weight"]
        stored = [tensors[part] for part in (*parts, f"{name}.layer.weight") if part in tensors]
        row["weight_bytes"] = sum(t.numel() * t.element_size() for t in stored)
    return rows


def _made(record: StageRecord) -> dict[str, Any]:
    """Where the network comes from, for the file."""
    stage = record.spec.options["stage"]
    teachers = [key for role, key in record.spec.parents.items() if role.startswith("teacher")]
    if chosen := record.metrics.get("teacher_chosen"):  # among the candidates
        teachers = [chosen]
    versions = {k: v for k, v in record.environment.items() if k in ("bitladder", "torch")}
    return {
        "stage": record.key,
        "weights_sha256": record.sha256,
        "teachers": teachers,
        "distillation": stage.get("distill", {}).get("loss") if teachers else None,
        **{name: record.metrics.get(name) for name in (*MADE_OF, *MEASURED)},
        **versions,
    }


@torch.inference_mode()
def _compare(
    trained: nn.Module, canonical: nn.Module, packed: nn.Module, context: StageContext
) -> Mapping[str, Any]:
    """Accuracy of the packed network on the test split, and on how many images it differs."""
    batches = context.data.test.evaluation_batches(EVALUATION_BATCH, device=context.device)
    images = right = flips = 0
    for x, targets in batches:
        logits = packed(x)
        if images == 0 and not torch.equal(logits, canonical(x)):
            raise StageError(
                context.around.name,
                "the network in the packed file is not the one that was packed",
                "this is a mistake of Bitladder's: please report it with the config",
            )
        found = logits.argmax(1)
        right += int((found == targets).sum())
        flips += int((found != trained(x).argmax(1)).sum())
        images += len(targets)
    return {"deployed_top1": right / images, "flips": flips, "test_images": images}

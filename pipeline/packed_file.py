"""A packed file: a network to ship in one safetensors file that says all about itself.

Its tensors are those of `quant/export/packed.py`; its metadata has one entry, `bitladder`: as JSON
the `description`, and the `sha256` of that and of every tensor. Nothing in it is code: a network
that is not one of ours or of torchvision is built only where its import path is trusted by name.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ..models import build_model, is_import_path, source_hash
from ..quant.core import QTensor, Target
from ..quant.export.packed import Coding, Packed, pack_network, unpack_network
from ..quant.policy import LayerPlan, plan_as_dict, plan_from_dict
from ..quant.quantizers import QUANTIZERS
from ..quant.swap import apply_plan, layer_plan
from .errors import ConfigError
from .few_parts import few_parts
from .files import write_atomic
from .network import in_fastest_format
from .packed_description import (
    Description,
    PackedCoding,
    PackedImages,
    PackedLayer,
    PackedNetwork,
    PackedQuantizer,
    described,
)

_ENTRY = "bitladder"  # a second one would come in any order, and the bytes would differ
CODES_PER_BYTE = 8  # at one bit: no network has more weights than that in a file
PARTS_PER_TENSOR = 8  # parameters that stand for one tensor: more than one where they are shared


@dataclass(frozen=True)
class PackedModel:
    """A network from a packed file.

    Attributes:
        model: canonical, in evaluation mode; its logits are those of the network that was packed,
            bit for bit.
        weights: its coded weights by layer name.
        sha256: of description and tensors.
    """

    model: nn.Module
    weights: Mapping[str, QTensor]
    description: Description
    sha256: str


def write_packed(
    path: Path,
    model: nn.Module,
    *,
    network: Mapping[str, Any],
    images: PackedImages,
    made: Mapping[str, Any],
) -> Description:
    """Packs a trained network, which itself becomes canonical, and writes the file atomically.

    Args:
        network: what `build_network` made it from.
    """
    plan = layer_plan(model)
    packed = pack_network(model)
    quantizers, codings = _Listed(), _Listed()
    layers = {}
    for name, record in plan_as_dict(plan).items():
        coding = packed.codings.get(name)
        layers[name] = PackedLayer(
            weight=quantizers.place(_placed("weight", record["weight"])),
            input=quantizers.place(_placed("activation", record["activation"])),
            codes=codings.place(PackedCoding(**coding.__dict__) if coding else None),
        )
    shape = {k: network[k] for k in ("name", "options", "num_classes", "in_channels", "image_size")}
    description = Description(
        network=PackedNetwork(**shape, source=source_hash(network["name"])),
        images=images,
        quantizers=quantizers.items,
        codings=codings.items,
        layers=layers,
        made=dict(made),
    )
    raw = description.model_dump(mode="json", exclude_none=True)
    entry = {"sha256": checksum(raw, packed.tensors), "description": raw}
    write_atomic(path, save(packed.tensors, {_ENTRY: _text(entry)}))
    return description


def read_packed(path: Path, *, trust: Collection[str] = ()) -> PackedModel:
    """The network in a packed file.

    Nothing is allocated beyond a small multiple of the file's size, whatever it claims.

    Args:
        trust: import paths (`package.module:factory`) whose code may be run.

    Raises:
        ConfigError: no such file, not a packed file, a damaged one, one of a newer format, or one
            whose network is not trusted or not the same code any more.
    """
    try:
        raw, stored, tensors = _read(path)
        description = described(raw)
        if checksum(raw, tensors) != stored:
            raise ValueError("it does not match its checksum")
        _check_source(description, trust)
        model, weights = _rebuild(description, tensors, path.stat().st_size)
    except SafetensorError as error:
        message = f"{path}: no whole safetensors file, export or copy it again: {error}"
        raise ConfigError([message]) from None
    except (ValueError, TypeError, ArithmeticError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError([f"{path}: {reason}"]) from None
    return PackedModel(model, weights, description, stored)


def _text(value: Any) -> str:
    """JSON in canonical form."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def tensors_of(path: Path) -> dict[str, Tensor]:
    """The tensors of a packed file, unchecked."""
    return _read(path)[2]


class _Listed:
    """Different things, each once."""

    def __init__(self) -> None:
        self.items: list[Any] = []

    def place(self, item: Any) -> int | None:
        if item is None:
            return None
        if item not in self.items:
            self.items.append(item)
        return self.items.index(item)


def _placed(target: Target, record: Mapping[str, Any] | None) -> PackedQuantizer | None:
    if record is None:
        return None
    version = QUANTIZERS[record["quantizer"]].version
    return PackedQuantizer(target=target, version=version, **record)


def _read(path: Path) -> tuple[Any, Any, dict[str, Tensor]]:
    """Description, checksum and tensors as they stand in a file."""
    if path.is_dir():  # of which safetensors says "No such device"
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if _ENTRY not in metadata:
            raise ValueError("no packed file of Bitladder: bitladder export RUN makes one")
        names = file.keys()
        tensors = {name: file.get_tensor(name) for name in names}
    try:
        entry = json.loads(metadata[_ENTRY])
    except RecursionError:
        raise ValueError("its description is damaged: too deep") from None
    if not isinstance(entry, dict) or {"sha256", "description"} - set(entry):
        raise ValueError("its description is damaged")
    return entry["description"], entry["sha256"], tensors


def checksum(description: Any, tensors: Mapping[str, Tensor]) -> str:
    """The sha256 of a description and of all tensors with their names, types and shapes."""
    found = hashlib.sha256(_text(description).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        found.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _check_source(description: Description, trust: Collection[str]) -> None:
    """Refuses a network or quantizer whose code computes something else than when it was packed.

    The version of ours, and the file of an import path, have to be the same. Of torchvision any
    version will do: its networks have to fit the weights that it publishes, so they change in
    layers or not at all, and that layers and shapes are those of the tensors is checked anyway.
    """
    name = description.network.name
    if is_import_path(name) and name not in trust:
        raise ValueError(
            f"its network is made by code of yours, {name}; if you trust that code, give "
            f"--trust {name}"
        )
    packer = f"install bitladder {description.made.get('bitladder', 'of its time')}"
    then, now = description.network.source, source_hash(name)
    if _without_torchvision_version(now) != _without_torchvision_version(then):
        way_out = "put the file back that defines it" if is_import_path(name) else packer
        raise ValueError(
            f"its network {name} was another one when it was packed ({then}, now {now}); "
            f"{way_out}, or pack it again"
        )
    for one in description.quantizers:
        if (version := QUANTIZERS[one.quantizer].version) != one.version:
            raise ValueError(
                f"its quantizer {one.quantizer} has version {one.version}, this Bitladder's has "
                f"{version}; {packer}, or pack it again"
            )


def _without_torchvision_version(source: str) -> str:
    """A `source_hash` as far as it decides."""
    return source.rpartition("/")[0] if source.startswith("torchvision:") else source


def _rebuild(
    description: Description, tensors: dict[str, Tensor], size: int
) -> tuple[nn.Module, dict[str, QTensor]]:
    network = description.network
    shape: dict[str, Any] = network.model_dump(exclude={"source"})
    try:
        with few_parts(PARTS_PER_TENSOR * len(tensors)):
            empty = build_model(**shape, device="meta")
    except Exception as error:  # options of any kind go to code of any kind
        raise ValueError(f"its network cannot be built: {error}") from None
    claimed = sum(p.numel() for p in (*empty.parameters(), *empty.buffers()))
    claimed += sum(one.channels for one in description.quantizers)
    if claimed > CODES_PER_BYTE * size:
        raise ValueError(f"it claims {claimed} numbers, more than its {size} bytes can hold")
    model = in_fastest_format(build_model(**shape))
    return unpack_network(
        apply_plan(model, _plan(description)), Packed(tensors, _codings(description))
    )


def _plan(description: Description) -> dict[str, LayerPlan]:
    quantizers = description.quantizers

    def record(target: Target, place: int | None) -> dict[str, Any] | None:
        if place is None:
            return None
        if not 0 <= place < len(quantizers) or quantizers[place].target != target:
            raise ValueError(f"there is no {target} quantizer {place}")
        return quantizers[place].model_dump(exclude={"target", "version"})

    return plan_from_dict(
        {
            name: {
                "weight": record("weight", layer.weight),
                "activation": record("activation", layer.input),
            }
            for name, layer in description.layers.items()
        }
    )


def _codings(description: Description) -> dict[str, Coding]:
    found = {}
    for name, layer in description.layers.items():
        if layer.codes is not None:
            if not 0 <= layer.codes < len(description.codings):
                raise ValueError(f"there is no coding {layer.codes}")
            found[name] = Coding(**description.codings[layer.codes].model_dump())
    return found

"""A canonical network as tensors: codes without gaps, and float32 for all that is not coded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core import QTensor, Quantizer
from ..functional import per_channel_view
from ..swap import quantizers, weight_layers
from .bits import pack_bits, unpack_bits
from .canonical import coded_weights, make_canonical


@dataclass(frozen=True)
class Coding:
    """What of a coded weight is no tensor; see `QTensor`."""

    bits: int
    num_levels: int
    zero_point: float
    channel_axis: int | None


@dataclass(frozen=True)
class Packed:
    """A network as a file holds it.

    Attributes:
        tensors: of a layer with coded weight `.codes`, uint8, the bits of all codes in the order
            of the indices (O, I, *kernel); `.scale`, () or (O,); `.codebook` where there is one.
            Of an input quantizer, under its name, all its numbers in one vector. All else under
            its name in the canonical network.
        codings: by layer name.
    """

    tensors: dict[str, Tensor]
    codings: dict[str, Coding]


@torch.no_grad()
def pack_network(model: nn.Module) -> Packed:
    """A trained network's tensors; the model itself becomes canonical."""
    weights = coded_weights(model)
    codings, tensors = {}, {}
    for name, q in weights.items():
        assert not isinstance(q.zero_point, Tensor), "no method has a tensor of zero points"
        codings[name] = Coding(q.bits, q.num_levels, float(q.zero_point), q.channel_axis)
        tensors[f"{name}.codes"] = pack_bits(q.codes, q.bits)
        tensors[f"{name}.scale"] = q.scale.reshape(-1 if q.channel_axis is not None else ())
        if q.codebook is not None:
            tensors[f"{name}.codebook"] = q.codebook
    inside = _coded(model)
    make_canonical(model, weights)
    for name, quantizer in quantizers(model).items():
        if state := _state(quantizer):
            tensors[name] = torch.cat([part.detach().reshape(-1) for part in state])
    tensors |= {name: t.detach() for name, t in _rest(model, inside).items()}
    return Packed({k: t.cpu().contiguous() for k, t in tensors.items()}, codings)


@torch.no_grad()
def unpack_network(model: nn.Module, packed: Packed) -> tuple[nn.Module, dict[str, QTensor]]:
    """Puts packed tensors into a network of the same build, in place.

    Args:
        model: freshly built, with its `QuantLayer`s; what it holds does not matter.

    Returns:
        The canonical network, and its coded weights by layer name.

    Raises:
        ValueError: the tensors are not those of this network.
    """
    layers = weight_layers(model)
    if set(layers) != set(packed.codings):
        raise ValueError(_differ("coded weights", set(packed.codings), set(layers)))
    tensors = dict(packed.tensors)
    weights = {}
    for name, layer in layers.items():
        weights[name] = _take_weight(tensors, name, layer.weight.shape, packed.codings[name])
    inside = _coded(model)
    make_canonical(model, weights)
    for name, quantizer in quantizers(model).items():
        if state := _state(quantizer):
            _fill(name, state, _take(tensors, name))
    rest = _rest(model, inside)
    if set(rest) != set(tensors):
        raise ValueError(_differ("tensors", set(tensors), set(rest)))
    for name, slot in rest.items():
        if slot.shape != tensors[name].shape or slot.dtype != tensors[name].dtype:
            raise ValueError(f"{name} is {_said(tensors[name])}, the network has {_said(slot)}")
        slot.copy_(tensors[name])
    return model, weights


def _take_weight(
    tensors: dict[str, Tensor], name: str, shape: torch.Size, coding: Coding
) -> QTensor:
    codes = unpack_bits(_take(tensors, f"{name}.codes"), coding.bits, shape.numel()).view(shape)
    if not 1 <= coding.num_levels <= 2**coding.bits:
        raise ValueError(f"{name}: {coding.num_levels} levels at {coding.bits} bits")
    if codes.numel() and int(codes.max()) >= coding.num_levels:
        raise ValueError(f"{name} has codes beyond its {coding.num_levels} levels")
    scale, codebook = _take(tensors, f"{name}.scale"), tensors.pop(f"{name}.codebook", None)
    rows = () if coding.channel_axis is None else (shape[0],)
    if coding.channel_axis not in (None, 0) or scale.shape != rows:
        raise ValueError(f"{name}.scale is {_said(scale)} for a weight of shape {tuple(shape)}")
    if codebook is not None and codebook.shape not in {
        (coding.num_levels,),
        (shape[0], coding.num_levels),
    }:
        raise ValueError(f"{name}.codebook is {_said(codebook)} for {coding.num_levels} levels")
    for part in (scale, codebook):
        if part is not None and part.dtype != torch.float32:
            raise ValueError(f"{name} has {_said(part)} where float32 belongs")
    return QTensor(
        codes,
        per_channel_view(scale, codes),
        coding.bits,
        coding.num_levels,
        coding.zero_point,
        codebook,
        coding.channel_axis,
    )


def _take(tensors: dict[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise ValueError(f"there is no tensor {name}")
    return tensors.pop(name)


def _coded(model: nn.Module) -> set[str]:
    """Names of the parameters that codes stand for."""
    latent = {layer.latent for layer in weight_layers(model).values()}
    return {n for n, p in model.named_parameters(remove_duplicate=False) if p in latent}


def _state(quantizer: Quantizer) -> list[Tensor]:
    """The numbers of an input quantizer, in a fixed order; not those that only training counts."""
    state: Mapping[str, Any] = quantizer.state_dict(keep_vars=True)
    return [state[name] for name in sorted(state) if state[name].is_floating_point()]


def _fill(name: str, parts: list[Tensor], values: Tensor) -> None:
    wanted = sum(part.numel() for part in parts)
    if values.shape != (wanted,) or values.dtype != torch.float32:
        raise ValueError(f"{name} is {_said(values)}; its quantizer has {wanted} float32 numbers")
    for part, own in zip(parts, values.split([p.numel() for p in parts]), strict=True):
        part.copy_(own.view(part.shape))


def _rest(model: nn.Module, coded: set[str]) -> dict[str, Tensor]:
    """Parameters and stored buffers that are neither coded nor a quantizer's, each once."""
    inside = {part for q in quantizers(model).values() for part in (*q.parameters(), *q.buffers())}
    stored = set(model.state_dict())
    named = [*model.named_parameters(), *model.named_buffers()]
    return {
        name: tensor
        for name, tensor in named
        if name in stored and name not in coded and tensor not in inside
    }


def _differ(what: str, given: set[str], wanted: set[str]) -> str:
    parts = [f"without {', '.join(sorted(wanted - given)[:5])}" * bool(wanted - given)]
    parts += [f"with unknown {', '.join(sorted(given - wanted)[:5])}" * bool(given - wanted)]
    return f"the {what} are those of another network: {'; '.join(filter(None, parts))}"


def _said(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"

"""What a quantized network costs, and how well its values fit their levels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .core import QTensor, Quantizer
from .layers import QuantLayer
from .policy import LayerPlan
from .probing import Probe, call, evaluating, inputs_of
from .record import record
from .swap import input_quantizers, quant_layers, quantizers, weight_layers

SUMMARY = ("scale", "low", "high", "levels", "clipped", "sqnr_db")


def max_levels(model: nn.Module, batches: Iterable[Any]) -> dict[str, int]:
    """Distinct codes that each quantizer used, by name: the most in any scale group.

    Weights are counted as they are, inputs over all `batches`, in evaluation mode.
    """
    return {name: seen.levels for name, seen in _watch(model, batches).items()}


def layer_report(model: nn.Module, batches: Iterable[Any]) -> list[dict[str, Any]]:
    """A row for each quantized layer, in the order of the model.

    Keys: layer, weight_bits, activation_bits, weight_quantizer, activation_quantizer (registered
    names), then for weight_ and activation_: scale (the largest), low, high (of the range),
    levels, clipped (share outside the range), sqnr_db. What is not quantized has None.
    """
    watched = {seen.quantizer: seen for seen in _watch(model, batches).values()}
    return [_row(name, layer, watched) for name, layer in quant_layers(model).items()]


def bit_operations(found: Probe, plan: Mapping[str, LayerPlan]) -> int:
    """Sum of MACs * weight bits * input bits for one sample; float counts as 32 bits.

    Source: qonnx' `inference_cost`, without its discount for weights that are zero.
    """
    return sum(row["bitops"] for row in layer_costs(found, plan))


def layer_costs(found: Probe, plan: Mapping[str, LayerPlan]) -> list[dict[str, Any]]:
    """A row for each layer that can be quantized, in order of execution, for one sample.

    Keys: layer, weight_bits, activation_bits, macs, bitops (see `bit_operations`).
    """
    rows = []
    for name, facts in found.layers.items():
        layer = plan.get(name, LayerPlan())
        bits = {"weight_bits": layer.weight_bits, "activation_bits": layer.activation_bits}
        bitops = facts.macs * layer.weight_bits * layer.activation_bits
        rows.append({"layer": name, **bits, "macs": facts.macs, "bitops": bitops})
    return rows


@torch.no_grad()
def ideal_bytes(model: nn.Module) -> int:
    """Bytes that the network needs: codes at their width, everything else in float32.

    Counted are packed weights, scales, tensor zero points, codebooks, learned thresholds and
    shifts of inputs, and every floating parameter and buffer outside the quantizers, tied ones
    once. Integer buffers (batch counts) are not needed to run it.
    """
    total, packed = 0, set()
    for layer in weight_layers(model).values():
        assert layer.weight_quantizer is not None
        q = layer.weight_quantizer.encode(layer.weight)
        packed.add(layer.latent)
        total += math.ceil(q.codes.numel() * q.bits / 8) + _side_bytes(q)
    for layer in quant_layers(model).values():
        if layer.input_quantizer is not None:
            nothing = nothing_for(layer.input_quantizer, layer)
            total += _side_bytes(layer.input_quantizer.encode(nothing))
            total += 4 * layer.input_quantizer.encoding_constants
    inside = {
        tensor
        for quantizer in quantizers(model).values()
        for tensor in (*quantizer.parameters(), *quantizer.buffers())
    }
    for tensor in {*model.parameters(), *model.buffers()} - inside - packed:
        total += 4 * tensor.numel() if tensor.is_floating_point() else 0
    return total


@torch.no_grad()
def sqnr(values: Tensor, quantized: Tensor) -> float:
    """Signal to quantization noise in decibels; infinite without noise, or without a signal."""
    noise = (values.float() - quantized.float()).square().sum().double()
    signal = values.float().square().sum().double()
    return _decibels(float(signal), float(noise))


@torch.no_grad()
def effectiveness(values: Tensor, q: QTensor) -> float:
    """How tightly values sit on their levels: 1 all on them, 0 spread evenly between, or worse.

    1 - mean((v - level)^2 / (gap^2 / 12)), the denominator being the variance of values that are
    uniform over a bin, and the gap the mean distance between two levels. Not below 0.

    Args:
        values: what was rounded (`Quantizer.latent`), in the shape of `q.codes`.
        q: the same values encoded.
    """
    table = q.levels()
    gap = beside((table.amax(1) - table.amin(1)) / max(q.num_levels - 1, 1), q)
    relative = (values.float() - q.dequantize()).square() / (gap.square() / 12)
    return max(0.0, 1.0 - float(relative.mean()))


class Seen:
    """What one quantizer did with all it was given, summed up tensor by tensor."""

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer = quantizer
        self.used: Tensor | None = None  # (groups, levels) bool
        self.clipped = self.count = 0
        self.signal = self.noise = 0.0
        self.spread = 0.0  # of the noise, in units of gap^2 / 12; see `effectiveness`
        self.scale = 0.0
        self.range = (0.0, 0.0)

    def add(self, x: Tensor) -> QTensor:
        """Takes note of what becomes of `x`, and gives it."""
        q = self.quantizer.encode(x)
        used = _used_codes(q)
        self.used = used if self.used is None else self.used | used
        latent = self.quantizer.latent(x).float()
        error = (latent - q.dequantize()).square()
        noise = float(error.sum().double())
        self.signal += float(latent.square().sum().double())
        self.noise += noise
        table = q.levels()
        low, high = (beside(end, q) for end in (table.amin(1), table.amax(1)))
        # a value that rounds to the outer level from within half a gap beyond it is not clipped
        half = (high - low) / max(q.num_levels - 1, 1) / 2
        self.clipped += int(((latent < low - half) | (latent > high + half)).sum())
        whole = half.numel() == 1
        self.spread += noise / float(half) ** 2 * 3 if whole else float((error / half**2).sum()) * 3
        self.count += x.numel()
        self.scale = float(q.scale.max())
        self.range = float(low.min()), float(high.max())
        return q

    @property
    def levels(self) -> int:
        """The most distinct codes in any scale group."""
        return 0 if self.used is None else int(self.used.sum(1).max())

    @property
    def effectiveness(self) -> float:
        """See the function of that name."""
        return max(0.0, 1.0 - self.spread / self.count)

    def summary(self) -> dict[str, float]:
        """The keys of `SUMMARY`."""
        return {
            "scale": self.scale,
            "low": self.range[0],
            "high": self.range[1],
            "levels": self.levels,
            "clipped": self.clipped / self.count,
            "sqnr_db": _decibels(self.signal, self.noise),
        }


@torch.no_grad()
def scales(model: nn.Module) -> dict[str, float]:
    """The scale of every quantizer now, of several the largest: `conv1.weight`, `conv1.activation`.

    The device is waited for once.
    """
    found = {}
    for name, layer in quant_layers(model).items():
        of = {"weight": layer.weight_quantizer, "activation": layer.input_quantizer}
        for half, quantizer in of.items():
            if quantizer is not None:
                x = layer.weight if half == "weight" else nothing_for(quantizer, layer)
                found[f"{name}.{half}" if name else half] = quantizer.encode(x).scale.amax()
    if not found:
        return {}
    return dict(zip(found, torch.stack(list(found.values())).tolist(), strict=True))


def nothing_for(quantizer: Quantizer, layer: QuantLayer) -> Tensor:
    """The smallest input that a layer's input quantizer takes, all zero."""
    shape = [1, 1, 1, 1]
    shape[quantizer.site.channel_axis] = quantizer.site.channels
    return torch.zeros(shape, device=layer.latent.device)


@torch.no_grad()
def _watch(model: nn.Module, batches: Iterable[Any]) -> dict[str, Seen]:
    watched = {name: Seen(quantizer) for name, quantizer in quantizers(model).items()}
    of = {seen.quantizer: seen for seen in watched.values()}
    for layer in weight_layers(model).values():
        assert layer.weight_quantizer is not None
        of[layer.weight_quantizer].add(layer.weight)
    inputs = input_quantizers(model)

    def look(name: str, x: Tensor) -> None:
        of[inputs[name]].add(x)

    with evaluating(model), record(model, inputs, reduce=look):
        for x in inputs_of(batches, model) if inputs else ():
            call(model, x)
    return watched


def _row(name: str, layer: QuantLayer, watched: Mapping[Quantizer, Seen]) -> dict[str, Any]:
    plan = layer.plan or LayerPlan()
    row: dict[str, Any] = {
        "layer": name,
        "weight_bits": plan.weight_bits,
        "activation_bits": plan.activation_bits,
        "weight_quantizer": plan.weight[0].name if plan.weight else None,
        "activation_quantizer": plan.activation[0].name if plan.activation else None,
    }
    halves = (("weight", layer.weight_quantizer), ("activation", layer.input_quantizer))
    for side, quantizer in halves:
        seen = None if quantizer is None else watched.get(quantizer)
        values = seen.summary() if seen and seen.count else dict.fromkeys(SUMMARY)
        row |= {f"{side}_{key}": value for key, value in values.items()}
    return row


def _decibels(signal: float, noise: float) -> float:
    return math.inf if noise == 0 or signal == 0 else 10 * math.log10(signal / noise)


def _used_codes(q: QTensor) -> Tensor:
    """Which codes occur, (groups, num_levels)."""
    axis = q.channel_axis
    rows = q.codes.reshape(1, -1) if axis is None else q.codes.movedim(axis, 0).flatten(1)
    used = torch.zeros(len(rows), q.num_levels, dtype=torch.bool, device=rows.device)
    return used.scatter_(1, rows.long(), True)


def beside(values: Tensor, q: QTensor) -> Tensor:
    """One value for each scale group, (groups,), in a shape that goes with the codes."""
    if q.channel_axis is None:
        return values.squeeze()
    return values.view([-1 if i == q.channel_axis else 1 for i in range(q.codes.dim())])


def _side_bytes(q: QTensor) -> int:
    tensors = [q.scale, *(t for t in (q.zero_point, q.codebook) if isinstance(t, Tensor))]
    return sum(4 * t.numel() for t in tensors)

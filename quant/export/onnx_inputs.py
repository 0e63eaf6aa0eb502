"""Quantizers of inputs as ONNX nodes: the cheapest form that gives the same codes, exactly."""

from __future__ import annotations

import numpy as np
import torch
from onnx import TensorProto
from torch import Tensor

from .onnx_nodes import Nodes
from .thresholds import Staircase
from .tracing import CannotExport

MOST_THRESHOLDS = 15  # of a table that is searched by comparing: each costs a copy of the input
SIGNED, UNSIGNED = (-128, 127), (0, 255)


def quantized_input(
    nodes: Nodes, layer: str, x: str, stairs: Staircase, *, axis: int
) -> tuple[str, int]:
    """Writes a quantizer.

    Args:
        layer: the name before which it stands.
        x: what it reads.
        axis: of the channels.

    Returns:
        The name of the quantized values, and the largest code as runtimes have it: signed ones
        are shifted to 0 .. 255. 0 where the values are floats.

    Raises:
        CannotExport: a table with too many levels.
    """
    if (zero := rounding_zero(stairs)) is not None:
        top = stairs.coding.num_levels - 1 if zero == 0 else 255
        return _rounded(nodes, layer, x, stairs, zero), top
    groups, count = stairs.thresholds.shape
    if count == 1:
        return _two_levels(nodes, layer, x, stairs, axis), 0
    if (low := flooring_low(stairs)) is not None:
        return _floored(nodes, layer, x, stairs, low), 0
    if count > MOST_THRESHOLDS or groups > 1:
        raise CannotExport(
            f"{layer}: ONNX export has no input quantizer with {count} thresholds of its own (up "
            f"to {MOST_THRESHOLDS}); take a uniform method there, such as lsq"
        )
    return _counted(nodes, layer, x, stairs), 0


def rounding_zero(stairs: Staircase) -> int | None:
    """The zero point if the codes are those of QuantizeLinear and Clip; else None."""
    coding, zero = stairs.coding, _zero_point(stairs)
    if len(stairs.thresholds) > 1 or coding.codebook is not None or coding.num_levels > 256:
        return None
    top = coding.num_levels - 1
    fits = zero == 0 or (SIGNED[0] <= -zero and top - zero <= SIGNED[1])
    if not zero.is_integer() or not fits:
        return None
    x = _edges(stairs)
    codes = ((x / coding.scale.reshape(())).round() + zero).clamp(0, top).long()
    return int(zero) if torch.equal(codes, _codes(stairs, x)) else None


def flooring_low(stairs: Staircase) -> float | None:
    """The lowest level in steps if all lie half-way between multiples of the step; else None."""
    coding, low = stairs.coding, -_zero_point(stairs)
    if len(stairs.thresholds) > 1 or coding.codebook is not None:
        return None
    if low != -(coding.num_levels - 1) / 2 or low.is_integer():
        return None
    x = _edges(stairs)
    level = ((x / coding.scale.reshape(())).floor() + 0.5).clamp(low, -low)
    return low if torch.equal((level - low).long(), _codes(stairs, x)) else None


def _rounded(nodes: Nodes, layer: str, x: str, stairs: Staircase, zero: int) -> str:
    """QuantizeLinear, Clip, DequantizeLinear."""
    top = stairs.coding.num_levels - 1
    kind, limits = (np.uint8, UNSIGNED) if zero == 0 else (np.int8, SIGNED)
    low, high = -zero, top - zero
    scale = nodes.constant(f"{layer}.input_scale", stairs.coding.scale.reshape(()))
    offset = nodes.constant(f"{layer}.input_zero", np.array(0, kind))
    codes = nodes.node("QuantizeLinear", [x, scale, offset], f"{layer}.rounded")
    if (low, high) != limits:
        ends = [
            nodes.constant(f"{layer}.lowest", np.array(low, kind)),
            nodes.constant(f"{layer}.highest", np.array(high, kind)),
        ]
        codes = nodes.node("Clip", [codes, *ends], f"{layer}.clipped")
    return nodes.node("DequantizeLinear", [codes, scale, offset], f"{layer}.input")


def _two_levels(nodes: Nodes, layer: str, x: str, stairs: Staircase, axis: int) -> str:
    threshold = stairs.thresholds.reshape(-1)
    if len(threshold) == 1:
        threshold = threshold[0]
    elif axis == 1:
        threshold = threshold.view(-1, 1, 1)
    above = nodes.constant(f"{layer}.threshold", threshold)
    reached = nodes.node("GreaterOrEqual", [x, above], f"{layer}.reached")
    low, high = stairs.levels.reshape(-1).tolist()
    ends = [nodes.constant(f"{layer}.upper", high), nodes.constant(f"{layer}.lower", low)]
    return nodes.node("Where", [reached, *ends], f"{layer}.input")


def _floored(nodes: Nodes, layer: str, x: str, stairs: Staircase, low: float) -> str:
    """Levels half-way between multiples of the step."""
    scale = nodes.constant(f"{layer}.input_scale", stairs.coding.scale.reshape(()))
    ends = [nodes.constant(f"{layer}.lowest", low), nodes.constant(f"{layer}.highest", -low)]
    y = nodes.node("Div", [x, scale], f"{layer}.scaled")
    y = nodes.node("Floor", [y], f"{layer}.floored")
    y = nodes.node("Add", [y, nodes.constant("half", 0.5)], f"{layer}.risen")
    y = nodes.node("Clip", [y, *ends], f"{layer}.clipped")
    return nodes.node("Mul", [y, scale], f"{layer}.input")


def _counted(nodes: Nodes, layer: str, x: str, stairs: Staircase) -> str:
    """The code is the number of thresholds that are reached; a table has the level."""
    last = nodes.integers("last_axis", [-1])
    thresholds = nodes.constant(f"{layer}.thresholds", stairs.thresholds.reshape(-1))
    table = nodes.constant(f"{layer}.levels", stairs.levels.reshape(-1))
    y = nodes.node("Unsqueeze", [x, last], f"{layer}.beside")
    y = nodes.node("GreaterOrEqual", [y, thresholds], f"{layer}.reached")
    y = nodes.node("Cast", [y], f"{layer}.counted", to=TensorProto.INT32)
    y = nodes.node("ReduceSum", [y, last], f"{layer}.code", keepdims=0)
    return nodes.node("Gather", [table, y], f"{layer}.input")


def _zero_point(stairs: Staircase) -> float:
    return float(torch.as_tensor(stairs.coding.zero_point).reshape(-1)[0])


def _edges(stairs: Staircase) -> Tensor:
    """Each threshold, and the float32 number before it: all that has to be tried."""
    known = stairs.thresholds[torch.isfinite(stairs.thresholds)]
    return torch.cat([known, known.nextafter(torch.full_like(known, -torch.inf))])


def _codes(stairs: Staircase, x: Tensor) -> Tensor:
    return (x.unsqueeze(1) >= stairs.thresholds[0]).sum(1)

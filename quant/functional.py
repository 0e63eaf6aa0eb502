"""Rounding with closed-form gradients, shared by the methods.

Every function here computes one expression, `scale * level`, so that training sees exactly what
`QTensor.dequantize` gives. Backward passes read input and output alone, which the layers around
keep anyway. They use clamp and hardtanh_backward and never a mask or `where`, which cost up to 20
times as much on a CPU, and they keep the memory format of their input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Bound = float | Tensor

TINY = 1.1754944e-38  # smallest normal float32: one smaller may be flushed to zero


def wide(x: Tensor) -> Tensor:
    """`x` in float32 at least: scales and their gradients are never computed in half precision."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def straight_through(value: Tensor, path: Tensor) -> Tensor:
    """Exactly `value` in the forward pass; the gradient goes to `path` unchanged."""
    return value.detach() + (path - path.detach())


def round_to_level(u: Tensor, low: Bound, high: Bound, *, midrise: bool = False) -> Tensor:
    """The level next to `u`, in units of the step, within `low` .. `high`; written over `u`.

    Mid-tread levels are integers; ties go to the even one. Mid-rise levels are half-integers and
    ties go up, which makes sgn(0) = +1 at one bit (rounding `u + 1/2` to even would give -1).
    """
    if midrise:
        return torch.clamp_(u.floor_().add_(0.5), low, high)  # type: ignore[arg-type]
    return torch.clamp_(u, low, high).round_()  # type: ignore[arg-type]


def to_codes(level: Tensor, low: Bound, bits: int) -> Tensor:
    """Levels as unsigned codes counted from `low`: uint8 up to 8 bits, int32 above."""
    counted = level if isinstance(low, float) and low == 0 else level - low
    if bits < 8:  # torch makes signed bytes ten times as fast as unsigned ones, on a CPU
        return counted.to(torch.int8).view(torch.uint8)
    return counted.to(torch.int16).to(torch.uint8) if bits == 8 else counted.to(torch.int32)


def learned_step(
    x: Tensor,
    scale: Tensor,
    low: Bound,
    high: Bound,
    *,
    midrise: bool = False,
    grad_scale: Bound = 1.0,
    floor: Tensor | None = None,
    open_low: bool = False,
) -> Tensor:
    """Rounds to multiples of a learned step (LSQ), or half-way between them (UniQ).

    With u = x / scale: dL/dx = G where low <= u <= high, else 0; dL/dscale = grad_scale * sum of
    G * (level - u inside, level outside). The difference is taken element by element, in float32:
    at 8 bits the two sums cancel to a thousandth of themselves.

    Args:
        x: any shape and floating dtype.
        scale: (), or (C,) for a step per slice of axis 0.
        low: lowest level in steps; high: highest.
        midrise: whether levels are half-integers.
        grad_scale: factor on the gradient of `scale`. It and the bounds are numbers; or all three
            tensors (), so that code compiled for one width runs at every other.
        floor: lower bound of the step in the shape of `scale`. The gradient passes through it
            unchanged, so that a step below it can come back.
        open_low: whether dL/dx is 0 where u = low; see `Quantizer.absorbs`.

    Returns:
        The quantized values in the dtype and memory format of `x`.
    """
    return _LearnedStep.apply(x, scale, floor, low, high, midrise, grad_scale, open_low)


def round_through(
    x: Tensor, scale: Tensor, low: Bound, high: Bound, *, midrise: bool = False
) -> Tensor:
    """Rounds to `scale` * level; the gradient passes unchanged everywhere. `scale` gets none."""
    return _RoundThrough.apply(x, scale, low, high, midrise)


def round_within(
    x: Tensor, scale: Tensor, low: Bound, high: Bound, start: Tensor, end: Tensor
) -> Tensor:
    """Rounds to `scale` * level; the gradient passes where start <= x <= end. `scale` gets none."""
    return _RoundWithin.apply(x, scale, low, high, start, end)


def inside(grad: Tensor, u: Tensor, low: Bound, high: Bound, *, open_low: bool = False) -> Tensor:
    """`grad` where low <= u <= high, else 0; with `open_low` where low < u <= high.

    hardtanh_backward alone would leave both bounds out. It takes numbers only: with tensors, which
    are for compiled code, a mask does it.
    """
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return grad * ((u > low if open_low else u >= low) & (u <= high))
    start = low if open_low else just_below(low)
    return torch.ops.aten.hardtanh_backward.default(grad, u, start, -just_below(-high))


def just_below(bound: float) -> float:
    """The next float32 below a bound that is not positive; below zero the next normal one."""
    if bound == 0:
        return -TINY
    step = 2.0 ** (math.floor(math.log2(abs(bound))) - 23)
    return bound - step


def stored_order(x: Tensor, like: Tensor) -> Tensor:
    """All values of `x` in the order in which those of `like` are stored, (numel,)."""
    return x.permute(by_stride(like)).reshape(-1)


def from_stored_order(values: Tensor, like: Tensor) -> Tensor:
    """Values (numel,) in the order in which those of `like` are stored, in its shape and format."""
    return from_order(values, like.shape, by_stride(like))


def from_order(values: Tensor, shape: Sequence[int], order: Sequence[int]) -> Tensor:
    """Values (numel,) as a tensor of `shape`, whose axes they follow in `order`, slowest first."""
    return values.view([shape[axis] for axis in order]).permute(_inverse(order))


def look_up(table: Tensor, index: Tensor) -> Tensor:
    """table[index] for a table (L,), in the memory format of `index` (int32, any shape).

    index_select on the places in the order of their storage is seven times as fast on a CPU as
    indexing with a tensor. Without a gradient; never a view, so that a layer may work in place.
    """
    values = torch.empty_like(index, dtype=table.dtype)
    stored = values.permute(by_stride(index)).view(-1)
    torch.index_select(table.detach(), 0, stored_order(index, index), out=stored)
    return values


def per_channel_view(scale: Tensor, x: Tensor) -> Tensor:
    """A scale of shape (C,) as (C, 1, ..., 1) beside `x`; one of shape () as it is."""
    return scale if scale.dim() == 0 else scale.view(-1, *[1] * (x.dim() - 1))


class _LearnedStep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        floor: Tensor | None,
        low: Bound,
        high: Bound,
        midrise: bool,
        grad_scale: Bound,
        open_low: bool,
    ) -> Tensor:
        step = scale if floor is None else torch.maximum(scale, floor)
        step = per_channel_view(step, x)
        value = round_to_level(wide(x) / step, low, high, midrise=midrise).mul_(step)
        y = value.to(x.dtype)
        # the layer keeps y anyway; in half precision it is too coarse for the step's gradient
        grid = (low, high, grad_scale)
        tensors = grid if isinstance(low, Tensor) else ()
        ctx.save_for_backward(x, step, y if y.dtype == value.dtype else None, *tensors)
        ctx.grid = () if tensors else grid
        ctx.midrise, ctx.open_low = midrise, open_low
        ctx.scale_shape = scale.shape
        # compiled code sums in the order of the axes, and would turn all that it reads for that
        compiled = torch.compiler.is_compiling() and step.dim() == 0
        ctx.order = by_stride(x) if compiled else None
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, step, value, *tensors = ctx.saved_tensors
        low, high, grad_scale = tensors or ctx.grid
        if ctx.order is not None:
            x, grad = x.permute(ctx.order), grad.permute(ctx.order)
            value = None if value is None else value.permute(ctx.order)
        grad = wide(grad)
        u = wide(x) / step
        grad_x = inside(grad, u, low, high, open_low=ctx.open_low)
        grad_step = None
        if ctx.needs_input_grad[1]:
            if value is None:
                value = round_to_level(u, low, high, midrise=ctx.midrise).mul_(step)
            error = (value * grad).addcmul_(grad_x, wide(x), value=-1)
            total = error.sum() if step.dim() == 0 else error.flatten(1).sum(1)
            grad_step = total / step.view(ctx.scale_shape) * grad_scale
        grad_x = grad_x.to(x.dtype)
        if ctx.order is not None:
            grad_x = grad_x.permute(_inverse(ctx.order))
        return grad_x, grad_step, None, None, None, None, None, None


class _RoundThrough(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, low: Bound, high: Bound, midrise: bool
    ) -> Tensor:
        level = round_to_level(wide(x) / scale, low, high, midrise=midrise)
        return level.mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None, None, None, None


class _RoundWithin(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, low: Bound, high: Bound, start: Tensor, end: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, start, end)
        return round_to_level(wide(x) / scale, low, high).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, start, end = ctx.saved_tensors
        share = (wide(x) - start).div_((end - start).clamp_min(TINY))  # 0 .. 1 inside
        return inside(wide(grad), share, 0.0, 1.0).to(x.dtype), None, None, None, None, None


def by_stride(x: Tensor) -> list[int]:
    """The axes in the order of storage, the slowest first."""
    return sorted(range(x.dim()), key=x.stride, reverse=True)


def _inverse(order: Sequence[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)

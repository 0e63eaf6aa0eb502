"""The compander of LCQ: a learned piecewise-linear map of 0 .. 1 onto itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .core import QTensor
from .functional import TINY, look_up, stored_order, wide

INTERVALS = 16
ROWS = 16
LEAST_SHARE = 1e-5  # of an interval's output, so that its inverse stays finite


@dataclass(frozen=True)
class Compander:
    """c(v) = slope[i] * (v - i/16) + start[i] in the interval i of v, and its inverse at levels.

    Attributes:
        share: of the output that each interval of the input takes, (16,); they add up to 1.
        start: the output at the beginning of each interval, (16,).
        top: number of the highest code; code k stands for the output k / top.
        levels: the input that each code stands for, ascending from 0 to 1, (top + 1,).
        interval: where each of these lies, int64, (top + 1,).

    Share, start and levels are float64: gradients are small differences of them.
    """

    share: Tensor
    start: Tensor
    top: int
    levels: Tensor
    interval: Tensor

    @property
    def cells(self) -> int:
        """Pairs of an interval (or what lies beyond the clip) and a code."""
        return (INTERVALS + 1) * (self.top + 1)

    @classmethod
    def of(cls, theta: Tensor, top: int) -> Compander:
        """The compander whose shares are the softmax of `theta` (16,)."""
        share = torch.softmax(theta.detach().double(), 0).clamp_min(LEAST_SHARE)
        start = share.cumsum(0) - share
        codes = torch.arange(top + 1, device=theta.device) / top
        interval = torch.searchsorted(start, codes.double(), right=True).sub_(1).clamp_(0)
        levels = (codes.double() - start[interval]) / (share[interval] * INTERVALS)
        levels = torch.cat([(levels + interval / INTERVALS)[:-1], levels.new_ones(1)])
        return cls(share, start, top, levels, interval)

    def cell_of(self, x: Tensor, limit: Tensor) -> Tensor:
        """interval * (top + 1) + code of each |x|, int32; `cells` for what is not a number.

        What lies at or beyond `limit` has interval 16 and the highest code.
        """
        u = (wide(x) / (limit / INTERVALS)).clamp_(0, INTERVALS).nan_to_num_(nan=INTERVALS + 1)
        interval = u.int()
        # as a line in u over each interval, moved up by the number of the interval's first cell
        first = torch.arange(INTERVALS, device=u.device) * (self.top + 1)
        steep = self.share * self.top
        high = steep * torch.arange(INTERVALS, device=u.device)
        offset = self.start * self.top - high + first
        steep = torch.cat([steep, steep.new_zeros(2)])
        beyond, nowhere = (offset.new_full((1,), self.cells - n) for n in (1, 0))
        offset = torch.cat([offset, beyond, nowhere])
        line = look_up(offset.float(), interval).addcmul_(look_up(steep.float(), interval), u)
        return line.round_().int()

    def table(self, scale: Tensor) -> Tensor:
        """What each cell stands for, with the level of what is not a number at the end."""
        values = (scale * self.levels.float()).repeat(INTERVALS + 1)
        return torch.cat([values, values.new_full((1,), torch.nan)])

    def encode(self, x: Tensor, limit: Tensor, *, bits: int, signed: bool) -> QTensor:
        """`x` as codes of a codebook in units of `limit`; symmetric where `signed`."""
        size = self.cell_of(x.abs() if signed else x, limit) % (self.top + 1)
        codes, codebook = size, self.levels.float()
        if signed:
            codes = torch.where(x < 0, self.top - size, self.top + size)
            codebook = torch.cat([-codebook.flip(0)[:-1], codebook])
        return QTensor(codes.to(torch.uint8), limit.clone(), bits, len(codebook), codebook=codebook)


def companded(
    x: Tensor,
    clip: Tensor,
    theta: Tensor,
    *,
    floor: Tensor,
    top: int,
    signed: bool,
    grad_scale: float = 1.0,
    open_low: bool = False,
) -> Tensor:
    """Rounds evenly behind the compander and maps back: clip * z(code).

    The gradient reaches `x` inside the range; `clip` and `theta` as if rounding were the identity.

    Args:
        x: any shape and floating dtype.
        clip: (), the input that the highest code stands for.
        theta: (16,), logits of the compander's shares.
        floor: (), lower bound of the clip, which the gradient ignores.
        top: number of the highest code.
        signed: whether the sign is kept and the size rounded; else negative values become 0.
        grad_scale: factor on the gradients of `clip` and `theta`.
        open_low: whether zero itself gets no gradient, unsigned; see `Quantizer.absorbs`.

    Returns:
        The quantized values in the dtype and memory format of `x`.
    """
    return _Companded.apply(x, clip, theta, floor, top, signed, grad_scale, open_low)


class _Companded(torch.autograd.Function):
    """All sums that the parameters need are taken by cell: pairs of an interval and a code."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        clip: Tensor,
        theta: Tensor,
        floor: Tensor,
        top: int,
        signed: bool,
        grad_scale: float,
        open_low: bool,
    ) -> Tensor:
        limit = torch.maximum(clip, floor)
        compander = Compander.of(theta, top)
        cell = compander.cell_of(x.abs() if signed else x, limit)
        value = look_up(compander.table(limit), cell)
        if signed:
            value = value.copysign_(wide(x))
        y = value.to(x.dtype)
        kept = y if y.dtype == value.dtype else None
        ctx.save_for_backward(x, limit, cell.to(torch.int16), kept)
        ctx.options = compander, signed, grad_scale
        # open at the clip; at zero, unsigned, closed unless it is to be open
        ctx.low = -1.0 if signed else 0.0 if open_low else -TINY
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, limit, cell, value = ctx.saved_tensors
        compander, signed, grad_scale = ctx.options
        wide_x, wide_grad = wide(x), wide(grad)
        grad_x = torch.ops.aten.hardtanh_backward.default(wide_grad, wide_x / limit, ctx.low, 1.0)
        if value is None:
            value = look_up(compander.table(limit), cell.int())
            value = value.copysign_(wide_x) if signed else value
        # y - x cell by cell: sums of y and of x would cancel to a thousandth at 8 bits
        error = (value - wide_x).mul_(grad_x)
        size_grad = wide_grad * wide_x.sign() if signed else wide_grad
        total, error = _by_cell([size_grad, error], cell, compander)
        grad_clip = (total[INTERVALS].sum() + error[:INTERVALS].sum() / limit) * grad_scale
        grad_theta = _theta_gradient(compander, limit * total, error) * grad_scale
        return grad_x.to(x.dtype), grad_clip, grad_theta, None, None, None, None, None


def _by_cell(parts: list[Tensor], cell: Tensor, compander: Compander) -> list[Tensor]:
    """Sums over each cell, (17, top + 1), of tensors in the shape of `cell`.

    In rows, over which scatter_add_ shares its work between threads (bincount uses one).
    """
    rows = ROWS if cell.numel() % ROWS == 0 else 1
    index = stored_order(cell, cell).view(rows, -1).long()
    sums = []
    for part in parts:
        found = part.new_zeros(rows, compander.cells + 1)
        found.scatter_add_(1, index, stored_order(part, cell).view(rows, -1))
        sums.append(found.sum(0)[:-1].view(INTERVALS + 1, compander.top + 1))
    return sums


def _theta_gradient(compander: Compander, total: Tensor, error: Tensor) -> Tensor:
    """The gradient of the logits from sums by cell: of H = G * clip, and of G * (y - x).

    With slope s and start t, i the interval of the input and j that of the output:
    dz/ds_i = (v - i/16) / s_j, dz/dt_i = 1 / s_j, dz/ds_j = -(q - t_j) / s_j^2, dz/dt_j = -1 / s_j.
    In float64: most of it cancels, since i = j where the map is smooth.
    """
    interval, share = compander.interval, compander.share
    total, error = total[:INTERVALS].double(), error[:INTERVALS].double()
    place = torch.arange(INTERVALS, device=total.device) / INTERVALS
    inverse = 1 / (INTERVALS * share[interval])  # (top + 1,)
    beyond = compander.levels - interval / INTERVALS  # (q - t_j) / s_j
    by_code = total.sum(0) * inverse
    grad_slope = ((compander.levels - place[:, None]) * total - error) @ inverse
    grad_slope.index_add_(0, interval, -by_code * beyond)
    grad_start = total @ inverse
    grad_start.index_add_(0, interval, -by_code)
    # start_i is the sum of the shares before it, slope_i 16 shares
    after = grad_start.flip(0).cumsum(0).flip(0) - grad_start
    grad_share = INTERVALS * grad_slope + after
    return (share * (grad_share - (share * grad_share).sum())).float()

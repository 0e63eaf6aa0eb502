"""What the methods share whose thresholds are learned: finding a value's place among them.

The places of a grid are the stretches between its marks: lower end, threshold, end, threshold,
..., upper end. All that a method needs to know of a value (its code, its level, its interval) is
then read from a table by place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .functional import TINY, from_stored_order, stored_order

LARGEST_CELL = 2.0**22  # float32 still tells two cells apart
CELLS = 4096  # of the table that finds a place; in the first-level cache
WORTH_A_TABLE = 2**14  # values, from which on the table is faster than a search
CHUNK = 2**16  # values that go through all steps before the next; in the second-level cache
ROWS = 16  # partial sums, which keep float32 accurate and two threads busy


def marks_of(ends: Tensor, thresholds: Tensor) -> Tensor:
    """The marks e_0, t_1, e_1, ..., t_n, e_n, infinity; ascending, (2 n + 2,).

    The place of a value is how many of them lie strictly below it: 0 up to e_0; 2 k - 1 and 2 k
    in interval k = 1 .. n (e_{k-1} to e_k) below and above its threshold; 2 n + 1 above e_n;
    2 n + 2 where it is not a number.
    """
    return torch.stack([ends, torch.cat([thresholds, ends.new_full((1,), math.inf)])], 1).flatten()


def code_table(intervals: int, device: torch.device) -> Tensor:
    """The code 0 .. n of each place, uint8, (2 n + 3,)."""
    places = torch.arange(2 * intervals + 3, device=device)
    return (places // 2).clamp_(max=intervals).to(torch.uint8)


def interval_table(intervals: int, device: torch.device) -> Tensor:
    """The interval 0 .. n - 1 of each place, int64; outside, the nearest."""
    places = torch.arange(2 * intervals + 3, device=device)
    return ((places - 1) // 2).clamp_(0, intervals - 1)


def by_place(values: Tensor) -> Tensor:
    """Values (n + 1,) of the codes as a table of the places; not a number stays so."""
    return torch.cat([values.repeat_interleave(2), values.new_full((1,), math.nan)])


def look_up_by_place(x: Tensor, marks: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """What a table holds for the place of each value, and the places.

    Args:
        x: any shape and floating dtype.
        marks: from `marks_of`.
        table: (2 n + 3,).

    Returns:
        The entries, in the shape and memory format of `x`; the places, (numel,), in the order in
        which `x` is stored, uint8 (int16 above 255).
    """
    flat = stored_order(x, x).contiguous().to(marks.dtype)
    narrow = torch.uint8 if len(table) <= 256 else torch.int16
    entries = torch.empty_like(flat, dtype=table.dtype)
    places = torch.empty_like(flat, dtype=narrow)
    find = _finder(marks, flat)
    for part in chunks(flat):
        found = find(flat[part])
        entries[part] = table.index_select(0, found)
        places[part] = found
    return from_stored_order(entries, x), places


def chunks(flat: Tensor) -> Iterator[slice]:
    """Slices of a flat tensor; one for all of it where there is no cache to stay in."""
    size = CHUNK
    if not flat.is_cpu or torch.compiler.is_compiling():
        size = max(len(flat), 1)
    return (slice(first, first + size) for first in range(0, len(flat), size))


def add_by_place(sums: Tensor, places: Tensor, values: Tensor) -> None:
    """Adds each value to the column of its place, in place.

    On CUDA the order of addition is not fixed.

    Args:
        sums: (ROWS, columns); the sums are those over the rows.
        places: int64, (count,).
        values: (count,).
    """
    even = len(values) // ROWS * ROWS
    sums.scatter_add_(1, places[:even].view(ROWS, -1), values[:even].view(ROWS, -1))
    sums[0].scatter_add_(0, places[even:], values[even:])


def over_intervals(sums: Tensor) -> Tensor:
    """From the sums of all places (ROWS, 2 n + 3) those of the intervals, (n,)."""
    return sums.sum(0)[1:-2].view(-1, 2).sum(1)


def _finder(marks: Tensor, flat: Tensor) -> Callable[[Tensor], Tensor]:
    """From flat values to their places, int32.

    On a CPU a binary search costs 9 (4 marks) to 30 ns (512 marks) a value in mispredicted
    branches. Where every mark has a cell of its own in a table of equal cells, one comparison
    with it is left: 3 ns.
    """
    if flat.is_cpu and len(flat) >= WORTH_A_TABLE and not torch.compiler.is_compiling():
        cells = _cells(marks[:-1])
        if cells is not None:
            return cells.place
    return lambda values: torch.bucketize(values, marks, out_int32=True)


@dataclass(frozen=True)
class _Cells:
    """Equal cells from the first mark to the last, and one for what is not a number.

    Attributes:
        per_unit: cells in a distance of 1.
        low, high: the first and the last mark, in cells from zero.
        first: the whole number of `low`; the cells are counted from it.
        mark: the mark in each cell; infinity where there is none.
        below: how many marks lie in the cells before it, int32.
    """

    per_unit: float
    low: float
    high: float
    first: int
    mark: Tensor
    below: Tensor

    def place(self, x: Tensor) -> Tensor:
        """See `marks_of`."""
        nowhere = float(self.first + len(self.mark) - 1)
        cell = (x * self.per_unit).clamp_(self.low, self.high).nan_to_num_(nan=nowhere).int()
        if self.first:
            cell -= self.first
        beyond = x > self.mark.index_select(0, cell)
        return self.below.index_select(0, cell).add_(beyond.view(torch.uint8))


def _cells(marks: Tensor) -> _Cells | None:
    """A table for finite marks; None where two share a cell, or cells are no usable numbers."""
    width = (marks[-1] - marks[0]).item() / CELLS
    if not width > TINY:
        return None
    per_unit = torch.tensor(1 / width, dtype=marks.dtype).item()
    scaled = marks * per_unit  # the same operations as for a value, so equally rounded
    low, high = scaled[0].item(), scaled[-1].item()
    if not max(abs(low), abs(high)) < LARGEST_CELL:
        return None
    cell = scaled.int()
    first = int(cell[0].item())
    cell -= first
    if bool((cell.diff() == 0).any()):
        return None
    count = int(cell[-1].item()) + 2
    mark = marks.new_full((count,), math.inf)
    mark[cell.long()] = marks
    below = torch.zeros(count, dtype=torch.int32)
    below[1:] = torch.bincount(cell, minlength=count)[:-1].cumsum(0)
    below[-1] = len(marks) + 1
    return _Cells(per_unit, low, high, first, mark, below)

"""Places among learned thresholds: the fast way finds what a binary search finds."""

from __future__ import annotations

import math

import pytest
import torch
from bitladder.quant import free_levels
from bitladder.quant.free_levels import (
    CHUNK,
    ROWS,
    WORTH_A_TABLE,
    add_by_place,
    by_place,
    code_table,
    interval_table,
    look_up_by_place,
    marks_of,
    over_intervals,
)
from torch import Tensor


def drawn_marks(intervals: int, size: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    lengths = 0.2 + torch.rand(intervals, generator=generator)
    ends = torch.cat([torch.zeros(1), lengths.cumsum(0)]) * (2 * size / intervals)
    ends -= size * torch.rand(1, generator=generator) * (seed % 2)
    return marks_of(ends, (ends[1:] + ends[:-1]) / 2)


def values_around(marks: Tensor, seed: int) -> Tensor:
    """A few times `CHUNK` values: drawn ones, the marks and their neighbours, and the odd ones."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * CHUNK + 77, generator=generator) * marks[-2]
    exact = marks[:-1]
    edges = [torch.nextafter(exact, torch.full((), end)) for end in (math.inf, -math.inf)]
    odd = torch.tensor([math.nan, math.inf, -math.inf, 1e38, -1e38, 0.0])
    return torch.cat([x, exact, *edges, odd])


def searched(x: Tensor, marks: Tensor) -> Tensor:
    return torch.bucketize(x, marks, out_int32=True)


@pytest.mark.parametrize("intervals", [1, 3, 15, 63, 255])
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e6])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_table_finds_what_a_search_finds(intervals, size, seed):
    marks = drawn_marks(intervals, size, seed)
    x = values_around(marks, seed)
    places = torch.arange(2 * intervals + 3, dtype=torch.int32)
    entries, narrow = look_up_by_place(x, marks, places)
    assert torch.equal(entries, searched(x, marks))
    assert torch.equal(narrow.int(), entries)
    assert free_levels._cells(marks[:-1]) is not None


def test_marks_too_close_for_the_table_are_searched():
    marks = marks_of(torch.tensor([0.0, 1e-6, 1.0]), torch.tensor([5e-7, 0.5]))
    assert free_levels._cells(marks[:-1]) is None
    x = values_around(marks, 0)
    entries, _ = look_up_by_place(x, marks, torch.arange(7, dtype=torch.int32))
    assert torch.equal(entries, searched(x, marks))


def test_a_few_values_and_many_have_the_same_places():
    marks = drawn_marks(15, 1.0, 0)
    x = torch.randn(2 * WORTH_A_TABLE, generator=torch.Generator().manual_seed(0))
    table = torch.arange(33, dtype=torch.int32)
    many, _ = look_up_by_place(x, marks, table)
    few = [look_up_by_place(part, marks, table)[0] for part in x.split(1000)]
    assert torch.equal(many, torch.cat(few))


def test_entries_come_in_the_memory_format_of_the_values():
    marks = drawn_marks(3, 1.0, 0)
    x = torch.randn(4, 8, 32, 32).contiguous(memory_format=torch.channels_last)
    table = torch.arange(9, dtype=torch.int32)
    entries, _ = look_up_by_place(x, marks, table)
    assert entries.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(entries, look_up_by_place(x.contiguous(), marks, table)[0])


def test_tables_by_place():
    assert code_table(2, torch.device("cpu")).tolist() == [0, 0, 1, 1, 2, 2, 2]
    assert interval_table(2, torch.device("cpu")).tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert by_place(torch.tensor([0.0, 1.0, 3.0]))[:-1].tolist() == [0, 0, 1, 1, 3, 3]


@pytest.mark.parametrize("count", [0, 5, ROWS, 1000 * ROWS + 3])
def test_sums_are_those_of_the_values_at_each_place(count):
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(9, (count,), generator=generator)
    values = torch.randn(count, generator=generator)
    sums = torch.zeros(ROWS, 9)
    add_by_place(sums, places, values)
    want = torch.stack([values.double()[places == k].sum() for k in range(9)])
    torch.testing.assert_close(sums.sum(0).double(), want, rtol=1e-5, atol=1e-4)
    inner = want[1:7].view(3, 2).sum(1)
    torch.testing.assert_close(over_intervals(sums).double(), inner, rtol=1e-5, atol=1e-4)

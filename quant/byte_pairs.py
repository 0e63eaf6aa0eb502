"""Counting and looking up many bytes at once: in pairs, as half as many numbers of two bytes.

torch does both one number after another, whatever the number of threads. Everything here gives
exactly what it would give byte by byte.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

FEWEST = 2**17  # bytes; below, making a table of pairs costs more than it saves
MOST_LEVELS = 128  # the second byte of a pair is to leave the sign alone


def can_pair(codes: Tensor, levels: int) -> bool:
    """Whether codes 0 .. levels - 1 are bytes, stand in this machine's memory and are many."""
    return (
        codes.dtype == torch.uint8
        and codes.device.type == "cpu"
        and codes.numel() >= FEWEST
        and codes.numel() % 2 == 0
        and levels <= MOST_LEVELS
        and sys.byteorder == "little"
    )


def paired(codes: Tensor) -> Tensor:
    """Two bytes as one number, the second counting 256 times: int32, (numel / 2,).

    Args:
        codes: uint8, (numel,), contiguous, `can_pair`.
    """
    return codes.view(torch.int16).int()  # torch counts and looks up int32 faster than int16


def count(pairs: Tensor, levels: int) -> Tensor:
    """How often each of the codes 0 .. levels - 1 occurs, int64 (levels,)."""
    counts = torch.bincount(pairs, minlength=256 * MOST_LEVELS).view(-1, 256)
    return (counts.sum(0)[:MOST_LEVELS] + counts.sum(1))[:levels]


def look_up(table: Tensor, pairs: Tensor) -> Tensor:
    """The table's value (float32, (levels,)) for each code, float32 (numel,)."""
    of_pairs = torch.zeros(len(table), 256, 2, dtype=torch.float32)  # of second and first byte
    of_pairs[:, : len(table), 0] = table
    of_pairs[:, :, 1] = table[:, None]
    # two floats are copied as one number of eight bytes
    return of_pairs.view(torch.int64).view(-1).index_select(0, pairs).view(torch.float32)

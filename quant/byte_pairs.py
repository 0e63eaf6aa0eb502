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


def count(codes: Tensor, levels: int) -> Tensor:
    """How often each of 0 .. levels - 1 occurs, int64 (levels,).

    Args:
        codes: uint8, (numel,), contiguous, `can_pair`.
    """
    pairs = torch.bincount(codes.view(torch.int16), minlength=256 * MOST_LEVELS).view(-1, 256)
    return (pairs.sum(0)[:MOST_LEVELS] + pairs.sum(1))[:levels]


def look_up(table: Tensor, codes: Tensor) -> Tensor:
    """table[codes], float32 (numel,).

    Args:
        table: float32, (levels,).
        codes: uint8, (numel,), contiguous, `can_pair`.
    """
    pairs = torch.zeros(len(table), 256, 2, dtype=torch.float32)  # of second and first byte
    pairs[:, : len(table), 0] = table
    pairs[:, :, 1] = table[:, None]
    values = torch.empty(codes.numel(), dtype=torch.float32)
    index = codes.view(torch.int16).int()
    # two floats are copied as one number of eight bytes
    torch.index_select(pairs.view(torch.int64).view(-1), 0, index, out=values.view(torch.int64))
    return values

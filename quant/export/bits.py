"""Codes of a few bits without gaps between them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

WIDEST = 16


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits fill."""
    return -(-count * bits // 8)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes as a stream of bits, lowest bit first; the last byte is filled up with zeros.

    Args:
        codes: 0 .. 2**bits - 1, integers of any shape, read in the order of their indices.
        bits: 1 .. 16.

    Returns:
        uint8, (packed_size,).

    Raises:
        ValueError: a code does not fit.
    """
    _check(bits)
    flat = codes.detach().cpu().reshape(-1).numpy()
    if flat.size and not 0 <= flat.min() <= flat.max() < 2**bits:
        raise ValueError(f"a code does not fit into {bits} bits: {flat.min()} .. {flat.max()}")
    stored = flat.astype("<u2").view(np.uint8).reshape(-1, 2)
    stream = np.unpackbits(stored, axis=1, count=bits, bitorder="little")
    return torch.from_numpy(np.packbits(stream.reshape(-1), bitorder="little"))


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack_bits`: uint8 up to 8 bits, int32 above; (count,).

    Raises:
        ValueError: not as many bytes as the codes fill, or the last one is not filled up with
            zeros.
    """
    _check(bits)
    if packed.dtype != torch.uint8 or packed.shape != (packed_size(count, bits),):
        raise ValueError(
            f"{count} codes of {bits} bits fill {packed_size(count, bits)} bytes, "
            f"but these are {packed.dtype} of shape {tuple(packed.shape)}"
        )
    stream = np.unpackbits(packed.cpu().numpy(), bitorder="little")
    if stream[count * bits :].any():
        raise ValueError("there are bits behind the last code")
    rows = stream[: count * bits].reshape(count, bits)
    stored = np.zeros((count, 2), np.uint8)
    filled = np.packbits(rows, axis=1, bitorder="little")
    stored[:, : filled.shape[1]] = filled
    codes = stored.view("<u2").reshape(-1)
    return torch.from_numpy(codes.astype(np.uint8 if bits <= 8 else np.int32))


def _check(bits: int) -> None:
    if not 1 <= bits <= WIDEST:
        raise ValueError(f"codes have 1 to {WIDEST} bits, not {bits}")

"""Reads IDX files, the format of MNIST, gzipped or not."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import torch
from torch import Tensor

from .bundle import DataError

GZIP_MAGIC = b"\x1f\x8b"
UNSIGNED_BYTES = 0x08


def read_idx(path: Path, *, dims: int) -> Tensor:
    """The array of an IDX file of unsigned bytes, uint8.

    Layout, big-endian: two zero bytes, the element type, the number of dimensions; the size of
    each as 4 bytes; then the elements, the last dimension fastest.

    Args:
        dims: what the file must have: 3 for images (N, H, W), 1 for labels (N,).

    Raises:
        DataError: not such a file, or one with bytes too few or too many.
    """
    data = _content(path)
    if len(data) < 4 + 4 * dims:
        raise DataError(f"{path}: too short for an IDX header ({len(data)} bytes); fetch it again")
    if data[:4] != bytes([0, 0, UNSIGNED_BYTES, dims]):
        raise DataError(
            f"{path}: not an IDX file of unsigned bytes with {dims} dimensions "
            f"(it begins with {data[:4].hex(' ')})"
        )
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims)]
    num_bytes, found = math.prod(shape), len(data) - 4 - 4 * dims
    if found != num_bytes:
        problem = "truncated" if found < num_bytes else "too long"
        raise DataError(
            f"{path}: {problem}: its header promises {' x '.join(map(str, shape))} = {num_bytes} "
            f"bytes, {found} follow; fetch the file again"
        )
    if num_bytes == 0:
        raise DataError(f"{path}: holds no element (its header says {shape})")
    return torch.frombuffer(bytearray(data[4 + 4 * dims :]), dtype=torch.uint8).view(shape)


def _content(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if data[:2] == GZIP_MAGIC else data
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        message = f"{path}: truncated or damaged gzip ({error}); fetch the file again"
        raise DataError(message) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from error

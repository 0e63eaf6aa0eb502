"""Tensors on disk: a trained network's weights, and the state of one in training."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from .files import TornFileError, write_atomic

_SHA256_BYTES = 32


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a state dict as safetensors; the same tensors give the same bytes.

    What two names share is written under both: the format has no word for it.
    """
    plain: dict[str, Tensor] = {}
    stored = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        place = own.untyped_storage().data_ptr()
        plain[name] = own.clone() if place in stored else own
        stored.add(place)
    write_atomic(path, save(plain))


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Writes tensors and plain values with their sha256 behind them."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    data = buffer.getvalue()
    write_atomic(path, data + hashlib.sha256(data).digest())


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads to the CPU what `write_checkpoint` wrote; loads only tensors and plain values.

    Raises:
        TornFileError: the bytes do not match their sha256.
    """
    raw = path.read_bytes()
    data, stored = raw[:-_SHA256_BYTES], raw[-_SHA256_BYTES:]
    if hashlib.sha256(data).digest() != stored:
        raise TornFileError(f"{path} does not match its checksum")
    state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    assert isinstance(state, dict)
    return state

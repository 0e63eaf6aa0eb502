"""Decoded images in a file, so that a tree of them is decoded once."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

log = logging.getLogger(__name__)

Decoded = tuple[Tensor, Tensor]  # pixels uint8 (N, H, W, C); which could be read, bool (N,)


def decoded_once(file: Path, decode: Callable[[], Decoded]) -> Decoded:
    """What `decode` gives, from the file if it holds that already.

    A torn or damaged file is noticed by its length or its checksum and made anew. A file that
    cannot be written (read-only folder, full disk) costs time at the next start, nothing else.
    """
    if (decoded := _read(file)) is not None:
        return decoded
    decoded = decode()
    try:
        _write(file, decoded)
    except (OSError, SafetensorError) as error:
        log.warning("the decoded images could not be kept in %s (%s)", file, error)
    return decoded


def _read(file: Path) -> Decoded | None:
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as stored:
            checksum = (stored.metadata() or {}).get("sha256")
            decoded = stored.get_tensor("pixels"), stored.get_tensor("good").bool()
    except (OSError, SafetensorError) as error:
        log.warning("%s is torn (%s): decoding the images again", file, error)
        return None
    if checksum != _checksum(decoded):
        log.warning("%s does not match its checksum: decoding the images again", file)
        return None
    return decoded


def _write(file: Path, decoded: Decoded) -> None:
    """Writes under another name and renames, so that the file is there whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    pixels, good = decoded
    try:
        tensors = {"pixels": pixels, "good": good.to(torch.uint8)}
        save_file(tensors, unfinished, metadata={"sha256": _checksum(decoded)})
        with unfinished.open("rb+") as stored:
            os.fsync(stored.fileno())
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)


def _checksum(decoded: Decoded) -> str:
    pixels, good = decoded
    digest = hashlib.sha256(repr(tuple(pixels.shape)).encode())
    digest.update(pixels.contiguous().numpy().data)
    digest.update(good.to(torch.uint8).numpy().data)
    return digest.hexdigest()

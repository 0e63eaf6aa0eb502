"""Which samples come when, as pure functions of the seed."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed that depends on all parts; the same in every process and version."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator_of(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by all parts."""
    return torch.Generator().manual_seed(seed_of(*parts))


def permutation(num_samples: int, *parts: int | str) -> Tensor:
    """The numbers below `num_samples` in an order that the parts decide; (N,) int64."""
    return torch.randperm(num_samples, generator=generator_of(*parts))


def without_lone_sample(num_samples: int, batch_size: int) -> int:
    """How many samples an epoch of training uses: all, less a last batch of one.

    Batch norm has no variance to divide by where a batch holds one value a channel. Batches
    of one by request (`batch_size=1`) are kept.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    return num_samples - 1 if num_samples % batch_size == 1 else num_samples

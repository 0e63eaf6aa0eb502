"""Which samples come when, as pure functions of the seed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Share:
    """Which part of each training batch a process gets: one of several runs of samples.

    All are as long or one longer than the others, the first ones.

    Attributes:
        number: from 0.
        of: how many parts there are.
    """

    number: int = 0
    of: int = 1

    def size(self, batch_size: int) -> int:
        """How many samples of a batch are in it."""
        return batch_size // self.of + (self.number < batch_size % self.of)

    def part(self, batch: Tensor) -> Tensor:
        """Its rows of a batch, (n, *)."""
        if self.of == 1:
            return batch
        first = self.number * (len(batch) // self.of) + min(self.number, len(batch) % self.of)
        return batch[first : first + self.size(len(batch))]


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


def without_lone_sample(num_samples: int, batch_size: int, *, shares: int = 1) -> int:
    """How many samples an epoch of training uses: all, less a last batch of one.

    Batch norm has no variance to divide by where a batch holds one value a channel. Batches
    of one by request (`batch_size=1`) are kept. Where several processes share a batch, each needs
    two samples of it, and a last batch that has not so many is left out.

    Raises:
        ValueError: no batch would have enough.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    if shares > 1 and batch_size < 2 * shares:
        raise ValueError(
            f"{shares} processes need a batch_size of at least {2 * shares}, not {batch_size}"
        )
    rest = num_samples % batch_size
    return num_samples - rest if rest < 2 * shares else num_samples

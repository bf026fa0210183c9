"""Streams of batches that are a pure function of a key and a position.

Nothing here keeps a state that a checkpoint would have to hold: a resumed run, another rank or another number of
accumulation steps asks for the same position and gets the same examples (and, for diffusion, the same noise).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sophon_hf.data.domain import Domain
    from sophon_hf.tasks.base import Task

Batch = dict[str, Tensor]


def derive_seed(*key: int | str) -> int:
    """A 62-bit seed that depends on every part of `key` and is the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 2


@lru_cache(maxsize=8)
def epoch_order(size: int, seed: int, epoch: int) -> Tensor:
    """A permutation of `size` that follows from seed and epoch."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(derive_seed(seed, epoch)))


class Stream:
    """An endless, shuffled walk through a domain (or through some of its examples), read by position.

    Args:
        domain: The examples.
        task: Says how examples become a batch (a classifier takes them as they are, a diffusion model adds noise).
        seed: Decides order and noise.
        indices: Shape (n,), int64: walk through these examples only.
    """

    def __init__(self, domain: Domain, task: Task, seed: int, indices: Tensor | None = None):
        self.domain, self.task, self.seed = domain, task, seed
        self.indices = torch.arange(len(domain)) if indices is None else indices

    def batch(self, start: int, size: int) -> Batch:
        """The `size` examples from position `start` on; an epoch is `len(self.indices)` positions."""
        seeds = [self.seed + position for position in range(start, start + size)]
        return self.task.collate(self.domain.rows(self.indices[self._order(start, size)], seeds), seeds)

    def distinct_batch(self, number: int, size: int) -> Batch:
        """The batch of this number (from 0) that holds no example twice: the rest of an epoch that fills no batch is left out.

        A size above the epoch is cut to the epoch.
        """
        examples = len(self.indices)
        size = min(size, examples)
        epoch, place = divmod(number, examples // size)
        return self.batch(epoch * examples + place * size, size)

    def _order(self, start: int, size: int) -> Tensor:
        pieces = []
        while size > 0:
            epoch, offset = divmod(start, len(self.indices))
            pieces.append(epoch_order(len(self.indices), self.seed, epoch)[offset : offset + size])
            start, size = start + len(pieces[-1]), size - len(pieces[-1])
        return torch.cat(pieces)

    def batches(self, size: int) -> Iterator[Batch]:
        """All batches of `size`, one after the other, without end. A size above the epoch is cut to the epoch."""
        size = min(size, len(self.indices))
        start = 0
        while True:
            yield self.batch(start, size)
            start += size

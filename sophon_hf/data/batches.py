"""Streams of batches that are a pure function of a seed and a position.

A stream keeps no state that a checkpoint would have to hold. A resumed run, another rank or another number of
accumulation steps asks for the same position and gets the same examples (and, for diffusion, the same noise).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import TypeAlias

import torch
from torch import Tensor

from sophon_hf.data.domain import Domain
from sophon_hf.utils import derive_seed

Batch: TypeAlias = dict[str, Tensor]
_Collate: TypeAlias = Callable[[Batch, list[int]], Batch]


@lru_cache(maxsize=8)
def epoch_order(size: int, seed: int, epoch: int) -> Tensor:
    """Return a permutation of `size` that follows from seed and epoch; shape (size,), int64."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(derive_seed(seed, epoch)))


class Stream:
    """Walk through a domain, or through some of its examples, shuffled and without end; read it by position.

    Args:
        domain: The examples.
        collate: Makes a batch of examples and their seeds (`task.collate`): a classifier takes the examples as they
            are, a diffusion model adds noise to them.
        seed: Decides order and noise.
        indices: Shape (n,), int64: walk through these examples only.
    """

    def __init__(self, domain: Domain, collate: _Collate, seed: int, indices: Tensor | None = None):
        self.domain, self.collate, self.seed = domain, collate, seed
        self.indices = torch.arange(len(domain)) if indices is None else indices

    def batch(self, start: int, size: int) -> Batch:
        """Return the `size` examples from position `start` on; an epoch is `len(self.indices)` positions."""
        pieces, position, examples = [], start, len(self.indices)
        while position < start + size:
            epoch, offset = divmod(position, examples)
            # A batch may reach over the end of an epoch into the next ones.
            pieces.append(epoch_order(examples, self.seed, epoch)[offset : offset + start + size - position])
            position += len(pieces[-1])
        # Each position has its own seed, so the noise does not depend on how positions are cut into batches.
        seeds = [self.seed + position for position in range(start, start + size)]
        return self.collate(self.domain.rows(self.indices[torch.cat(pieces)], seeds), seeds)

    def distinct_batch(self, number: int, size: int) -> Batch:
        """Return the batch of this number (from 0) in which no example appears twice.

        Examples at the end of an epoch that do not fill a batch are left out. A size above the epoch is cut to it.
        """
        examples = len(self.indices)
        size = min(size, examples)
        epoch, place = divmod(number, examples // size)
        return self.batch(epoch * examples + place * size, size)

    def batches(self, size: int) -> Iterator[Batch]:
        """Yield batches of `size`, one after the other, without end. A size above the epoch is cut to it."""
        size = min(size, len(self.indices))
        start = 0
        while True:
            yield self.batch(start, size)
            start += size

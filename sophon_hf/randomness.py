"""The random states that models and processors draw from: Python's, NumPy's (the masks of audio models) and torch's."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch


def set_seed(seed: int) -> None:
    """Seed all three, torch's on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def kept_random_state(devices: Sequence[int | torch.device] = ()) -> Iterator[None]:
    """After the block all three are as before; torch's on the CPU and on `devices`, which are GPUs."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])

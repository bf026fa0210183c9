"""Helpers that more than one room needs.

Nothing heavy is imported here before it is used, so that the command line starts fast.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any


def hint(name: object, known: Iterable[str], otherwise: str = "") -> str:
    """End a message about an unknown name: " Did you mean ...?" where a known one is close, else `otherwise`."""
    close = get_close_matches(str(name), list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else otherwise


def check_choice(value: Any, allowed: Iterable[str], what: str) -> None:
    """Raise a ValueError that names the closest choice where `value` is none of those allowed."""
    if value not in allowed:
        raise ValueError(f"{what} is {value!r}, but must be one of {', '.join(allowed)}.{hint(value, allowed)}")


def unreachable(source: str, kind: str) -> str:
    """Say that a source cannot be looked up on the Hub. `kind`: "model" or "data set"."""
    return (
        f"There is no folder {source!r}, and the Hub cannot be reached to look it up there. Check the connection (and "
        f"HF_HUB_OFFLINE), or download the {kind} and pass its folder."
    )


def refuse_unwritable(folder: str | os.PathLike) -> None:
    """Raise an OSError where nothing can be written to a folder, which need not exist yet."""
    place = Path(folder).absolute()
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        why = "may not be written to" if place.is_dir() else "is no folder"
        raise OSError(f"output_dir is {os.fspath(folder)!r}, but {str(place)!r} {why}: choose another one.")


@contextmanager
def quiet(*loggers: str, level: int = logging.CRITICAL) -> Iterator[None]:
    """Keep what is below `level` from the loggers of these names in the block."""
    levels = {name: logging.getLogger(name).level for name in loggers}
    try:
        for name in loggers:
            logging.getLogger(name).setLevel(level)
        yield
    finally:
        for name, before in levels.items():
            logging.getLogger(name).setLevel(before)


def write_atomically(path: Path, text: str) -> None:
    """Write a file in full or not at all, and leave nothing beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_yaml(path: str | os.PathLike) -> Any:
    """Return what a file of YAML or JSON holds.

    Raises:
        ValueError: It is neither, or has a key twice, of which only one would count.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict:
            keys = [key.value for key, _ in node.value]
            if twice := [key for key in keys if keys.count(key) > 1]:
                raise ValueError(f"it has {twice[0]!r} twice")
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(Path(path).read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error


def finite_or_none(value: float | None) -> float | None:
    """Return a number that JSON knows, or None."""
    return value if value is not None and math.isfinite(value) else None


def derive_seed(*key: int | str) -> int:
    """Return a 62-bit seed that depends on every part of `key` and is the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 2


def set_seed(seed: int) -> None:
    """Seed Python, NumPy (which draws the masks of audio models) and torch on every device."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def kept_random_state(devices: Sequence[Any] = ()) -> Iterator[None]:
    """Restore the random states of Python, NumPy and torch after the block; torch's on the CPU and on `devices`."""
    import numpy as np
    import torch

    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def process_state() -> Any:
    """Return accelerate's `PartialState`: which process this is, of how many, and its device."""
    import torch
    from accelerate import PartialState

    # Else accelerate would start every process of a machine without a GPU on its own.
    return PartialState(cpu=not torch.accelerator.is_available())


def has_bf16() -> bool:
    """Return whether the device of this process computes in bfloat16."""
    import transformers.utils

    return transformers.utils.is_torch_bf16_available_on_device(process_state().device.type)

"""The weight files of a saved model, and their hashes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def hash_weights(folder: str | os.PathLike) -> dict[str, str]:
    """SHA-256 of every safetensors file of a saved model, checkpoints and hidden folders left out.

    Returns:
        File name relative to the folder, with "/" -> 64 hexadecimal digits.
    """
    folder = Path(folder)
    names = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.safetensors")) if path.is_file())
    return {name: _sha256(folder / name) for name in names if is_weight_file(name)}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def is_weight_file(name: str) -> bool:
    """Whether a name, relative to the folder and with "/", is that of a safetensors file of a saved model inside it."""
    parts = name.split("/")
    hidden = any(not p or p.startswith((".", "checkpoint-")) for p in parts)
    return name.endswith(".safetensors") and not hidden and "\\" not in name and ":" not in name

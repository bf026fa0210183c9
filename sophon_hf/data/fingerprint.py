"""Describe a domain's data without giving them away: where they come from, how many there are, and a hash."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass

import torch

from sophon_hf.data.domain import CHUNK, Domain
from sophon_hf.data.loading import hub_source


@dataclass(frozen=True)
class DataFingerprint:
    """Recognise data without showing them.

    Attributes:
        name: Hub id (`owner/name`, or `owner/name:configuration`) or the base name of a folder; None where unknown.
        revision: The commit on the Hub, where known.
        split: The split, where known.
        hash: SHA-256 of the prepared examples, labels included: the same for the same data and processor.
        examples: How many there are.
    """

    name: str | None
    revision: str | None
    split: str | None
    hash: str
    examples: int

    def __post_init__(self) -> None:
        if self.name is not None and not is_base_name_or_hub_id(self.name):
            raise ValueError(f"name is {self.name!r}, but must be a Hub id or a folder's base name, without its path.")
        if not re.fullmatch(r"[0-9a-f]{64}", self.hash):
            raise ValueError(f"hash is {self.hash!r}, but must be 64 hexadecimal digits.")
        if self.examples < 1:
            raise ValueError(f"examples is {self.examples}, but must be at least 1.")


def is_base_name_or_hub_id(name: str) -> bool:
    """Return whether a name tells nothing of where files lie on a machine."""
    parts = name.split("/")
    plain = len(parts) <= 2 and "\\" not in name and name.isprintable()
    return plain and all(p and p[0] not in ".~" and p == p.strip() for p in parts)


def fingerprint_domain(domain: Domain) -> DataFingerprint:
    """Return the fingerprint of a domain as it is used: after selection, split and preparation."""
    digest = hashlib.sha256()
    # Batch by batch, since Domain.fingerprint has seen the first examples only where they do not fit in memory.
    for indices in torch.arange(len(domain)).split(CHUNK):
        for column, values in sorted(domain.rows(indices).items()):
            digest.update(f"{column} {tuple(values.shape)} {values.dtype}".encode())
            digest.update(values.contiguous().flatten().view(torch.uint8).numpy().data if values.ndim else b"")
    name, revision = hub_source(domain.dataset)
    if name is None and (folder := domain.dataset.info.dataset_name):
        folder = os.path.basename(folder.rstrip("/\\").replace("\\", "/")).strip()
        name = folder if is_base_name_or_hub_id(folder) else None
    split = domain.dataset.split
    return DataFingerprint(name, revision, None if split is None else str(split), digest.hexdigest(), len(domain))

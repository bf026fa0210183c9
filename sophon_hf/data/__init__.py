"""Domains (what is learned from) and streams (in which order)."""

from sophon_hf.data.domains import Domain, build_domain, load_domain
from sophon_hf.data.labels import select_classes, split_domain
from sophon_hf.data.streams import Stream, derive_seed

__all__ = [
    "Domain",
    "Stream",
    "build_domain",
    "derive_seed",
    "load_domain",
    "select_classes",
    "split_domain",
]

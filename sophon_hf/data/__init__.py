"""Domains (what is learned from) and streams (in which order)."""

from sophon_hf.data.domains import Domain, build_domain, load_domain, select_classes, split_domain
from sophon_hf.data.streams import Environment, Stream, derive_seed, sample_environment

__all__ = [
    "Domain",
    "Environment",
    "Stream",
    "build_domain",
    "derive_seed",
    "load_domain",
    "sample_environment",
    "select_classes",
    "split_domain",
]

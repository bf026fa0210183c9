"""Load the data that flags name, as halves, splits and classes."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import datasets
import evaluate

from sophon_hf.data.labels import select_classes, split_domain
from sophon_hf.data.loading import load_domain
from sophon_hf.tasks import metrics
from sophon_hf.tasks.metrics import Metric


def load_split(options: argparse.Namespace, domain: str, test: bool = False) -> datasets.Dataset | None:
    """Load a split of the domain "original", "restricted" or "benign", with the classes that the flags name.

    Returns:
        None where the domain is not named.
    """
    told = vars(options)
    if told[domain] is None:
        return None
    dataset = load_domain(told[domain], told[f"{domain}_test_split" if test else f"{domain}_split"])
    classes = told[f"{domain}_classes"]
    return select_classes(dataset, classes, told[f"{domain}_label"]) if classes else dataset


def load_half(options: argparse.Namespace, defender: bool) -> datasets.Dataset | None:
    """Load the defender's or the adversary's half of the restricted domain; all of it without `--adversary_half`."""
    dataset = load_split(options, "restricted")
    if dataset is None or not options.adversary_half:
        return dataset
    halves = split_domain(dataset, column=options.restricted_label)
    return halves[0] if defender else halves[1]


def protected_model(options: argparse.Namespace) -> str:
    """Return the Hub id or folder of the protected model: `--protected`, else the folder that it was saved in.

    Raises:
        FileNotFoundError: It is not named, and there is no such folder.
    """
    if options.protected is None and not Path(options.output_dir).is_dir():
        raise FileNotFoundError(
            f"There is no folder {options.output_dir!r} with a protected model: name it by --protected (Hub id or "
            "folder), or by --output_dir, where `sophon-hf protect` saved it."
        )
    return options.output_dir if options.protected is None else options.protected


def load_metric(options: argparse.Namespace) -> str | Metric | None:
    """Load the metric that `--metric` names: one of the package's own, or a module of `evaluate`, with its arguments.

    Raises:
        ValueError: It is not one name with its arguments.
        FileNotFoundError: There is no such module.
    """
    named = options.metric
    if named is None or named in ("accuracy", "mse"):
        return named
    name, arguments = next(iter(named.items())) if isinstance(named, dict) and len(named) == 1 else (named, {})
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise ValueError(f"--metric is {named!r}: give a name, or one with arguments: {{f1: {{average: macro}}}}.")
    return metrics.load_metric(evaluate.load(name), compute_kwargs=arguments)


def columns(
    options: argparse.Namespace, kind: str, domains: Iterable[str] = ("original", "restricted")
) -> dict[str, str | None]:
    """Return the "input" or the "label" column of each domain, where one is named."""
    return {domain: getattr(options, f"{domain}_{kind}") for domain in domains}

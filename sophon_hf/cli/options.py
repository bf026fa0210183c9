"""The options with which `attack` and `audit` are told of their data, and the data."""

from __future__ import annotations

import argparse

import datasets

from sophon_hf.data.labels import select_classes, split_domain
from sophon_hf.data.loading import load_domain


def add_domain_options(parser: argparse.ArgumentParser) -> None:
    """Splits, classes and columns of both domains."""
    add = parser.add_argument
    add("--restricted_split", default="train", help="its split that the adversary trains on")
    add("--test_split", default="test", help="its split that results are reported on")
    add("--restricted_classes", nargs="+", help="keep these classes, numbered in this order, as for protection")
    add("--original_split", default="train", help="its split for attacks that warm up on it")
    add("--original_test_split", default="test", help="its split that intactness is measured on")
    for name in ("original", "restricted"):
        add(f"--{name}_input", help=f"input column of the {name} domain, where it is not clear")
        add(f"--{name}_label", help=f"label column of the {name} domain, where it is not clear")
    add("--original_classes", nargs="+", help="keep these classes of it, numbered in this order, as for protection")
    add(
        "--whole",
        action="store_true",
        help="train on the whole split, not on the adversary's half of `sophon-hf protect`",
    )


def add_attack_options(parser: argparse.ArgumentParser) -> None:
    """The adversary's budget."""
    from sophon_hf.attacks.sweeps import SWEEPS

    add = parser.add_argument
    add("--sweep", default="strong", help=f"{', '.join(SWEEPS)}, or a JSON or YAML file with strategies")
    add(
        "--epochs",
        type=float,
        help="of an ordinary attack; one that sets its steps keeps them. Left out: the sweep's own, in an audit the "
        "claim's",
    )
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of every attack")


def columns(
    options: argparse.Namespace, kind: str, names: tuple[str, ...] = ("original", "restricted")
) -> dict[str, str | None]:
    """The `input` or `label` columns of the named domains."""
    return {name: getattr(options, f"{name}_{kind}") for name in names}


def load_restricted(options: argparse.Namespace, source: str) -> tuple[datasets.Dataset, datasets.Dataset]:
    """What the adversary trains on, and the test split."""
    training, test = (
        _load(source, split, options.restricted_classes, options.restricted_label)
        for split in (options.restricted_split, options.test_split)
    )
    if not options.whole:
        _, training = split_domain(training, column=options.restricted_label)
    return training, test


def load_original(options: argparse.Namespace, source: str) -> tuple[datasets.Dataset, datasets.Dataset]:
    """What attacks may warm up on, and the test split."""
    training, test = (
        _load(source, split, options.original_classes, options.original_label)
        for split in (options.original_split, options.original_test_split)
    )
    return training, test


def load_benign(options: argparse.Namespace, source: str) -> tuple[datasets.Dataset, datasets.Dataset]:
    """An allowed task: what is trained on, and the test split."""
    training, test = (
        _load(source, split, options.benign_classes, options.benign_label)
        for split in (options.benign_split, options.benign_test_split)
    )
    return training, test


def _load(source: str, split: str, classes: list[str] | None, label: str | None) -> datasets.Dataset:
    dataset = load_domain(source, split)
    return select_classes(dataset, classes, label) if classes else dataset

"""Load the data that flags name, as halves, splits and classes."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from sophon_hf.data.labels import split_domain
from sophon_hf.data.loading import MissingSplitError
from sophon_hf.data.splits import load_part
from sophon_hf.models.loading import check_readable
from sophon_hf.tasks import metrics
from sophon_hf.tasks.latents import encode_captions
from sophon_hf.tasks.metrics import Metric
from sophon_hf.utils import hint


def load_split(options: argparse.Namespace, domain: str, test: bool = False) -> datasets.Dataset | None:
    """Load a split of the domain "original", "restricted" or "benign", with the classes that the flags name.

    Returns:
        None where the domain is not named.
    """
    told = vars(options)
    if told[domain] is None:
        return None
    names = [name.partition("=")[::2] for name in told[f"{domain}_classes"] or ()]
    pixel_range = told[f"{domain}_pixel_range"]
    if pixel_range is not None and len(pixel_range) != 2:
        raise ValueError(
            f"{domain}_pixel_range is {pixel_range}, but takes two numbers: what is black and what is white."
        )
    with _named(options, domain, test):
        dataset = load_part(
            told[domain],
            told[f"{domain}_split"],
            told[f"{domain}_test_split"],
            test=test,
            test_share=options.test_share,
            column=columns(options)["label_columns"][domain],
            label_set=told[f"{domain}_label"] if len(told[f"{domain}_label"] or ()) > 1 else None,
            skip_unreadable=options.skip_unreadable,
            inputs=told[f"{domain}_input"],
            classes={old: new or old for old, new in names},
            pixel_range=pixel_range,
        )
    caption = told[f"{domain}_caption"]
    if caption is None:
        return dataset
    if options.model is None:
        raise ValueError(f"{domain}_caption is {caption!r}: name by --model the pipeline that encodes captions.")
    column = (told[f"{domain}_input"] or ["image"])[0]
    accelerated = torch.accelerator.is_available() and not told.get("use_cpu")
    device = torch.accelerator.current_accelerator() if accelerated else None
    return encode_captions(options.model, dataset, image_column=column, caption_column=caption, device=device or "cpu")


@contextmanager
def _named(options: argparse.Namespace, domain: str, test: bool = False) -> Iterator[None]:
    """Have a mistake tell which domain it is in, and which flag names a split that there is not."""
    try:
        yield
    except ValueError as error:
        flag = f"{domain}_test_split" if test else f"{domain}_split"
        advice = f" The flag is --{flag}." if isinstance(error, MissingSplitError) else ""
        raise ValueError(f"--{domain} {getattr(options, domain)}: {error}{advice}") from error


def load_half(options: argparse.Namespace, defender: bool) -> datasets.Dataset | None:
    """Load the defender's or the adversary's half of the restricted domain; all of it without `--adversary_half`."""
    dataset = load_split(options, "restricted")
    if dataset is None or not options.adversary_half:
        return dataset
    with _named(options, "restricted"):
        halves = split_domain(dataset, column=columns(options)["label_columns"]["restricted"])
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


def look_for(model: str, on_hub: bool) -> str | None:
    """See to it that a model can be read, as far as that is told without loading it.

    Args:
        model: A folder or Hub id.
        on_hub: Whether a Hub id is looked up.

    Returns:
        What is not known then, in words; None where everything was found.

    Raises:
        OSError, ValueError: There is no such model, or it cannot be read (`check_readable`).
    """
    folder = Path(model)
    if folder.is_dir():
        # What holds an adapter alone is refused with more words.
        if not any((folder / name).exists() for name in ("config.json", "model_index.json", "adapter_config.json")):
            begun = " A protection that has not ended is there: go on with it by `--resume`."
            raise FileNotFoundError(
                f"{model!r} holds neither config.json nor model_index.json: no model is saved there."
                + (begun if any(folder.glob("checkpoint-*")) else "")
            )
        check_readable(model)
        return None
    try:
        validate_repo_id(model)
    except HFValidationError as error:
        raise FileNotFoundError(
            f"There is no folder {model!r}, and it is not the form of a Hub id ('user/name')."
        ) from error
    if not on_hub:
        return f"{model!r} is no folder here, and was not looked up on the Hub."
    check_readable(model)
    return None


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
    import evaluate

    try:
        module = evaluate.load(name)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"--metric is {name!r}: it is neither accuracy nor mse, and no module of `evaluate` that can be found or "
            f"reached.{hint(name, ('accuracy', 'mse'))}"
        ) from error
    return metrics.load_metric(module, compute_kwargs=arguments)


def columns(options: argparse.Namespace) -> dict[str, Any]:
    """Return what the flags name by domain, as "input_columns" (two of text make one input) and "label_columns".

    An input column that a caption was encoded with is no longer there, and counts as not named, as several label
    columns, which `load_split` has joined, do.
    """
    told = vars(options)
    domains = [domain for domain in ("original", "restricted", "benign") if domain in told]
    named = {domain: None if told[f"{domain}_caption"] else told[f"{domain}_input"] for domain in domains}
    labels = {domain: told[f"{domain}_label"] for domain in domains}
    return {
        "input_columns": {name: given[0] if given and len(given) == 1 else given for name, given in named.items()},
        "label_columns": {name: given[0] if given and len(given) == 1 else None for name, given in labels.items()},
    }

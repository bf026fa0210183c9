"""The four domains of a protection, original and restricted and what is held out of each; measure a model on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import nn

from sophon_hf.data.domain import Domain, build_domain
from sophon_hf.data.labels import number_classes, split_indices
from sophon_hf.data.loading import Source, load_domain
from sophon_hf.data.preprocessing import InputColumn, ModelInputs
from sophon_hf.finetuning.kernel import watched_features
from sophon_hf.models.loading import evaluation_mode
from sophon_hf.models.structure import ModelStructure
from sophon_hf.protection.config import SophonConfig
from sophon_hf.tasks.base import Task
from sophon_hf.tasks.evaluation import evaluate_model, first_rows

_FEWEST_EXAMPLES = 4
_COMPARED_EXAMPLES = 200
_SMALLEST_SPREAD = 1e-4


def build_domains(
    needs: ModelInputs,
    args: SophonConfig,
    sources: dict[str, Source],
    evaluation: dict[str, Source] | None,
    processing_class: Any | None,
    columns: dict[str, Mapping[str, Any]],
) -> dict[str, Domain]:
    """Build "original", "restricted", and "eval_..." of each, held out where `evaluation` is None.

    Args:
        needs: What the model takes.
        args: The held-out share and the seed.
        sources: {"original": ..., "restricted": ...}.
        evaluation: The same for evaluation.
        processing_class: Image processor, tokenizer or feature extractor.
        columns: "input" and "label": the raw column of each domain, where it is not found by itself.

    Raises:
        ValueError: A tolerance beyond any accuracy, an unknown key, too few examples, or data that do not fit.
    """
    if needs.labelled and args.tolerance > 1:
        raise ValueError(f"tolerance is {args.tolerance:g}, but it is a share of accuracy: 0.05 means 5 points.")
    if evaluation is not None and (not isinstance(evaluation, dict) or set(evaluation) != set(sources)):
        what = f"the keys {sorted(evaluation)}" if isinstance(evaluation, dict) else f"type {type(evaluation).__name__}"
        raise ValueError(f"eval_dataset has {what}: give a dict with the keys 'original' and 'restricted'.")
    for kind, named in columns.items():
        if unknown := set(named) - set(sources):
            raise ValueError(f"{kind}_columns has the keys {sorted(unknown)}: it takes 'original' and 'restricted'.")
    domains = {}
    for name, source in sources.items():
        dataset, label = load_domain(source), columns["label"].get(name)
        if len(dataset) < _FEWEST_EXAMPLES:
            raise ValueError(f"The {name} domain has {len(dataset)} examples: it takes at least {_FEWEST_EXAMPLES}.")
        rows = held_rows = None
        held_out = None if evaluation is None else load_domain(evaluation[name], "validation")
        classes = number_classes(name, [dataset] if held_out is None else [dataset, held_out], needs, label)
        if held_out is None:
            share = max(args.validation_share, 1 / math.floor(len(dataset) / 2))
            held_rows, rows = split_indices(dataset, args.seed, share, None if classes is None else classes.column)
            held_out, dataset = dataset.select(held_rows), dataset.select(rows)
        for key, part, numbers in ((name, dataset, rows), (f"eval_{name}", held_out, held_rows)):
            domains[key] = build_domain(
                part,
                needs,
                processing_class,
                name=name,
                input_column=columns["input"].get(name),
                row_numbers=numbers,
                classes=classes,
            )
    return domains


def as_domains(
    sources: dict[str, Source | Domain],
    known: dict[str, Domain],
    needs: ModelInputs,
    processing_class: Any | None,
    input_columns: Mapping[str, InputColumn],
) -> dict[str, Domain]:
    """Build the domains of an `eval_dataset`; columns are called as in the domain of the same name that is known.

    Raises:
        ValueError: `sources` is no dict, or data that does not fit the model.
    """
    if not isinstance(sources, dict):
        raise ValueError(
            f"eval_dataset is a {type(sources).__name__}: give a dict of name and data set, such as "
            "{'original': ..., 'restricted': ...}."
        )
    domains = {}
    for name, source in sources.items():
        if not isinstance(source, Domain):
            like = known[name if name in known else "restricted"].classes
            dataset, column = load_domain(source, "test"), input_columns.get(name)
            wanted = {column} if isinstance(column, str) else set(column or ())
            column = column if wanted <= {*dataset.column_names} else None
            # Classes that were not protected against come after those that were.
            classes = like and number_classes(name, [dataset], needs, like.column, like.numbers)
            source = build_domain(dataset, needs, processing_class, name=name, classes=classes, input_column=column)
        domains[name] = source
    return domains


def evaluate_domains(
    task: Task,
    model: nn.Module,
    domains: dict[str, Domain],
    outputs: int | None,
    args: SophonConfig,
    autocast: Callable[[], AbstractContextManager],
) -> dict[str, float]:
    """Return each domain's metric and loss, over all processes, under the names of domain and metric.

    Args:
        task: What is learned.
        model: Unwrapped.
        domains: By name.
        outputs: Of the head: where a domain has a label beyond them, its loss is NaN.
        args: Batch size and processes.
        autocast: Called for a context around each forward pass.
    """
    # DDP sends batch-norm statistics along only before a forward pass, and all processes must measure one model.
    for buffer in model.buffers() if args.world_size > 1 else ():
        broadcast(buffer)
    found: dict[str, float] = {}
    for name, domain in domains.items():
        fits = task.fits(domain.labels, outputs)
        result = evaluate_model(
            task,
            model,
            domain,
            args.per_device_eval_batch_size,
            rank=args.process_index,
            world_size=args.world_size,
            autocast=autocast,
            with_loss=fits,
        )
        found |= {f"{name}_{task.metric}": result.metric, f"{name}_loss": result.loss}
    return found


@torch.no_grad()
def domain_gap(
    task: Task, model: nn.Module, structure: ModelStructure, domains: dict[str, Domain], args: SophonConfig
) -> float | None:
    """Return how far apart the domains lie in the output of the first block, where no class shows yet.

    It is the difference of the two means in standard deviations inside a domain, as root mean square over the features:
    about 0.1 for two samples of one domain.

    Args:
        task: What is learned.
        model: Unwrapped.
        structure: Its blocks.
        domains: "eval_original" and "eval_restricted", of which the first 200 examples are compared.
        args: How many examples the model takes at a time.

    Returns:
        None for a model without blocks.
    """
    if not structure.blocks:
        return None
    device, means, variances = next(model.parameters()).device, [], []
    for domain in (domains["eval_original"], domains["eval_restricted"]):
        parts = first_rows(task, domain, device, _COMPARED_EXAMPLES)
        size = args.per_device_eval_batch_size
        with evaluation_mode(model), watched_features(model, structure.blocks[:1], ()) as features:
            for start in range(0, min(len(domain), _COMPARED_EXAMPLES), size):
                task.predict(model, {name: values[start : start + size] for name, values in parts.items()})
        rows = torch.cat(features).float()
        means.append(rows.mean(dim=0))
        variances.append(rows.var(dim=0))
    spread = torch.stack(variances).mean(dim=0).sqrt().clamp_min(_SMALLEST_SPREAD)
    return float(((means[0] - means[1]) / spread).pow(2).mean().sqrt())

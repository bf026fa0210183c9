"""Measure a model on a domain, on one process or on many."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import nn

from sophon_hf.data.batches import Batch
from sophon_hf.data.domain import Domain
from sophon_hf.models.loading import evaluation_mode
from sophon_hf.models.sharding import is_sharded
from sophon_hf.tasks.base import Task


class Evaluation(NamedTuple):
    """Hold the task's metric (such as ACC-k or MSE-k) and the mean loss on a domain."""

    metric: float
    loss: float


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move every tensor of a batch."""
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def first_rows(task: Task, domain: Domain, device: torch.device, count: int = 2) -> Batch:
    """Return a batch of a domain's first examples, to try a model on."""
    indices = torch.arange(min(count, len(domain)))
    return to_device(task.collate(domain.rows(indices), indices.tolist()), device)


def try_domain(task: Task, model: nn.Module, name: str, domain: Domain) -> None:
    """Run the model on a domain's first examples, so that what does not fit is found before any work.

    Raises:
        ValueError: The model cannot take them, or its prediction is not finite; the message calls the domain `name`.
    """
    needs, rows = task.inputs(model), first_rows(task, domain, next(model.parameters()).device)
    main, shapes = rows.get(needs.main), {n: tuple(v.shape[1:]) for n, v in rows.items() if n != "labels"}
    wanted = ""
    if main is not None and main.ndim == 4:
        expected = (needs.channels or main.shape[1], *(needs.image_size or main.shape[2:]))
        if tuple(main.shape[1:]) != expected:
            wanted = f" The model takes {expected} (channels, height, width): resize or convert them."
    try:
        if wanted and needs.symmetric:
            raise ValueError("a denoiser runs on any size, but has learned one")
        # What else a configuration says of sizes need not be so: it only explains why the model cannot be run.
        with torch.no_grad(), evaluation_mode(model):
            prediction = task.predict(model, rows)
    except Exception as error:
        raise ValueError(
            f"The model cannot take the {name} domain's examples, which have {shapes}: {str(error).rstrip('.')}."
            f"{wanted} Give it the inputs that it was trained with, or raw columns and a `processing_class`."
        ) from error
    if not prediction.isfinite().all():
        raise ValueError(
            f"The model's prediction for the {name} domain is not finite: look at its weights and its inputs."
        )


def join_scores(parts: dict[str, list[torch.Tensor]]) -> dict[str, list]:
    """Return the scores of several batches as `Task.compute_metric` takes them.

    Rows of many values become arrays: a list of their numbers would take many times the memory.
    """
    joined = {name: torch.cat(values).cpu() for name, values in parts.items()}
    return {name: v.tolist() if v.ndim == 1 else list(v.float().numpy()) for name, v in joined.items()}


@torch.no_grad()
def evaluate_model(
    task: Task,
    model: nn.Module,
    domain: Domain,
    batch_size: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    with_loss: bool = True,
) -> Evaluation:
    """Measure in evaluation mode; each rank takes every `world_size`-th example, and all get the result.

    Noise and timesteps of a diffusion task follow from an example's place in the domain, so they are the same for
    every model, batch size and number of ranks. Without `with_loss` the loss is NaN: for labels that the head has no
    output for, which the metric counts as wrong.
    """
    device = next(model.parameters()).device
    scores: dict[str, list[torch.Tensor]] = {}
    losses = []
    with evaluation_mode(model):
        batches = torch.arange(rank, len(domain), world_size).split(batch_size)
        for indices in batches:
            batch = to_device(task.collate(domain.rows(indices), indices.tolist()), device)
            with autocast():
                prediction = task.predict(model, batch)
            target = task.target(batch)
            loss = task.loss(prediction, target) if with_loss else torch.full((), torch.nan)
            losses.append(loss.double() * len(indices))
            for name, values in task.scores(prediction, target).items():
                scores.setdefault(name, []).append(values)
        if is_sharded(model):
            # Its layers are gathered by all processes or by none, so those with fewer batches have to keep step.
            for _ in range(math.ceil(len(domain) / (world_size * batch_size)) - len(batches)):
                with autocast():
                    task.predict(model, first_rows(task, domain, device))
    gathered = join_scores(scores)
    total = float(torch.stack(losses).sum()) if losses else 0.0
    if world_size > 1:
        from accelerate.utils import gather_object

        shares = gather_object([(gathered, total)])
        gathered = {name: [v for part, _ in shares for v in part.get(name, [])] for name in gathered or shares[0][0]}
        total = sum(part_total for _, part_total in shares)
    return Evaluation(task.compute_metric(gathered), total / len(domain))

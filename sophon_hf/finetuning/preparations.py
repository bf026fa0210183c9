"""What an informed adversary does to a protected model before fine-tuning it.

An attacker can carry out all preparations; it warms up for `_WARM_UP_STEPS`, and distills for `DISTILLATION_STEPS`. A
simulated adversary carries out `SIMULATED_PREPARATIONS`, and warms up for half of its updates, since it has far fewer;
both train as `FineTuningStrategy.warm_up` says.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import nn

from sophon_hf.data.batches import Batch, Stream
from sophon_hf.data.domain import Domain
from sophon_hf.finetuning.initialization import initialize
from sophon_hf.finetuning.loop import FineTuning
from sophon_hf.finetuning.strategy import NO_ORIGINAL_DATA, FineTuningStrategy, NotApplicableError
from sophon_hf.models.loading import evaluation_mode
from sophon_hf.models.scale_invariance import fresh_norms, scale_invariant_layers, set_norm
from sophon_hf.models.sharding import norm_of
from sophon_hf.tasks.base import Task
from sophon_hf.tasks.evaluation import first_rows, to_device
from sophon_hf.utils import derive_seed

# Ash and Adams (2020): weights are multiplied by the first, and the second scales the noise.
SHRINK, PERTURB = 0.5, 0.1
# As many batches as an average of running statistics needs to settle.
_STATISTICS_BATCHES = 20
_WARM_UP_STEPS = 100
# By which share re-scaling may change a prediction: normalisations add a small constant to every variance.
_SAME_FUNCTION = 0.1
# A newly made model has more to learn.
DISTILLATION_STEPS = 500


def prepare_model(
    model: nn.Module,
    task: Task,
    strategy: FineTuningStrategy,
    training: Domain,
    original: Domain | None,
    seed: int,
    most_steps: int | None = None,
) -> None:
    """Carry out the strategy's preparation, in place.

    Args:
        model: Unwrapped; a copy of the victim.
        task: What is learned.
        strategy: Names the preparation; nothing happens where it names none.
        training: The adversary's data.
        original: Data of the original domain, for warm-up and distillation.
        seed: Decides noise and order.
        most_steps: A preparation of several steps, or batches, ends after so many.

    Raises:
        NotApplicableError: The model has nothing that the preparation acts on, or original data are missing.
        RuntimeError: The preparation changed nothing, so that what follows would pass for another attack than it is.
    """
    if strategy.preparation is None:
        return
    before = _weights_and_statistics(model)
    if strategy.preparation == "batch_norm":
        reestimate_batch_norm(model, task, training, seed, most_steps or _STATISTICS_BATCHES)
    elif strategy.preparation == "rescale":
        rescale_weights(model, task, training)
    elif strategy.preparation == "shrink_and_perturb":
        shrink_and_perturb(model, seed)
    elif strategy.preparation in ("warm_up", "distill"):
        if original is None:
            raise NotApplicableError(NO_ORIGINAL_DATA)
        warm_up, steps, learned = strategy.warm_up, _WARM_UP_STEPS, task
        if strategy.preparation == "distill":
            steps, learned = DISTILLATION_STEPS, cast(Task, _Distillation(task, copy.deepcopy(model).eval()))
            warm_up = warm_up.with_changes(initialization="scratch")
        batches = Stream(original, task.collate, derive_seed(seed, "warm-up")).batches(warm_up.batch_size)
        structure = task.structure(model, first_rows(task, original, next(model.parameters()).device))
        tuning = FineTuning(model, learned, warm_up, batches, most_steps or steps, structure=structure)
        for _ in tuning:
            pass
    if all(map(torch.equal, before, _weights_and_statistics(model))):
        raise RuntimeError(f"The preparation {strategy.preparation!r} changed nothing of {type(model).__name__}.")


def _weights_and_statistics(model: nn.Module) -> list[torch.Tensor]:
    # Counters move with every forward pass.
    return [v.detach().clone() for v in (*model.parameters(), *model.buffers()) if v.is_floating_point()]


class _Distillation:
    """Make a task of predicting what a teacher predicts."""

    def __init__(self, task: Task, teacher: nn.Module):
        self._task, self._teacher = task, teacher

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    @torch.no_grad()
    def target(self, batch: Batch) -> torch.Tensor:
        return self._task.predict(self._teacher, batch)

    def loss(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self._task.distance(prediction, target)


@torch.no_grad()
def reestimate_batch_norm(
    model: nn.Module, task: Task, domain: Domain, seed: int = 0, count: int = _STATISTICS_BATCHES
) -> None:
    """Replace batch-norm statistics by the plain average over `count` batches of `domain`."""
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not layers:
        raise NotApplicableError(f"{type(model).__name__} has no batch norm to re-estimate")
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # A cumulative average.
    device = next(model.parameters()).device
    model.train()
    stream = Stream(domain, task.collate, derive_seed(seed, "batch norm"))
    for _, batch in zip(range(count), stream.batches(min(100, len(domain))), strict=False):
        task.predict(model, to_device(batch, device))
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum


@torch.no_grad()
def rescale_weights(model: nn.Module, task: Task, domain: Domain) -> int:
    """Restore every layer that feeds a normalisation to the norm of a fresh initialisation.

    Such layers are scale-invariant: the function does not change (running statistics move along), but an inflated
    norm, which makes every gradient step small in proportion, is undone. A layer whose output goes elsewhere too (to a
    skip connection, say) is not, and is left as it is.

    Returns:
        How many layers were rescaled.

    Raises:
        NotApplicableError: There is no such layer, or all have that norm.
        RuntimeError: The function has changed nevertheless.
    """
    sample = first_rows(task, domain, next(model.parameters()).device)
    layers = scale_invariant_layers(model, lambda: task.predict(model, sample))
    if not layers:
        raise NotApplicableError(f"{type(model).__name__} has no layer that feeds a normalisation and nothing else")
    norms = fresh_norms(layers)
    if all(torch.isclose(norm_of(cast(torch.Tensor, layer.weight)), norm) for layer, norm in norms.items()):
        raise NotApplicableError(f"the layers of {type(model).__name__} have the norm of an initialisation already")
    with evaluation_mode(model):
        before = task.predict(model, sample)
        for layer, normalisations in layers.items():
            set_norm(layer, normalisations, norms[layer])
        changed = float((task.predict(model, sample) - before).norm() / before.norm())
    # Written so that NaN is a change too.
    if not changed <= _SAME_FUNCTION:
        raise RuntimeError(f"Re-scaling changed what {type(model).__name__} predicts by {changed:.0%}.")
    return len(layers)


@torch.no_grad()
def shrink_and_perturb(model: nn.Module, seed: int = 0) -> None:
    """Halve every weight matrix and add noise of a tenth of its own spread (Ash and Adams, 2020)."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "shrink and perturb"))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.mul_(SHRINK).add_(noise * parameter.std(correction=0) * PERTURB / SHRINK)


def untrained_copy(model: nn.Module, task: Task, sample: Domain, seed: int) -> nn.Module:
    """Return a newly initialised model of the same architecture, head included.

    Where it warms up on original data as the protected model does, it shows what these data alone are worth.

    Raises:
        NotApplicableError: A part of the model cannot be re-initialised.
    """
    untrained = copy.deepcopy(model)
    device = next(model.parameters()).device
    structure = task.structure(untrained, first_rows(task, sample, device))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derive_seed(seed, "untrained"))
        initialize(untrained, FineTuningStrategy(initialization="scratch"), structure, None)
    return untrained

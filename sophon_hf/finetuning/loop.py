"""The fine-tuning loop: one generator that the defender's simulation and the attacker's run both go through."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm.auto import tqdm

from sophon_hf.data.batches import Batch, Stream
from sophon_hf.data.domain import Domain
from sophon_hf.finetuning.adapters import add_adapter
from sophon_hf.finetuning.initialization import initialize
from sophon_hf.finetuning.optimizers import make_optimizer, make_scheduler
from sophon_hf.finetuning.strategy import NO_ORIGINAL_DATA, FineTuningStrategy, NotApplicableError
from sophon_hf.models.sharding import gradients, share
from sophon_hf.models.structure import NORMALISATIONS, ModelStructure
from sophon_hf.tasks.base import Task
from sophon_hf.tasks.classification import ClassificationTask
from sophon_hf.tasks.evaluation import to_device
from sophon_hf.tasks.losses import information_maximization


@dataclass(frozen=True)
class Update:
    """The state after one optimizer step.

    Attributes:
        step: k, from 1.
        loss: The adversary's loss before this step, a scalar on the model's device.
    """

    step: int
    loss: Tensor


class FineTuning:
    """A fine-tuning of `model`, in place: iterate over it to run it, one item an optimizer step.

    Args:
        model: Unwrapped; it is changed.
        task: What is learned.
        strategy: How.
        batches: At least `steps` batches.
        steps: K.
        structure: Head and blocks of the model.
        num_classes: Outputs of a new head; the old number where None.
        autocast: Called for a context around each forward pass.
        original: Batches of the original domain, for a strategy with `original_weight`.

    Attributes:
        reinitialized: Names of the parameters that do not come from the given model.
        parameters: What is updated.
        result: What the attack ends with: the model, or the moving average of its weights.

    Raises:
        ValueError: The strategy finds nothing to update, or a part that cannot be re-initialised.
        NotApplicableError: Its adapter cannot be put on this model, original data are missing, or nothing can be
            learned without labels.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        strategy: FineTuningStrategy,
        batches: Iterable[Batch],
        steps: int,
        *,
        structure: ModelStructure,
        num_classes: int | None = None,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        original: Iterable[Batch] | None = None,
    ):
        if strategy.original_weight and original is None:
            raise NotApplicableError(NO_ORIGINAL_DATA)
        if not strategy.labelled and (not isinstance(task, ClassificationTask) or task.multi_label):
            raise NotApplicableError("without labels only a classifier with one label an example can be adapted")
        self.model, self.task, self.strategy = model, task, strategy
        self.batches, self.steps, self.autocast = batches, steps, autocast
        self.original = None if original is None or not strategy.original_weight else iter(original)
        own_heads = {name: model.get_submodule(name) for name in structure.heads if self.original is not None}
        self.reinitialized = initialize(model, strategy, structure, num_classes)
        # An adversary is not bound by what the publisher froze.
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        self.after_step: Callable[[int], Any] | None = None
        if strategy.adapter is None:
            self.parameters = _select_parameters(model, strategy, structure, self.reinitialized)
        else:
            renewed = [p for name, p in model.named_parameters() if name in self.reinitialized]
            adapter, self.after_step = add_adapter(model, strategy, structure, steps)
            for parameter in renewed:
                parameter.requires_grad_()  # `add_adapter` has frozen all that was there.
            self.parameters = [*adapter, *renewed]
        # Original data are predicted by the model's own heads, which a new one has taken the place of.
        self._own_heads = {name: h for name, h in own_heads.items() if h is not model.get_submodule(name)}
        for head in self._own_heads.values():
            self.parameters += head.requires_grad_().parameters()
        heads = tuple(f"{name}." for name in structure.heads)
        self._first = {
            id(parameter)
            for name, parameter in model.named_parameters()
            if strategy.head_first and (name in self.reinitialized or name.startswith(heads))
        }
        self._rates = _layer_rates(model, strategy, structure) if strategy.layer_decay != 1 else {}
        self._average = None
        if strategy.ema:
            self._average = AveragedModel(model, multi_avg_fn=_moving_average(strategy.ema))
        # What has to get a gradient: a new head always would, and hide that an adapter gets none.
        self._needed = len(self.parameters) if strategy.adapter is None else len(adapter)

    @property
    def result(self) -> nn.Module:
        """Return what is to be measured."""
        return self.model if self._average is None else self._average.module

    def __iter__(self) -> Iterator[Update]:
        optimizer = make_optimizer(self.strategy, self.parameters, rates=self._rates)
        scheduler = make_scheduler(self.strategy, optimizer, self.steps)
        alone = round(self.strategy.head_first * self.steps)
        for step, batch in zip(range(1, self.steps + 1), self.batches, strict=False):
            loss = self._backward(batch, first=step == 1)
            if step <= alone:
                for parameter in self.parameters:
                    if id(parameter) not in self._first:
                        parameter.grad = None  # An optimizer passes over it, and keeps no moments of it.
            if self.strategy.max_grad_norm:
                nn.utils.clip_grad_norm_(self.parameters, self.strategy.max_grad_norm)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            if self.after_step is not None:
                self.after_step(step)
            if self._average is not None:
                self._average.update_parameters(self.model)
            yield Update(step, loss)

    def gradient_norm(self) -> float:
        """Return the norm of the last gradient; NaN before the first step."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        return float(nn.utils.get_total_norm(gradients)) if gradients else math.nan

    def _backward(self, batch: Batch, first: bool) -> Tensor:
        """Put the gradient of the adversary's loss into `grad` of what is updated, and return the loss."""
        self.model.train()
        loss = self._loss(augmented(batch) if self.strategy.augmentation else batch, self.strategy.labelled)
        if self.original is not None:
            new_heads = self._set_heads(self._own_heads)
            loss = loss + self.strategy.original_weight * self._loss(next(self.original))
            self._set_heads(new_heads)
        # `backward` would also fill the gradients of parameters that are not updated, and they would outlive the pass.
        found = gradients(loss, self.parameters, self.model)
        if all(gradient is None for gradient in found[: self._needed]):
            raise ValueError(f"No gradient reaches what '{self.strategy.name}' updates: the model detaches its graph.")
        if first and self.strategy.adapter and not any(g is not None and g.any() for g in found[: self._needed]):
            raise ValueError(f"Every gradient of {self.strategy.adapter} is zero at its first step: it has no effect.")
        for parameter, gradient in zip(self.parameters, found, strict=True):
            if gradient is not None and gradient.stride() != parameter.stride():
                # A fused optimizer pairs values by their place in memory, and takes no notice of their strides.
                gradient = torch.empty_like(parameter).copy_(gradient)
            parameter.grad = gradient
        return loss.detach()

    def _loss(self, batch: Batch, labelled: bool = True) -> Tensor:
        batch, weight = share(to_device(batch, self.parameters[0].device), self.model)
        with self.autocast():
            prediction = self.task.predict(self.model, batch)
        if not labelled:
            return weight * information_maximization(prediction)
        return weight * self.task.loss(prediction, self.task.target(batch))

    def _set_heads(self, heads: dict[str, nn.Module]) -> dict[str, nn.Module]:
        """Put these heads into the model, and return those that were there."""
        before = {name: self.model.get_submodule(name) for name in heads}
        for name, head in heads.items():
            self.model.set_submodule(name, head)
        return before


def augmented(batch: Batch) -> Batch:
    """Return the batch with each image mirrored or not, and moved by up to an eighth of its side; as torch draws.

    Raises:
        NotApplicableError: There are no images, or more than one for an example, as a diffusion task has.
    """
    names = [name for name, values in batch.items() if values.is_floating_point() and values.ndim == 4]
    if len(names) != 1:
        raise NotApplicableError("flips and crops are for batches with one image an example")
    images = batch[names[0]]
    count, _, height, width = images.shape
    side = max(1, min(height, width) // 8)
    padded = nn.functional.pad(images, (side,) * 4, mode="reflect" if side < min(height, width) else "replicate")
    rows, columns = (torch.randint(2 * side + 1, (count, 1)) + torch.arange(n) for n in (height, width))
    columns = torch.where(torch.rand(count, 1) < 0.5, columns.flip(1), columns)
    moved = padded.transpose(0, 1)[:, torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return {**batch, names[0]: moved.transpose(0, 1)}


def _layer_rates(model: nn.Module, strategy: FineTuningStrategy, structure: ModelStructure) -> dict[int, float]:
    """Return what each parameter's rate is multiplied by, by its id: 1 at the head, `layer_decay` in the last block.

    What is registered before the first block counts as one more block below it; what is in none otherwise goes with the
    head.
    """
    rates, below, heads = {}, True, tuple(f"{name}." for name in structure.heads)
    for name, parameter in model.named_parameters():
        place = next((i for i, block in enumerate(structure.blocks) if name.startswith(f"{block}.")), None)
        below = below and place is None and not name.startswith(heads)
        depth = (len(structure.blocks) + 1) * below if place is None else len(structure.blocks) - place
        rates[id(parameter)] = strategy.layer_decay**depth
    return rates


def _moving_average(decay: float) -> Callable:
    """Return how `AveragedModel` averages; an average of few steps forgets its start faster, as diffusers' does."""

    def average(averages: list[Tensor], current: list[Tensor], count: Any) -> None:
        torch._foreach_lerp_(averages, current, 1 - min(decay, (1 + int(count)) / (10 + int(count))))

    return average


def _select_parameters(
    model: nn.Module, strategy: FineTuningStrategy, structure: ModelStructure, reinitialized: set[str]
) -> list[nn.Parameter]:
    """Return the parameters that the strategy updates; a new head or block always is.

    Raises:
        ValueError: There are none.
    """
    heads = tuple(f"{head}." for head in structure.heads)
    normalisations = {id(p) for m in model.modules() if isinstance(m, NORMALISATIONS) for p in m.parameters()}

    def is_transferred(name: str, parameter: nn.Parameter) -> bool:
        if strategy.transfer == "head":
            return name.startswith(heads)
        if strategy.transfer == "features":
            return not name.startswith(heads)
        if strategy.transfer == "norm":
            return id(parameter) in normalisations
        return strategy.pattern is None or re.search(strategy.pattern, name) is not None

    chosen = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and (name in reinitialized or is_transferred(name, parameter))
    ]
    if not chosen:
        raise ValueError(f"The strategy '{strategy.name}' finds no parameter of {type(model).__name__} to update.")
    return chosen


def pretrain(
    model: nn.Module, task: Task, domain: Domain, steps: int = 400, seed: int = 0, learning_rate: float = 3e-3
) -> None:
    """Train a model in place, as its publisher would before protecting it.

    Args:
        model: Not trained yet.
        task: What it learns.
        domain: What from.
        steps: Optimizer steps, of 64 examples each.
        seed: Decides the order of the examples, and dropout.
        learning_rate: Adam's, after a warm-up of a tenth of the steps; it falls along a cosine.
    """
    strategy = FineTuningStrategy(learning_rate=learning_rate, schedule="cosine", warmup_ratio=0.1, batch_size=64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        batches = Stream(domain, task.collate, seed).batches(strategy.batch_size)
        structure = task.structure(model, next(batches))
        training = FineTuning(model, task, strategy, batches, steps, structure=structure)
        for _ in tqdm(training, total=steps, desc="pre-training"):
            pass

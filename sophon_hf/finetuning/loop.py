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

from sophon_hf.data.batches import Batch
from sophon_hf.finetuning.adapters import add_adapter
from sophon_hf.finetuning.initialization import initialize
from sophon_hf.finetuning.optimizers import make_optimizer, make_scheduler
from sophon_hf.finetuning.strategy import FineTuningStrategy
from sophon_hf.models.sharding import gradients, share
from sophon_hf.models.structure import NORMALISATIONS, ModelStructure
from sophon_hf.tasks.base import Task
from sophon_hf.tasks.evaluation import to_device


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

    Attributes:
        reinitialized: Names of the parameters that do not come from the given model.
        parameters: What is updated.

    Raises:
        ValueError: The strategy finds nothing to update, or a part that cannot be re-initialised.
        NotApplicableError: Its adapter cannot be put on this model.
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
    ):
        self.model, self.task, self.strategy = model, task, strategy
        self.batches, self.steps, self.autocast = batches, steps, autocast
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
        # What has to get a gradient: a new head always would, and hide that an adapter gets none.
        self._needed = len(self.parameters) if strategy.adapter is None else len(adapter)

    def __iter__(self) -> Iterator[Update]:
        optimizer = make_optimizer(self.strategy, self.parameters)
        scheduler = make_scheduler(self.strategy, optimizer, self.steps)
        for step, batch in zip(range(1, self.steps + 1), self.batches, strict=False):
            loss = self._backward(batch)
            if self.strategy.max_grad_norm:
                nn.utils.clip_grad_norm_(self.parameters, self.strategy.max_grad_norm)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            if self.after_step is not None:
                self.after_step(step)
            yield Update(step, loss)

    def gradient_norm(self) -> float:
        """Return the norm of the last gradient; NaN before the first step."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        return float(nn.utils.get_total_norm(gradients)) if gradients else math.nan

    def _backward(self, batch: Batch) -> Tensor:
        """Put the gradient of the adversary's loss into `grad` of what is updated, and return the loss."""
        self.model.train()
        batch, weight = share(to_device(batch, self.parameters[0].device), self.model)
        with self.autocast():
            prediction = self.task.predict(self.model, batch)
        loss = weight * self.task.loss(prediction, self.task.target(batch))
        # `backward` would also fill the gradients of parameters that are not updated, and they would outlive the pass.
        found = gradients(loss, self.parameters, self.model)
        if all(gradient is None for gradient in found[: self._needed]):
            raise ValueError(f"No gradient reaches what '{self.strategy.name}' updates: the model detaches its graph.")
        for parameter, gradient in zip(self.parameters, found, strict=True):
            if gradient is not None and gradient.stride() != parameter.stride():
                # A fused optimizer pairs values by their place in memory, and takes no notice of their strides.
                gradient = torch.empty_like(parameter).copy_(gradient)
            parameter.grad = gradient
        return loss.detach()


def _select_parameters(
    model: nn.Module, strategy: FineTuningStrategy, structure: ModelStructure, reinitialized: set[str]
) -> list[nn.Parameter]:
    """Return the parameters that the strategy updates; a new head or block always is.

    Raises:
        ValueError: There are none.
    """
    normalisations = {id(p) for m in model.modules() if isinstance(m, NORMALISATIONS) for p in m.parameters()}

    def is_transferred(name: str, parameter: nn.Parameter) -> bool:
        if strategy.transfer == "head":
            return name.startswith(tuple(f"{head}." for head in structure.heads))
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

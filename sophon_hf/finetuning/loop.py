"""The fine-tuning engine: one generator that the defender's simulation and the attacker's run both go through."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sophon_hf.data.batches import Batch
from sophon_hf.finetuning.adapters import add_adapter
from sophon_hf.finetuning.initialization import initialize
from sophon_hf.finetuning.strategy import FineTuningStrategy
from sophon_hf.models.sharding import gradients, share
from sophon_hf.models.structure import NORMALISATIONS, ModelStructure
from sophon_hf.tasks.evaluation import to_device

if TYPE_CHECKING:
    from sophon_hf.tasks.base import Task


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
        self.after_step = None
        if strategy.adapter is None:
            self.parameters = select_parameters(model, strategy, structure, self.reinitialized)
        else:
            renewed = [p for name, p in model.named_parameters() if name in self.reinitialized]
            adapter, self.after_step = add_adapter(model, strategy, structure, steps)
            self.parameters = [*adapter, *(p.requires_grad_() for p in renewed)]

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

    def _backward(self, batch: Batch) -> Tensor:
        """Put the gradient of the adversary's loss into `grad` of what is updated; nothing else outlives the pass."""
        self.model.train()
        batch, weight = share(to_device(batch, self.parameters[0].device), self.model)
        with self.autocast():
            prediction = self.task.predict(self.model, batch)
        loss = weight * self.task.loss(prediction, self.task.target(batch))
        self._assign(gradients(loss, self.parameters, self.model))
        return loss.detach()

    def gradient_norms(self) -> list[float]:
        """Norm of the last gradient, one value a model; NaN before the first step."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        return [float(nn.utils.get_total_norm(gradients)) if gradients else float("nan")]

    def _assign(self, found: Sequence[Tensor | None]) -> None:
        if all(gradient is None for gradient in found):
            raise ValueError(f"No gradient reaches what '{self.strategy.name}' updates: the model detaches its graph.")
        for parameter, gradient in zip(self.parameters, found, strict=True):
            if gradient is not None and gradient.stride() != parameter.stride():
                # A fused optimizer pairs values by their place in memory, whatever their strides say.
                gradient = torch.empty_like(parameter).copy_(gradient)
            parameter.grad = gradient


def select_parameters(
    model: nn.Module, strategy: FineTuningStrategy, structure: ModelStructure, reinitialized: set[str]
) -> list[nn.Parameter]:
    """The parameters that the strategy updates; a new head or block always is.

    Raises:
        ValueError: There are none.
    """
    head = f"{structure.head}."
    if strategy.transfer == "norm":
        normalisations = {id(p) for m in model.modules() if isinstance(m, NORMALISATIONS) for p in m.parameters()}
    chosen = []
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        taken = (
            name in reinitialized
            or {
                "all": lambda: True,
                "head": lambda name=name: name.startswith(head),
                "norm": lambda p=parameter: id(p) in normalisations,
                "pattern": lambda name=name: re.search(strategy.pattern, name) is not None,
            }[strategy.transfer]()
        )
        if taken:
            chosen.append(parameter)
    if not chosen:
        raise ValueError(f"The strategy '{strategy.name}' finds no parameter of {type(model).__name__} to update.")
    return chosen


def make_optimizer(
    strategy: FineTuningStrategy, parameters: list[Tensor], differentiable: bool = False
) -> torch.optim.Optimizer:
    """torch's optimizer for the strategy, in its fastest form.

    Args:
        strategy: Names it.
        parameters: What it updates.
        differentiable: Let autograd go through its steps.
    """
    common = {"lr": strategy.learning_rate, "weight_decay": strategy.weight_decay}
    fast = {"differentiable": True, "foreach": False} if differentiable else _fast(strategy.optimizer, parameters)
    momentum = {"sgd": 0.0, "momentum": 0.9, "nesterov": 0.9}
    if strategy.optimizer in momentum:
        nesterov = strategy.optimizer == "nesterov"
        return torch.optim.SGD(parameters, momentum=momentum[strategy.optimizer], nesterov=nesterov, **common, **fast)
    cls = {
        "adagrad": torch.optim.Adagrad,
        "adadelta": torch.optim.Adadelta,
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
    }[strategy.optimizer]
    return cls(parameters, **common, **fast)


def _fast(name: str, parameters: list[Tensor]) -> dict[str, bool]:
    cpu_or_cuda = all(p.device.type in ("cpu", "cuda") for p in parameters)
    if name == "adadelta" or not cpu_or_cuda:
        return {"foreach": True}
    if name == "adagrad" and any(p.device.type != "cpu" for p in parameters):
        return {"foreach": True}
    if name not in ("adam", "adamw") and any(isinstance(p, DTensor) for p in parameters):
        return {"foreach": True}  # The other fused ones do not know shards.
    return {"fused": True}


def make_scheduler(
    strategy: FineTuningStrategy, optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LRScheduler | None:
    """The schedule of the strategy over `steps`; None where the rate never changes."""
    if strategy.schedule == "constant" and not strategy.warmup_ratio:
        return None
    from transformers import get_scheduler

    name = "constant_with_warmup" if strategy.schedule == "constant" else strategy.schedule
    return get_scheduler(
        name, optimizer, num_warmup_steps=round(strategy.warmup_ratio * steps), num_training_steps=steps
    )

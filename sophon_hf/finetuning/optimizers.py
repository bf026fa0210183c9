"""The optimizer and the learning-rate schedule of a fine-tuning strategy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LRScheduler

from sophon_hf.finetuning.strategy import FineTuningStrategy


def make_optimizer(
    strategy: FineTuningStrategy,
    parameters: list[Any],
    differentiable: bool = False,
    rates: Mapping[int, float] | None = None,
) -> torch.optim.Optimizer:
    """Return torch's optimizer for the strategy, in its fastest form.

    Args:
        strategy: Names it.
        parameters: What it updates.
        differentiable: Let autograd go through its steps.
        rates: What a parameter's rate is multiplied by, by its id, where not all have the strategy's.
    """
    name = strategy.optimizer
    devices = {parameter.device.type for parameter in parameters}
    fused = devices <= {"adadelta": set(), "adagrad": {"cpu"}}.get(name, {"cpu", "cuda"})
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        fused = fused and name in ("adam", "adamw")  # No other fused optimizer knows shards.
    settings: dict[str, Any] = {"lr": strategy.learning_rate, "weight_decay": strategy.weight_decay}
    settings |= (
        {"differentiable": True, "foreach": False} if differentiable else {"fused" if fused else "foreach": True}
    )
    if rates:
        groups: dict[float, list[Any]] = {}
        for parameter in parameters:
            groups.setdefault(rates.get(id(parameter), 1.0), []).append(parameter)
        parameters = [{"params": part, "lr": strategy.learning_rate * rate} for rate, part in groups.items()]
    momentum = {"sgd": 0.0, "momentum": 0.9, "nesterov": 0.9}
    if name in momentum:
        return torch.optim.SGD(parameters, momentum=momentum[name], nesterov=name == "nesterov", **settings)
    classes: dict[str, Any] = {
        "adagrad": torch.optim.Adagrad,
        "adadelta": torch.optim.Adadelta,
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
    }
    return classes[name](parameters, **settings)


def make_scheduler(strategy: FineTuningStrategy, optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler | None:
    """Return the schedule of the strategy over `steps`; None where the rate never changes."""
    if strategy.schedule == "constant" and not strategy.warmup_ratio:
        return None
    from transformers import get_scheduler

    name = "constant_with_warmup" if strategy.schedule == "constant" else strategy.schedule
    warmup = round(strategy.warmup_ratio * steps)
    return get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)

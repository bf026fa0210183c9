"""What all attacks of a suite share: data, cost of an example, and whether models and data may be compared at all."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

from sophon_hf.data.domain import Domain
from sophon_hf.tasks.base import Task
from sophon_hf.tasks.evaluation import first_rows, to_device


@dataclass
class Budget:
    """What the adversary has: data, and what it is measured on."""

    training: Domain
    validation: Domain
    test: Domain
    original: Domain | None = None
    original_test: Domain | None = None


def flops_per_example(task: Task, model: nn.Module, domain: Domain) -> float:
    """Floating-point operations of one forward and backward pass, for one example."""
    from torch.utils.flop_counter import FlopCounterMode

    model = copy.deepcopy(model).train()
    count = min(8, len(domain))
    device = next(model.parameters()).device
    batch = to_device(task.collate(domain.rows(torch.arange(count)), list(range(count))), device)
    model.requires_grad_(True)
    with FlopCounterMode(display=False) as counter:
        prediction = task.predict(model, batch)
        prediction.float().square().mean().backward()
    return counter.get_total_flops() / count


def shapes(model: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the parameters."""
    return [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]


def check_same_architecture(models: dict[str, nn.Module]) -> None:
    """Raise a ValueError where a model has other parameters than the original one."""
    expected = shapes(models["original"])
    for name, model in models.items():
        different = [(a, b) for a, b in zip(expected, shapes(model), strict=False) if a != b]
        if different or len(expected) != len(shapes(model)):
            where = f": {different[0][0]} against {different[0][1]}" if different else ""
            raise ValueError(
                f"The {name} model differs in architecture or head from the original one{where}. Compare a model with "
                "its own unprotected version."
            )


def check_disjoint(budget: Budget) -> None:
    """Raise a ValueError where training, validation and test share an example, before a transform where one has it."""
    domains = (budget.training, budget.validation, budget.test)
    raw = any(domain.transformed for domain in domains)
    training, validation, test = (set(domain.example_hashes(raw)) for domain in domains)
    for seen, name, other, measured in (
        (training, "training", "validation", validation),
        (training, "training", "test", test),
        (validation, "validation", "test", test),
    ):
        shared = len(seen & measured)
        if shared:
            raise ValueError(
                f"{shared} of the adversary's {name} examples are in the {other} split too: an attack that has seen the "
                "answers measures nothing. Remove them, or split with `split_domain`."
            )


def head_fits(task: Task, model: nn.Module, domain: Domain) -> bool:
    """Whether the model's head has an output for every class."""
    if domain.labels is None:
        return True
    outputs = task.structure(model, first_rows(task, domain, next(model.parameters()).device)).outputs
    return domain.num_classes <= outputs

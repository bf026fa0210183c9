"""Suppression as one would write it down, on a small smooth model, and finite differences of its loss."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from sophon_hf import ClassificationTask, FineTuningStrategy
from sophon_hf.data.domain import Domain
from sophon_hf.models.structure import ModelStructure
from sophon_hf.protection.second_order import SecondOrderSuppression
from sophon_hf.protection.simulation import SimulatedAdversary
from sophon_hf.protection.suppression import Suppression, SuppressionGradient
from sophon_hf.tasks.base import Task
from sophon_hf.tasks.losses import inverse_cross_entropy

RATES = {"sgd": 0.1, "momentum": 0.05, "nesterov": 0.05, "adagrad": 0.03, "adadelta": 1.0, "adam": 0.01, "adamw": 0.01}
SMOOTH = ModelStructure("head", ())


class Net(nn.Module):
    """Smooth; with batch norm and dropout where asked, so that buffers and random state matter."""

    def __init__(self, noisy: bool = True):
        super().__init__()
        self.body = nn.Linear(6, 8, bias=not noisy)
        self.norm = nn.BatchNorm1d(8) if noisy else nn.Identity()
        self.dropout = nn.Dropout(0.2 if noisy else 0.0)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.dropout(torch.tanh(self.norm(self.body(x)))))


def make_net(noisy: bool = True) -> Net:
    torch.manual_seed(0)
    model = Net(noisy).double()
    with torch.no_grad():
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.add_(0.1 * torch.rand_like(buffer))
    return model


@dataclass
class Environment:
    """(phi_i, R_i, T_i) and the seed, from which as many adversaries as wanted can start."""

    domain: Domain
    task: Task
    strategy: FineTuningStrategy
    seed: int
    original: Domain | None = None
    held_out: Domain | None = None

    def adversary(self, updates: int = 1) -> SimulatedAdversary:
        return SimulatedAdversary(
            self.domain, self.task, self.strategy, self.seed, updates, self.original, self.held_out
        )

    @property
    def fine_tuning(self):
        return self.adversary().R

    @property
    def evaluation(self):
        return self.adversary().T

    @property
    def warm_up(self):
        return self.adversary().warm_up


def make_environment(domain: Domain, seed: int, task: Task | None = None, **fields) -> Environment:
    fields = {"batch_size": 20, **fields}
    return Environment(domain, task or ClassificationTask(), FineTuningStrategy(**fields), seed)


def start(environments, gamma) -> list[SimulatedAdversary]:
    """Adversaries whose horizon is K, where environments are given; those that live on as they are."""
    return [e if isinstance(e, SimulatedAdversary) else e.adversary(len(w)) for e, w in zip(environments, gamma)]


def suppress(model, environments, gamma, *, loss=inverse_cross_entropy, task=None, **options) -> SuppressionGradient:
    structure = options.pop("structure", SMOOTH)
    kind = SecondOrderSuppression if options.pop("second_order", False) else Suppression
    suppression = kind(model, task or ClassificationTask(), structure, loss, **options)
    return suppression(start(environments, gamma), gamma)


def make_optimizer(name: str, parameters, rate: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    common = {"lr": rate, "weight_decay": weight_decay, "foreach": False}
    return {
        "sgd": lambda: torch.optim.SGD(parameters, **common),
        "momentum": lambda: torch.optim.SGD(parameters, momentum=0.9, **common),
        "nesterov": lambda: torch.optim.SGD(parameters, momentum=0.9, nesterov=True, **common),
        "adagrad": lambda: torch.optim.Adagrad(parameters, **common),
        "adadelta": lambda: torch.optim.Adadelta(parameters, **common),
        "adam": lambda: torch.optim.Adam(parameters, **common),
        "adamw": lambda: torch.optim.AdamW(parameters, **common),
    }[name]()


def simulate(model, environment, weights, loss):
    """Algorithm 1's inner loop as one would write it; yields (weight, L_alpha) at each step.

    The copy stands at step k while the k-th item is out.
    """
    strategy = environment.strategy
    torch.manual_seed(environment.seed)
    if strategy.initialization == "new_head":
        model.head.reset_parameters()
    for parameter in model.parameters():
        parameter.requires_grad_()
    updated = {"all": model, "head": model.head, "norm": model.norm}[strategy.transfer].parameters()
    optimizer = make_optimizer(strategy.optimizer, list(updated), strategy.learning_rate, strategy.weight_decay)
    batches = environment.fine_tuning.batches(strategy.batch_size)
    held_out = batches_without_repetition(environment.evaluation, strategy.batch_size)
    for k, weight in enumerate(weights):
        batch = next(batches)
        model.train()
        model.zero_grad()
        nn.functional.cross_entropy(model(batch["x"]), batch["labels"]).backward()
        if strategy.max_grad_norm:
            nn.utils.clip_grad_norm_(model.parameters(), strategy.max_grad_norm)
        if strategy.schedule == "linear":
            optimizer.param_groups[0]["lr"] = strategy.learning_rate * (1 - k / len(weights))
        optimizer.step()
        batch = next(held_out)
        if weight:
            evaluation_mode(model)
            yield weight, loss(model(batch["x"]), batch["labels"])


def batches_without_repetition(stream, size):
    """Whole batches of one pass over the examples, then of the next; what fills no batch is left out."""
    examples, start = len(stream.indices), 0
    size = min(size, examples)
    while True:
        for place in range(start, start + examples - examples % size, size):
            yield stream.batch(place, size)
        start += examples


def evaluation_mode(model):
    """No dropout, but batch norm on the statistics of the batch."""
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.train()
    return model


def naive_first_order(model, environments, gamma, loss=inverse_cross_entropy):
    """Gradients at the fine-tuned points, summed as if they were taken at theta."""
    total, gradient = 0.0, {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for environment, weights in zip(environments, gamma):
        adversary = copy.deepcopy(model)
        for weight, value in simulate(adversary, environment, weights, loss):
            total += weight * value.item()
            adversary.zero_grad()
            value.backward()
            for name, parameter in adversary.named_parameters():
                renewed = environment.strategy.initialization == "new_head" and name.startswith("head.")
                if parameter.grad is not None and not renewed:
                    gradient[name] += weight * parameter.grad
    return total, gradient


def naive_loss(model, environments, gamma, loss=inverse_cross_entropy) -> float:
    """L_FTS of eq. 4 as a function of theta."""
    total = 0.0
    for environment, weights in zip(environments, gamma):
        for weight, value in simulate(copy.deepcopy(model), environment, weights, loss):
            total += weight * value.item()
    return total


def assert_gradient(result: SuppressionGradient, expected, rtol: float = 1e-8, atol: float = 1e-11) -> None:
    total, gradient = expected
    assert float(result.loss) == pytest.approx(total, rel=rtol)
    assert result.gradient.keys() == gradient.keys()
    for name, tensor in result.gradient.items():
        torch.testing.assert_close(tensor, gradient[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def finite_difference(model, direction, environments, gamma, loss=inverse_cross_entropy, step: float = 1e-5) -> float:
    values = []
    for sign in (1, -1):
        shifted = copy.deepcopy(model)
        with torch.no_grad():
            for name, parameter in shifted.named_parameters():
                parameter += sign * step * direction[name]
        values.append(naive_loss(shifted, environments, gamma, loss))
    return (values[0] - values[1]) / (2 * step)


def assert_exact(model, environments, gamma, loss=inverse_cross_entropy) -> None:
    """Slopes along every parameter tensor and along random directions agree, and L_FTS does."""
    result = suppress(model, environments, gamma, loss=loss, second_order=True)
    assert float(result.loss) == pytest.approx(naive_loss(model, environments, gamma, loss), rel=1e-9)
    generator = torch.Generator().manual_seed(0)
    noise = {n: torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()}
    directions = [noise] + [{n: v * (n == name) for n, v in noise.items()} for name in noise]
    for direction in directions:
        slope = sum(float((result.gradient[n] * direction[n]).sum()) for n in direction)
        expected = finite_difference(model, direction, environments, gamma, loss)
        assert slope == pytest.approx(expected, rel=1e-4, abs=1e-8)

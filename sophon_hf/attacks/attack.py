"""One attack: a fine-tuning strategy run on a copy of a model, measured along the way."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from sophon_hf.attacks.adaptive import prepare_model
from sophon_hf.data import Domain, Stream, derive_seed
from sophon_hf.finetuning import FineTuning, FineTuningStrategy
from sophon_hf.tasks import Task, evaluate_model, first_rows

EVALUATION_BATCH = 128
PAPER_EPOCHS = (0, 1, 5, 10, 15, 20)


@dataclass
class Curve:
    """What an attack reached, point by point.

    Attributes:
        epoch: Passes over the adversary's data.
        step: Optimizer steps.
        test: Metric on the test split, which only reports.
        validation: Metric on the adversary's own held-out data, by which attacks are chosen.
        loss: The adversary's mean training loss since the point before; NaN at the first.
        gradient_norm: Norm of its last gradient; NaN at the first point.
    """

    epoch: list[float] = field(default_factory=list)
    step: list[int] = field(default_factory=list)
    test: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    gradient_norm: list[float] = field(default_factory=list)

    def to_dict(self) -> dict[str, list]:
        """Plain values, for JSON."""
        return asdict(self)


def run_attack(
    model: nn.Module,
    task: Task,
    strategy: FineTuningStrategy,
    training: Domain,
    test: Domain,
    *,
    validation: Domain | None = None,
    original: Domain | None = None,
    seed: int = 0,
    epochs: Sequence[float] = PAPER_EPOCHS,
    every: int | None = None,
    after_step: Callable[[int, int], Any] | None = None,
    at_end: Callable[[nn.Module], Any] | None = None,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> Curve:
    """Fine-tune a copy of `model` in the restricted domain.

    Args:
        model: Left as it is.
        task: What the adversary learns.
        strategy: How, and for how long.
        training: The adversary's data.
        test: What the result is reported on.
        validation: What attacks are chosen by; the test split is never used for that.
        original: Data of the original domain, for strategies that warm up on it.
        seed: Decides new heads, the order of the data and dropout.
        epochs: When to measure; the end of the attack is always measured.
        every: Measure every so many optimizer steps instead, from step 0 on.
        after_step: Called with the step and the number of steps, for progress.
        at_end: Called with the fine-tuned copy.
        autocast: Called for a context around each forward pass.

    Returns:
        The curve. A point at epoch 0 is the model before the first step, with its new head where it gets one.
    """
    model = copy.deepcopy(model)
    device = next(model.parameters()).device
    anatomy = task.anatomy(model, first_rows(task, training, device))
    steps = strategy.total_steps(len(training))
    step_share = min(strategy.batch_size, len(training)) / len(training)
    if every is None:
        points = {strategy.step_of_epoch(epoch, len(training)): epoch for epoch in epochs}
        points = {step: epoch for step, epoch in points.items() if step <= steps}
    else:
        points = {step: step * step_share for step in range(0, steps + 1, every)}
    points.setdefault(steps, steps * step_share)
    curve = Curve()

    def measure(step: int, losses: list[torch.Tensor]) -> None:
        curve.epoch.append(points[step])
        curve.step.append(step)
        curve.loss.append(float(torch.stack(losses).mean()) if losses else float("nan"))
        gradients = [p.grad for p in fine_tuning.parameters if p.grad is not None]
        curve.gradient_norm.append(float(nn.utils.get_total_norm(gradients)) if gradients else float("nan"))
        for values, domain in ((curve.test, test), (curve.validation, validation)):
            if domain is not None:
                values.append(evaluate_model(task, model, domain, EVALUATION_BATCH, autocast=autocast).metric)

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derive_seed(seed, "attack"))
        prepare_model(model, task, strategy, training, original, seed)
        fine_tuning = FineTuning(
            model,
            task,
            strategy,
            Stream(training, task, derive_seed(seed, "adversary's order")).batches(strategy.batch_size),
            steps,
            anatomy=anatomy,
            num_classes=training.num_classes or None,
            autocast=autocast,
        )
        losses: list[torch.Tensor] = []
        if 0 in points:
            measure(0, losses)
        for update in fine_tuning:
            losses.append(update.loss)
            if after_step is not None:
                after_step(update.step, steps)
            if update.step in points:
                measure(update.step, losses)
                losses = []
        if at_end is not None:
            at_end(model)
    return curve

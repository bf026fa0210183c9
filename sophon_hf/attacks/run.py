"""One attack: a fine-tuning strategy run on a copy of a model, measured along the way."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from sophon_hf.data.batches import Stream, derive_seed
from sophon_hf.data.domain import Domain
from sophon_hf.finetuning.loop import FineTuning
from sophon_hf.finetuning.preparations import prepare_model
from sophon_hf.finetuning.stacked import StackedFineTuning
from sophon_hf.finetuning.strategy import USUAL_EPOCHS, FineTuningStrategy
from sophon_hf.models.loading import restore_precision
from sophon_hf.tasks.base import Task
from sophon_hf.tasks.evaluation import evaluate_model, first_rows
from sophon_hf.utils import kept_random_state, set_seed

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
    seed: int = 0,
    **settings: Any,
) -> Curve:
    """Fine-tune a copy of `model` in the restricted domain: `run_attacks` with one seed, which takes the same settings."""
    return run_attacks(model, task, strategy, training, test, seeds=[seed], **settings)[0]


def run_attacks(
    model: nn.Module,
    task: Task,
    strategy: FineTuningStrategy,
    training: Domain,
    test: Domain,
    *,
    seeds: Sequence[int],
    validation: Domain | None = None,
    original: Domain | None = None,
    epochs: Sequence[float] = PAPER_EPOCHS,
    every: int | None = None,
    after_step: Callable[[int, int], Any] | None = None,
    at_end: Callable[[int, nn.Module], Any] | None = None,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> list[Curve]:
    """Fine-tune copies of `model` in the restricted domain, one a seed, several of them together as one stack.

    Args:
        model: Left as it is.
        task: What the adversary learns.
        strategy: How, and for how long.
        training: The adversary's data.
        test: What the result is reported on.
        seeds: Each decides its new heads and the order of its data; a single one dropout too.
        validation: What attacks are chosen by; the test split is never used for that.
        original: Data of the original domain, for strategies that warm up on it.
        epochs: When to measure, as far as the attack goes (`measured_epochs`); its end is always measured.
        every: Measure every so many optimizer steps instead, from step 0 on.
        after_step: Called with the step and the number of steps, for progress.
        at_end: Called with each seed and its fine-tuned copy.
        autocast: Called for a context around each forward pass.

    Returns:
        One curve a seed. A point at epoch 0 is the model before the first step, with its new head where it gets one.

    Raises:
        ValueError: Several seeds of what cannot be stacked (`StackedFineTuning`).
    """
    copies = [copy.deepcopy(model) for _ in seeds]
    for copied in copies:
        restore_precision(copied)  # A model fresh from a bf16 training would be attacked in bf16, and others not.
    device = next(model.parameters()).device
    structure = task.structure(copies[0], first_rows(task, training, device))
    steps = strategy.total_steps(len(training))
    points = _points(strategy, len(training), steps, epochs, every)
    curves = [Curve() for _ in seeds]

    def measure(step: int, losses: list[torch.Tensor]) -> None:
        means = torch.stack(losses).mean(dim=0).reshape(-1).tolist() if losses else [float("nan")] * len(curves)
        for curve, copied, loss, norm in zip(curves, copies, means, fine_tuning.gradient_norms(), strict=True):
            curve.epoch.append(points[step])
            curve.step.append(step)
            curve.loss.append(loss)
            curve.gradient_norm.append(norm)
            for values, domain in ((curve.test, test), (curve.validation, validation)):
                if domain is not None:
                    # Without the loss, so that a class that the adversary's data lack counts as wrong.
                    found = evaluate_model(task, copied, domain, EVALUATION_BATCH, autocast=autocast, with_loss=False)
                    values.append(found.metric)

    with kept_random_state([device] if device.type == "cuda" else []):
        runs = []
        for seed, copied in zip(seeds, copies, strict=True):
            set_seed(derive_seed(seed, "attack"))
            prepare_model(copied, task, strategy, training, original, seed)
            batches = Stream(training, task, derive_seed(seed, "adversary's order")).batches(strategy.batch_size)
            classes = training.num_classes or None
            runs.append(
                FineTuning(
                    copied, task, strategy, batches, steps, structure=structure, num_classes=classes, autocast=autocast
                )
            )
        fine_tuning = runs[0] if len(runs) == 1 else StackedFineTuning(runs)
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
            for seed, copied in zip(seeds, copies, strict=True):
                at_end(seed, copied)
    return curves


def measured_epochs(strategy: FineTuningStrategy, examples: int, epochs: Sequence[float]) -> list[float]:
    """`epochs`, and beyond the usual 20 every tenth of the attack: one that overfits is at its best before its end."""
    length = strategy.epochs if strategy.steps is None else strategy.epoch_of_step(strategy.steps, examples)
    tenths = (length * tenth / 10 for tenth in range(1, 10))
    return [*epochs, *(epoch for epoch in tenths if epoch > USUAL_EPOCHS and epoch not in epochs)]


def _points(
    strategy: FineTuningStrategy, examples: int, steps: int, epochs: Sequence[float], every: int | None
) -> dict[int, float]:
    """Step -> epoch of each measurement."""
    if every is None:
        epochs = measured_epochs(strategy, examples, epochs)
        points = {strategy.step_of_epoch(epoch, examples): epoch for epoch in epochs}
        points = {step: epoch for step, epoch in points.items() if step <= steps}
    else:
        points = {step: strategy.epoch_of_step(step, examples) for step in range(0, steps + 1, every)}
    points.setdefault(steps, strategy.epoch_of_step(steps, examples))
    return points

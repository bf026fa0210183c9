"""One attack: a fine-tuning strategy run on a copy of a model, measured along the way."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from sophon_hf.attacks.adversary import AdversaryDomains, head_fits
from sophon_hf.data.batches import Stream
from sophon_hf.data.domain import Domain
from sophon_hf.finetuning.initialization import initialize
from sophon_hf.finetuning.kernel import KernelRegression
from sophon_hf.finetuning.loop import FineTuning
from sophon_hf.finetuning.preparations import prepare_model
from sophon_hf.finetuning.strategy import USUAL_EPOCHS, FineTuningStrategy, NotApplicableError
from sophon_hf.models.loading import hash_state, restore_precision
from sophon_hf.models.structure import ModelStructure
from sophon_hf.tasks.base import Task
from sophon_hf.tasks.diffusion import DiffusionTask
from sophon_hf.tasks.evaluation import evaluate_model, first_rows
from sophon_hf.utils import derive_seed, finite_or_none, kept_random_state, set_seed

EVALUATION_BATCH = 128
PAPER_EPOCHS = (0, 1, 5, 10, 15, 20)


@dataclass
class Curve:
    """What an attack reached, point by point.

    Attributes:
        epoch: Passes over the adversary's data.
        step: Optimizer steps.
        test: Metric on the test split, which only reports.
        validation: Metric on the adversary's own held-out data, by which attacks are chosen; the mean over all of its
            examples, each judged by a fit without it, where there are folds.
        loss: The adversary's mean training loss since the point before; NaN at the first.
        gradient_norm: Norm of its last gradient; NaN at the first point.
        bands: Of a denoiser the test MSE at the end, in each band of the noise schedule (`diffusion.BANDS`).
    """

    epoch: list[float] = field(default_factory=list)
    step: list[int] = field(default_factory=list)
    test: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    gradient_norm: list[float] = field(default_factory=list)
    bands: list[float] = field(default_factory=list)


@dataclass
class AttackRun:
    """One attack on one model with one seed.

    Attributes:
        model: "protected", "original", "scratch", "untrained", or a further baseline.
        strategy: What the adversary did.
        seed: Of the attack.
        curve: What it reached; None where it did not end.
        error: Why it did not end.
        applicable: False where the strategy cannot be carried out on this model at all, which does not show resistance.
    """

    model: str
    strategy: FineTuningStrategy
    seed: int
    curve: Curve | None = None
    error: str | None = None
    applicable: bool = True

    @property
    def failed(self) -> bool:
        """Return whether the attack could have been carried out, but broke off."""
        return self.error is not None and self.applicable

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON, which knows no NaN."""
        values = {**asdict(self), "strategy": self.strategy.to_dict()}
        if self.curve is not None:
            values["curve"] = {n: [finite_or_none(v) for v in points] for n, points in values["curve"].items()}
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> AttackRun:
        """Return the run that `to_dict` wrote; what was not finite is NaN."""
        curve: Curve | None = None
        if values["curve"] is not None:
            points: dict[str, Any] = {
                name: [math.nan if value is None else value for value in points]
                for name, points in values["curve"].items()
            }
            curve = Curve(**points)
        return cls(**{**values, "strategy": FineTuningStrategy.from_dict(values["strategy"]), "curve": curve})


def run_attack(
    model: nn.Module,
    task: Task,
    strategy: FineTuningStrategy,
    data: AdversaryDomains,
    *,
    seed: int = 0,
    measured: Sequence[float] | int = PAPER_EPOCHS,
    after_step: Callable[[int, int], Any] | None = None,
    at_end: Callable[[nn.Module], Any] | None = None,
    starts: dict[tuple, float] | None = None,
) -> Curve:
    """Fine-tune a copy of `model` in the restricted domain, and measure it along the way.

    Args:
        model: Left as it is.
        task: What the adversary learns.
        strategy: How, and for how long.
        data: What it learns from and is measured on.
        seed: Decides new heads, the order of the data, and dropout.
        measured: When to measure (`measured_points`).
        after_step: Called with the step and the number of steps, for progress.
        at_end: Called with the fine-tuned copy.
        starts: What attacks on this model reached before their first step: equal starts are measured once.

    Returns:
        What was measured. A point at epoch 0 is the model before the first step, with its new head where it gets one.

    Raises:
        NotApplicableError: The strategy cannot be carried out on this model, or with these data.
    """
    points = measured_points(strategy, len(data.training), measured)
    curve = Curve(epoch=[points[step] for step in sorted(points)], step=sorted(points))

    def metric(tuned: nn.Module, domain: Domain, at_start: bool) -> float:
        if starts is None or not at_start or isinstance(tuned, KernelRegression):
            return _metric(task, tuned, domain)
        key = (hash_state(tuned), strategy.adapter, domain.fingerprint)
        if key not in starts:
            starts[key] = _metric(task, tuned, domain)
        return starts[key]

    fine_tune = partial(_fine_tuned, model, task, strategy, data, seed=seed, points=points, after_step=after_step)
    for tuned, losses, gradient_norm in fine_tune(data.training):
        curve.loss.append(float(torch.stack(losses).mean()) if losses else math.nan)
        curve.gradient_norm.append(gradient_norm)
        curve.test.append(metric(tuned, data.test, not losses))
        if data.validation is not None:
            curve.validation.append(metric(tuned, data.validation, not losses))
    if isinstance(task, DiffusionTask):
        rows = torch.arange(len(data.test)).split(EVALUATION_BATCH)
        curve.bands = task.errors_by_band(tuned, (task.collate(data.test.rows(r), r.tolist()) for r in rows))
    if at_end is not None:
        at_end(tuned)
    if data.folds:
        # As many steps as the attack itself, so that every point of its curve has a counterpart.
        by_fold = [
            [metric(tuned, held_out, not losses) for tuned, losses, _ in fine_tune(training)]
            for training, held_out in data.folds
        ]
        weights = [len(held_out) for _, held_out in data.folds]
        curve.validation = np.average(by_fold, axis=0, weights=weights).tolist()
    return curve


def try_attack(model: nn.Module, task: Task, strategy: FineTuningStrategy, data: AdversaryDomains) -> None:
    """Take the first step of an attack on a copy of `model`, after one step of its preparation, to see that it can.

    A kernel regression, which takes no steps, is computed on the smallest of the adversary's parts.

    Raises:
        NotApplicableError: As `run_attack`.
    """
    # That of a fold is the smallest that an attack learns from.
    parts = [data.training, *(part for part, _ in data.folds)]
    if strategy.transfer == "kernel":
        parts += [held_out for _, held_out in data.folds] + ([] if data.validation is None else [data.validation])
    training = min(parts, key=len)
    for _ in _fine_tuned(model, task, strategy, data, training, points=(1,), trial=True):
        break


def _fine_tuned(
    model: nn.Module,
    task: Task,
    strategy: FineTuningStrategy,
    data: AdversaryDomains,
    training: Domain,
    *,
    seed: int = 0,
    points: Collection[int],
    after_step: Callable[[int, int], Any] | None = None,
    trial: bool = False,
) -> Iterator[tuple[nn.Module, list[torch.Tensor], float]]:
    """Fine-tune a copy on `training`; at each point yield it, the losses since the one before, and the last norm.

    A `trial` prepares the model with one step.
    """
    if strategy.needs_original_head and not head_fits(task, model, data.training):
        raise NotApplicableError(f"the head has fewer outputs than the {data.training.num_classes} restricted classes")
    copied = copy.deepcopy(model)
    restore_precision(copied)  # A model fresh from a bf16 training would be attacked in bf16, and others not.
    device = next(model.parameters()).device
    structure = task.structure(copied, first_rows(task, training, device))
    with kept_random_state([device] if device.type == "cuda" else []):
        set_seed(derive_seed(seed, "attack"))
        prepare_model(copied, task, strategy, training, data.original, seed, most_steps=1 if trial else None)
        if strategy.transfer == "kernel":
            if strategy.initialization == "scratch":
                initialize(copied, strategy, structure, training.num_classes or None)
            regression = KernelRegression(copied, task, training, structure)
            yield regression, [], math.nan
            return
        stream = Stream(training, task.collate, derive_seed(seed, "adversary's order"))
        original = None
        if data.original is not None and strategy.original_weight:
            original_stream = Stream(data.original, task.collate, derive_seed(seed, "original order"))
            original = original_stream.batches(strategy.batch_size)
        renews = strategy.initialization != "direct"
        before = {name: p.detach().clone() for name, p in copied.named_parameters()} if renews else {}
        steps = strategy.total_steps(len(data.training))
        fine_tuning = FineTuning(
            copied,
            task,
            strategy,
            stream.batches(strategy.batch_size),
            steps,
            structure=structure,
            num_classes=data.training.num_classes or None,
            original=original,
        )
        if renews:
            _refuse_kept(copied, before, strategy, structure)
        del before
        losses: list[torch.Tensor] = []
        if 0 in points:
            yield fine_tuning.result, losses, fine_tuning.gradient_norm()
        for update in fine_tuning:
            losses.append(update.loss)
            if after_step is not None:
                after_step(update.step, steps)
            if update.step in points:
                yield fine_tuning.result, losses, fine_tuning.gradient_norm()
                losses = []


def _refuse_kept(
    model: nn.Module, before: dict[str, torch.Tensor], strategy: FineTuningStrategy, structure: ModelStructure
) -> None:
    """Raise a RuntimeError where a part that the strategy re-initialises still has all the weights `before`."""
    blocks = structure.blocks if strategy.initialization == "scratch" else ()
    for part in (*structure.heads, *structure.last_blocks(strategy.reinitialized_blocks), *blocks):
        pairs = []
        for name, parameter in model.named_parameters():
            old = before.get(name.replace(".base_layer", ""))  # An adapter takes its layer's name.
            # A matrix of one value may well be the same when it is new: some are initialised with zeros.
            if name.startswith(f"{part}.") and parameter.ndim > 1 and old is not None and old.min() < old.max():
                pairs.append((old, parameter))
        if pairs and all(torch.equal(old, parameter) for old, parameter in pairs):
            raise RuntimeError(f"{part!r} was to be re-initialised, and has the weights that it had: {strategy.name}.")


def in_bf16(task: Task, device: torch.device) -> Task:
    """Return the task in mixed precision: every forward pass of an attack, its preparation and its measurement."""
    mixed = copy.copy(task)
    mixed.predict = torch.autocast(device.type, torch.bfloat16)(task.predict)  # type: ignore[method-assign]
    return mixed


def _metric(task: Task, model: nn.Module, domain: Domain) -> float:
    # Without the loss, so that a class that the adversary's data lack counts as wrong.
    return evaluate_model(task, model, domain, EVALUATION_BATCH, with_loss=False).metric


def measured_points(
    strategy: FineTuningStrategy, examples: int, measured: Sequence[float] | int = PAPER_EPOCHS
) -> dict[int, float]:
    """Return when an attack is measured: step -> epoch.

    Args:
        strategy: Says how long the attack is.
        examples: The adversary's.
        measured: Epochs, as far as the attack goes; or a whole number, for every so many optimizer steps from step 0
            on. The end is always measured. Beyond the usual 20 epochs, so is every tenth of the attack: one that
            overfits is at its best before its end.
    """
    steps = strategy.total_steps(examples)
    if isinstance(measured, int):
        points = {step: strategy.epoch_of_step(step, examples) for step in range(0, steps + 1, measured)}
    else:
        length = strategy.epochs if strategy.steps is None else strategy.epoch_of_step(strategy.steps, examples)
        tenths = (length * tenth / 10 for tenth in range(1, 10))
        # Keys of runs are made of them: 10 and 10.0 are one.
        measured = [int(epoch) if float(epoch).is_integer() else epoch for epoch in measured]
        epochs = [*measured, *(epoch for epoch in tenths if epoch > USUAL_EPOCHS and epoch not in measured)]
        points = {strategy.step_of_epoch(epoch, examples): epoch for epoch in epochs}
        points = {step: epoch for step, epoch in points.items() if step <= steps}
    points.setdefault(steps, strategy.epoch_of_step(steps, examples))
    return points

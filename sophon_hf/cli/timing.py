"""Estimate how long a protection or a sweep of attacks takes, from the first steps of it."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import TrainerCallback

from sophon_hf.attacks.run import EVALUATION_BATCH
from sophon_hf.data.batches import Stream
from sophon_hf.data.domain import Domain
from sophon_hf.finetuning.loop import FineTuning
from sophon_hf.finetuning.strategy import FineTuningStrategy
from sophon_hf.tasks.base import Task
from sophon_hf.tasks.evaluation import evaluate_model, first_rows

# Seconds, beside which a warm-up counts for little.
_LONG = 10.0


class DryRunEnd(Exception):  # noqa: N818 (no error)
    """A dry run has seen what it wanted to see."""


class TellTime(TrainerCallback):
    """Say after the first iteration how long the protection takes; where that one is short, after the second.

    Args:
        dry_run: Whether to raise `DryRunEnd` then.
    """

    def __init__(self, dry_run: bool):
        self.dry_run = dry_run
        self.evaluation = 0.0
        self.last, self.seen, self.told = 0.0, 0, False

    def on_train_begin(self, args, state, control, **kwargs):  # noqa: D102
        self.last, self.seen, self.told = time.monotonic(), 0, False

    def on_evaluate(self, args, state, control, **kwargs):  # noqa: D102
        if not self.seen:
            self.evaluation = time.monotonic() - self.last

    def on_step_begin(self, args, state, control, **kwargs):  # noqa: D102
        self.last = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):  # noqa: D102
        self.seen += 1
        iteration, count = time.monotonic() - self.last, state.max_steps - state.global_step + self.seen
        # Much of a short first one warms up caches and kernels. Several processes must not differ in what they do.
        first_tells = iteration > _LONG and args.world_size == 1
        if self.told or self.seen < min(1 if first_tells else 2, state.max_steps):
            return
        self.told = True
        evaluations = 0 if args.eval_strategy == "no" else 1 + count // max(1, int(state.eval_steps))
        total = iteration * count + self.evaluation * evaluations
        each = f"an iteration {_two_digits(iteration)} s, an evaluation {_two_digits(self.evaluation)} s"
        if state.is_world_process_zero:
            tqdm.write(f"Iterations to do: {count}, {duration(total)} in all ({each}).")
            sys.stdout.flush()  # Who reads a file or a pipe waits for it.
        if self.dry_run:
            raise DryRunEnd


def attack_seconds(
    model: nn.Module, task: Task, domain: Domain, sizes: tuple[int, int], plan: dict[str, int], measured: int
) -> float:
    """Estimate how long a sweep takes in one process, from two steps and a short evaluation.

    Args:
        model: Left as it is.
        task: What the adversary learns.
        domain: Some of its data.
        sizes: The smallest and the largest batch of the sweep: a step costs something for itself and for each example.
        plan: As `AttackSuite.plan` returns it.
        measured: Examples of each measurement.
    """
    start = "new_head" if domain.num_classes else "direct"
    structure = task.structure(model, first_rows(task, domain, next(model.parameters()).device))

    def step_of(size: int) -> float:
        strategy = FineTuningStrategy(start, batch_size=size)
        batches = Stream(domain, task.collate, 0).batches(size)
        classes = domain.num_classes or None
        tuning = FineTuning(copy.deepcopy(model), task, strategy, batches, 2, structure=structure, num_classes=classes)
        steps = iter(tuning)
        next(steps)  # The first one also warms up.
        return _seconds(lambda: list(islice(steps, 1)))

    small, large = (step_of(min(size, len(domain))) for size in sizes)
    steps, images = plan["steps"], plan["images"]
    example = max(0.0, large - small) / (sizes[1] - sizes[0]) if sizes[1] > sizes[0] else large / sizes[1]
    step = max(0.0, small - example * sizes[0])
    evaluation = _seconds(lambda: evaluate_model(task, model, domain, EVALUATION_BATCH, with_loss=False)) / len(domain)
    return step * steps + example * images + evaluation * measured * plan["measurements"]


def duration(seconds: float) -> str:
    """Return a time as a reader would say it."""
    for unit, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * unit:
            return f"about {_two_digits(seconds / unit)} {name}"
    return f"about {max(1, round(seconds))} s"


def _two_digits(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"  # Never 3.1e+02.


def _seconds(work: Callable[[], Any]) -> float:
    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.monotonic()

    begun = now()
    work()
    return now() - begun

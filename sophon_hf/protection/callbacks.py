"""Callbacks of the trainer: a progress bar with the figures that matter, and what follows an iteration; and its log."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from sophon_hf.models.scale_invariance import fresh_norms, scale_invariant_layers, set_norm
from sophon_hf.protection.guard import Guard
from sophon_hf.protection.suppression import SuppressionGradient
from sophon_hf.tasks.base import Task


class ProtectionProgress(TrainerCallback):
    """One bar over the iterations: L_FTS, the simulated adversary before and after, and the last evaluation.

    Before the first one it says what to expect.

    Args:
        metric: The task's metric.
        guard: Knows what to expect after its first evaluation.
        visible: Whether to draw it.
    """

    def __init__(self, metric: str, guard: Guard, visible: bool = True):
        self.metric, self.guard, self.visible = metric, guard, visible
        self.bar = None
        self.figures: dict[str, str] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        if self.visible and state.is_world_process_zero:
            from tqdm.auto import tqdm

            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="protecting", dynamic_ncols=True)

    def on_evaluate(self, args, state, control, **kwargs):
        if self.bar is not None and state.global_step == 0:
            self.bar.write(self.guard.outlook)

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.bar is None or not logs:
            return
        shown = {
            "L_FTS": "L_FTS",
            f"{self.metric}_before": "before",
            f"{self.metric}_after": "after",
            f"eval_original_{self.metric}": "original",
            f"eval_restricted_simulated_{self.metric}": "simulated",
        }
        self.figures |= {short: f"{logs[name]:.3f}" for name, short in shown.items() if name in logs}
        self.bar.set_postfix(self.figures)

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class EvaluateLastStep(TrainerCallback):
    """Evaluates after the last iteration, before it is saved, so that the guard has seen the last state, too."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps and args.eval_strategy != "no":
            control.should_evaluate = True


class KeepNorms(TrainerCallback):
    """Hold layers whose scale the function does not depend on at the norm of a fresh initialisation.

    There a step moves them as far as it moves a new model's: an adversary who re-scales them gains nothing, and every
    simulated adversary has done so already.

    Args:
        model: Unwrapped.
        predict: Runs it on one batch and returns its prediction.
    """

    def __init__(self, model: nn.Module, predict: Callable[[], Tensor]):
        self.layers = scale_invariant_layers(model, predict)
        self.norms = fresh_norms(self.layers)

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:  # A checkpoint has them already, and resumes bit for bit.
            self.set_norms()

    def on_step_end(self, args, state, control, **kwargs):
        self.set_norms()

    def set_norms(self) -> None:
        """Do so now."""
        for layer, normalisations in self.layers.items():
            set_norm(layer, normalisations, self.norms[layer])


class StepLog:
    """Collects L_FTS, L_NTR, strategies, simulated scores and gradient norms between two log entries.

    Scores and strategies are those of this process's adversaries (of a sharded model, of its share of their batches);
    L_FTS and the norm are averaged over the processes.
    """

    def __init__(self, task: Task):
        self.task = task
        self.losses: dict[str, list[Tensor]] = {}
        self.scores: dict[str, list[dict[str, Tensor]]] = {}
        self.strategies: list[str] = []

    def __bool__(self) -> bool:
        return bool(self.losses)

    def add_suppression(self, result: SuppressionGradient, norm: Tensor) -> None:
        """Note a suppression loop."""
        self._add("L_FTS", result.loss)
        self._add("suppression_grad_norm", norm)
        self.strategies.append("; ".join(adversary.strategy for adversary in result.adversaries))
        for moment in ("before", "after"):
            scores = [getattr(a, moment) for a in result.adversaries if getattr(a, moment)]
            self.scores.setdefault(f"{self.task.metric}_{moment}", []).extend(scores)

    def add_reinforcement(self, loss: Tensor, first_micro_batch: bool) -> None:
        """Note a micro-batch of the last reinforcement loop; its loss is divided by their number already."""
        if first_micro_batch:
            self._add("L_NTR", loss)
        else:
            self.losses["L_NTR"][-1] = self.losses["L_NTR"][-1] + loss.detach()

    def collect(self) -> dict[str, Any]:
        """Means since the last call, as plain values."""
        logs: dict[str, Any] = {n: float(torch.stack([v.float() for v in vs]).mean()) for n, vs in self.losses.items()}
        for name, parts in self.scores.items():
            if parts:
                logs[name] = self.task.compute_metric({k: torch.cat([p[k] for p in parts]).tolist() for k in parts[0]})
        if self.strategies:
            logs["strategy"] = " | ".join(self.strategies)
        self.losses, self.scores, self.strategies = {}, {}, []
        return logs

    def _add(self, name: str, value: Tensor) -> None:
        self.losses.setdefault(name, []).append(value.detach())

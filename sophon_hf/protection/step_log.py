"""What the loops of an iteration showed, kept on the device until an entry is logged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sophon_hf.protection.suppression import SuppressionGradient
from sophon_hf.tasks.base import Task


class StepLog:
    """Collects L_FTS, L_NTR, strategies, simulated scores and gradient norms between two log entries.

    Scores and strategies are those of this process's adversaries (of a sharded model, of its share of their batches); L_FTS and
    the norm are averaged over the processes.
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

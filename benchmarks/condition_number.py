"""Immunisation by condition number, after arXiv 2505.23760: linear probing is made ill-conditioned."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sophon_hf.data.batches import Stream
from sophon_hf.data.domain import Domain
from sophon_hf.models.loading import evaluation_mode
from sophon_hf.tasks.base import Task


class ConditionNumber:
    """L_beta for a `SophonTrainer` without suppression loops: the task's loss, and how features spread over directions.

    With S the covariance of what enters the head, scaled to mean eigenvalue 1, it adds (largest eigenvalue - 1) of the
    original domain, which is small where S is well-conditioned, and 1 / (largest eigenvalue - 1) of the restricted one.

    Args:
        task: What is learned.
        head: The head's name.
        restricted: The restricted domain.
        weight: Of both terms.
        size: Restricted examples a step.
    """

    def __init__(self, task: Task, head: str, restricted: Domain, weight: float = 0.1, size: int = 128):
        self.task, self.head, self.weight, self.size, self.step = task, head, weight, size, 0
        self.restricted = Stream(restricted, task.collate, 0)

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        features: list[Tensor] = []
        watch = model.get_submodule(self.head).register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
        try:
            loss = self.task.loss(self.task.predict(model, batch), self.task.target(batch))
            # In evaluation mode, so that batch norm does not count the restricted domain in.
            with evaluation_mode(model):
                self.task.predict(model, self.restricted.batch(self.step * self.size, self.size))
        finally:
            watch.remove()
        self.step += 1
        well, ill = (_largest_eigenvalue(part) - 1 for part in features)
        return loss + self.weight * (well + 1 / ill.clamp_min(1e-3))


def _largest_eigenvalue(features: Tensor) -> Tensor:
    """Of the features' covariance, as a multiple of the mean eigenvalue."""
    centred = features - features.mean(dim=0)
    covariance = centred.T @ centred
    return torch.linalg.eigvalsh(covariance)[-1] * len(covariance) / covariance.trace().clamp_min(1e-12)

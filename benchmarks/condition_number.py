"""Immunisation by condition number, after arXiv 2505.23760: linear probing is made ill-conditioned."""

from __future__ import annotations

import datasets
import torch
from torch import Tensor, nn

from sophon_hf.data.batches import Stream
from sophon_hf.data.domain import build_domain
from sophon_hf.models.loading import evaluation_mode
from sophon_hf.tasks.base import infer_task
from sophon_hf.tasks.evaluation import first_rows


class ConditionNumber:
    """L_beta for a `SophonTrainer` without suppression loops: the task's loss, and how features spread over directions.

    With S the covariance of what enters the head, scaled to mean eigenvalue 1, it adds (largest eigenvalue - 1) of the
    original domain, which is small where S is well-conditioned, and 1 / (largest eigenvalue - 1) of the restricted one.

    Args:
        model: The classifier that is going to be protected.
        restricted: The restricted domain, as `build_domain` takes it.
        weight: Of both terms.
        size: Restricted examples a step.
    """

    def __init__(self, model: nn.Module, restricted: datasets.Dataset, weight: float = 0.1, size: int = 128):
        self.task, self.weight, self.size, self.step = infer_task(model), weight, size, 0
        domain = build_domain(restricted, self.task.inputs(model), name="restricted")
        self.head = self.task.structure(model, first_rows(self.task, domain, next(model.parameters()).device)).head
        self.restricted = Stream(domain, self.task.collate, 0)

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

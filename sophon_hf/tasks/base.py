"""What is being learned: classification or diffusion. Each task says how a batch becomes a loss and a metric."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from sophon_hf.data.batches import Batch
from sophon_hf.data.preprocessing import ModelInputs
from sophon_hf.models.loading import noise_scheduler_of, unwrap
from sophon_hf.models.structure import ModelStructure
from sophon_hf.tasks.classification import ClassificationTask
from sophon_hf.tasks.diffusion import DiffusionTask


class Task(Protocol):
    """What trainer, engine and attacks need to know of a task. The first suppression loss is the default one."""

    metric: str
    greater_is_better: bool
    suppression_losses: Mapping[str, Callable[[Tensor, Tensor], Tensor]]

    def inputs(self, model: nn.Module) -> ModelInputs: ...
    def structure(self, model: nn.Module, batch: Batch) -> ModelStructure: ...
    def collate(self, rows: Batch, seeds: list[int]) -> Batch: ...
    def predict(self, model: Callable[..., Any], batch: Batch) -> Tensor: ...
    def target(self, batch: Batch) -> Tensor: ...
    def loss(self, prediction: Tensor, target: Tensor) -> Tensor: ...
    def distance(self, prediction: Tensor, unprotected: Tensor) -> Tensor: ...
    def scores(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]: ...
    def compute_metric(self, scores: dict[str, list]) -> float: ...


def infer_task(model: nn.Module) -> Task:
    """`DiffusionTask` for a `UNet2DModel`, `ClassificationTask` for everything else.

    Raises:
        ValueError: A class-conditional UNet, whose labels no task here supplies.
    """
    if type(unwrap(model)).__name__ == "UNet2DModel":
        if unwrap(model).config.class_embed_type or unwrap(model).config.num_class_embeds:
            raise ValueError("Class-conditional UNet2DModels are not supported: use one without class embedding.")
        return DiffusionTask()
    return ClassificationTask()


def load_task(source: str | os.PathLike, model: nn.Module) -> Task:
    """The task of a model that came from `source`: a pipeline's UNet keeps the noise scheduler it was trained with."""
    task = infer_task(model)
    scheduler = noise_scheduler_of(source) if isinstance(task, DiffusionTask) else None
    return task if scheduler is None else DiffusionTask(scheduler)

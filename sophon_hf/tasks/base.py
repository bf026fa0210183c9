"""What a task is, and which one a model is for."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from sophon_hf.data.batches import Batch
from sophon_hf.data.preprocessing import ModelInputs
from sophon_hf.models.backbone import Backbone
from sophon_hf.models.loading import noise_scheduler_of, pipeline_parts, unwrap
from sophon_hf.models.structure import ModelStructure
from sophon_hf.tasks.backbone import BackboneTask
from sophon_hf.tasks.classification import ClassificationTask
from sophon_hf.tasks.diffusion import DiffusionTask
from sophon_hf.tasks.metrics import MetricSource
from sophon_hf.tasks.multi_label import MultiLabelTask


class Task(Protocol):
    """Describe what trainer, fine-tuning and attacks ask of a task; the first suppression loss is the default."""

    metric: str
    greater_is_better: bool
    suppression_losses: Mapping[str, Callable[[Tensor, Tensor], Tensor]]

    def inputs(self, model: nn.Module) -> ModelInputs: ...
    def structure(self, model: nn.Module, batch: Batch) -> ModelStructure: ...
    def collate(self, rows: Batch, seeds: list[int]) -> Batch: ...
    def predict(self, model: Callable[..., Any], batch: Batch) -> Tensor: ...
    def target(self, batch: Batch) -> Tensor: ...
    def fits(self, labels: Tensor | None, outputs: int | None) -> bool: ...
    def loss(self, prediction: Tensor, target: Tensor) -> Tensor: ...
    def distance(self, prediction: Tensor, unprotected: Tensor) -> Tensor: ...
    def scores(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]: ...
    def compute_metric(self, scores: dict[str, list]) -> float: ...


def infer_task(model: nn.Module, metric: MetricSource | None = None) -> Task:
    """Return the task that a model is for.

    It is a `DiffusionTask` for a denoiser of diffusers, a `BackboneTask` for a `Backbone`, a `MultiLabelTask` for a
    model that names this problem type, and a `ClassificationTask` for everything else.

    Args:
        model: Any model.
        metric: What the task is measured by (see `load_metric`); ACC-k, mean average precision or MSE-k by default.

    Raises:
        ValueError: A regression, or a metric that does not fit.
    """
    given: dict[str, Any] = {} if metric is None else {"metric": metric}
    bare: Any = unwrap(model)
    if isinstance(bare, Backbone):
        return BackboneTask(**given)
    if type(bare).__module__.startswith("diffusers."):
        return DiffusionTask(**given)
    config = getattr(bare, "config", None)
    problem = getattr(config, "problem_type", None)
    if problem == "regression" or getattr(config, "num_labels", None) == 1:
        raise ValueError(f"This {type(bare).__name__} is a regression, which is not supported: a classifier is needed.")
    return MultiLabelTask(**given) if problem == "multi_label_classification" else ClassificationTask(**given)


def load_task(source: str | os.PathLike, model: nn.Module, metric: MetricSource | None = None) -> Task:
    """Return the task of a model from `source`: a pipeline's denoiser keeps the noise scheduler it was trained with.

    Args:
        source: Hub id or folder.
        model: What was loaded from it.
        metric: As in `infer_task`.

    Raises:
        ValueError: As in `infer_task`.
    """
    task = infer_task(model, metric)
    if isinstance(task, DiffusionTask) and (scheduler := noise_scheduler_of(source)) is not None:
        pipeline = os.fspath(source) if len(pipeline_parts(source)) > 2 else None
        return DiffusionTask(scheduler, metric="mse" if metric is None else metric, pipeline=pipeline)
    return task

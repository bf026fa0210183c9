"""Backbones: keep what a linear probe can do with the features, and suppress what new heads could do with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sophon_hf.data.batches import Batch
from sophon_hf.data.preprocessing import ModelInputs
from sophon_hf.models.backbone import library_model
from sophon_hf.models.loading import unwrap
from sophon_hf.models.structure import ModelStructure
from sophon_hf.tasks.classification import ClassificationTask
from sophon_hf.tasks.losses import at_least_float32
from sophon_hf.tasks.metrics import MetricSource

# As `protection.probes` has them: of the features' variance, and of the logits.
_RIDGE, _TEMPERATURE = 0.1, 20.0


class BackboneTask(ClassificationTask):
    """Learn class labels by a new head on a `Backbone`, which has none of its own.

    Without a head the prediction are features, shape (batch, parts, width). Their loss and metric are those of a linear
    probe on them: ridge regression to the labels, which predicts each example from all others (leave-one-out).
    """

    def __init__(self, metric: MetricSource = "accuracy"):
        super().__init__("head", metric)

    def inputs(self, model: nn.Module) -> ModelInputs:
        """Return what the backbone takes; its configuration may name classes, which mean nothing without a head."""
        return replace(super().inputs(library_model(unwrap(model))), class_names=())

    def structure(self, model: nn.Module, batch: Batch) -> ModelStructure:
        """Return the place of the head, and the blocks."""
        return replace(super().structure(model, batch), outputs=None)

    def predict(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """Return features, shape (batch, parts, width), or a new head's logits, shape (batch, classes)."""
        return model(**{name: value for name, value in batch.items() if name != "labels"})

    def fits(self, labels: Tensor | None, outputs: int | None) -> bool:
        """Return whether a head of so many outputs has one for every label; there is none where they are None."""
        return labels is None or (outputs is not None and super().fits(labels, outputs))

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the cross-entropy of a head's logits, or of the linear probe on the batch."""
        if prediction.ndim == 2:
            return super().loss(prediction, target)
        if len(prediction) < 2:
            return 0.0 * prediction.sum()  # A probe predicts an example from the others.
        return super().loss(_TEMPERATURE * probe_predictions(prediction, target), target)

    def distance(self, prediction: Tensor, unprotected: Tensor) -> Tensor:
        """Return the squared distance of the features, as a share of the unprotected ones' variance."""
        unprotected = at_least_float32(unprotected)
        variance = (unprotected - unprotected.mean(dim=0)).square().mean()
        return F.mse_loss(at_least_float32(prediction), unprotected) / variance.clamp_min(1e-12)

    def scores(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return predicted classes and labels, or features and labels."""
        if prediction.ndim == 2:
            return super().scores(prediction, target)
        return {"features": prediction.flatten(1).float(), "references": target}

    def compute_metric(self, scores: dict[str, list]) -> float:
        """Return the metric of a head, or of the linear probe on features."""
        if "features" not in scores:
            return super().compute_metric(scores)
        features = torch.from_numpy(np.asarray(scores["features"], dtype=np.float64))
        labels = torch.tensor(scores["references"])
        found = super().scores(probe_predictions(features, labels), labels)
        return super().compute_metric({name: values.tolist() for name, values in found.items()})


def probe_predictions(features: Tensor, labels: Tensor) -> Tensor:
    """Predict one-hot labels by ridge regression, each example by the regression on all others, in closed form.

    Args:
        features: Shape (n, ...), n at least 2; they are standardised.
        labels: Shape (n,), int64.

    Returns:
        Shape (n, classes), as many as the highest label tells.
    """
    features = at_least_float32(features).flatten(1)
    features = (features - features.mean(dim=0)) / (features.std(dim=0, correction=0) + 1e-4)
    targets = F.one_hot(labels).to(features.dtype)
    centred, (count, width) = targets - targets.mean(dim=0), features.shape
    # The hat matrix of the regression with a free intercept, through the smaller of two systems.
    ridge = _RIDGE * count * width / min(count, width) * torch.eye(min(count, width)).to(features)
    if count > width:
        solved = torch.linalg.solve(features.T @ features + ridge, features.T)
    else:
        solved = torch.linalg.solve(features @ features.T + ridge, features).T
    leverage = (features * solved.T).sum(dim=1) + 1 / count
    residuals = (centred - features @ (solved @ centred)) / (1 - leverage)[:, None].clamp_min(1e-6)
    return targets - residuals

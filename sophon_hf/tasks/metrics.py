"""ACC-k and MSE-k (section 5.1.3), plain and as `evaluate.Metric`; they need no network.

A metric object of `evaluate` writes every example to an Arrow table, which takes longer than the metric itself. What is
measured many times while an adversary trains goes through the plain functions.
"""

from __future__ import annotations

import datasets
import evaluate
import numpy as np
from numpy.typing import ArrayLike


def accuracy(predictions: ArrayLike, references: ArrayLike) -> float:
    """ACC-k: the share of right labels, in [0, 1]. Both of shape (n,)."""
    return float(np.mean(np.asarray(predictions) == np.asarray(references)))


def mean_squared_error(predictions: ArrayLike) -> float:
    """MSE-k: the mean of the examples' squared errors, shape (n,)."""
    return float(np.mean(predictions))


class Accuracy(evaluate.Metric):
    """ACC-k: the share of right labels, in [0, 1]."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of examples whose predicted class is the labelled one.",
            citation="",
            inputs_description="predictions, references: class indices",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions, references) -> dict[str, float]:
        return {"accuracy": accuracy(predictions, references)}


class MeanSquaredError(evaluate.Metric):
    """MSE-k: the mean over examples of the squared error of the predicted noise, per element."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Mean squared error of the predicted noise.",
            citation="",
            inputs_description="predictions: squared error of each example, averaged over its elements",
            features=datasets.Features({"predictions": datasets.Value("float64")}),
        )

    def _compute(self, predictions) -> dict[str, float]:
        return {"mse": mean_squared_error(predictions)}

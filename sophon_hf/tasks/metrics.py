"""The metric that a task is measured by: ACC-k and MSE-k (section 5.1.3), or any module of `evaluate`.

A module of `evaluate` writes every example to an Arrow table, which takes longer than the metric itself. ACC-k and
MSE-k are measured many times while an adversary trains, so by name they are computed without one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import evaluate


@dataclass(frozen=True)
class Metric:
    """Measure a model's scores as one number.

    Attributes:
        name: What logs, results and claims call it.
        greater_is_better: Whether a greater value is a better model.
        compute: Takes a task's scores (name -> one entry for each example) and returns the value.
        needs_references: Whether it compares predictions with references, as a classifier's metrics do.
        multi_label: Whether both have an entry for every label.
    """

    name: str
    greater_is_better: bool
    compute: Callable[[dict[str, list]], float]
    needs_references: bool = True
    multi_label: bool = False


# A name, since `evaluate` takes a second to import, and few pass a module of it.
MetricSource: TypeAlias = "str | evaluate.EvaluationModule | evaluate.CombinedEvaluations | Metric"


def load_metric(
    metric: MetricSource,
    greater_is_better: bool | None = None,
    compute_kwargs: Mapping[str, Any] | None = None,
) -> Metric:
    """Return a metric by name, or from a module of `evaluate`.

    Args:
        metric: "accuracy", "mse", "mean_average_precision" or "micro_f1" (both of multi-label tasks), an
            `evaluate.load(...)`, an own `evaluate.Metric` or an `evaluate.combine(...)`. The first value that it
            returns counts, under the name that it returns it by. A `Metric` is returned as it is.
        greater_is_better: Whether a greater value is better; by default found by computing the metric of right and of
            wrong predictions.
        compute_kwargs: Further arguments of the module's `compute`, such as `{"average": "macro"}` for F1, which is
            then called "f1_macro".

    Raises:
        ValueError: An unknown name; a module that does not turn predictions (and references) into one number; a module
            that tells nothing of whether greater is better.
    """
    if isinstance(metric, Metric):
        return metric
    if isinstance(metric, str):
        if metric not in _OWN:
            raise ValueError(
                f"The metric {metric!r} is not one of {sorted(_OWN)}: pass `evaluate.load({metric!r})`, which fetches "
                "it from the Hub, or an `evaluate.Metric` of your own."
            )
        return _OWN[metric]
    label = getattr(metric, "name", type(metric).__name__)
    columns = set()
    for module in getattr(metric, "evaluation_modules", [metric]):
        # A module may take its inputs in several forms.
        for features in module.features if isinstance(module.features, list) else [module.features]:
            columns |= set(features)
    if "predictions" not in columns or not columns <= {"predictions", "references"}:
        raise ValueError(
            f"The metric {label!r} takes {sorted(columns)}, but a task has predictions (class indices, or errors of "
            "noise) and, where it is a classification, references: pass a metric of those."
        )
    needs_references = "references" in columns
    kwargs = dict(compute_kwargs or {})

    def compute(scores: dict[str, list]) -> tuple[str, float]:
        found = metric.compute(**scores, **kwargs)
        name, value = next(iter((found or {}).items()), (label, None))
        if not isinstance(value, Real) or isinstance(value, bool):
            raise ValueError(
                f"The metric {label!r} returns {found!r} and not a number first: for a number over all classes pass "
                "`load_metric(module, compute_kwargs={'average': 'macro'})`."
            )
        # Two averages of one metric are two metrics, also for the names in results and caches.
        return "_".join([name, *(v for v in kwargs.values() if isinstance(v, str))]), float(value)

    references = {"references": [0, 1]} if needs_references else {}
    right, wrong = ([0, 1], [1, 0]) if needs_references else ([0.0, 0.0], [1.0, 1.0])
    try:
        name, best = compute({"predictions": right, **references})
        worst = compute({"predictions": wrong, **references})[1]
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"The metric {label!r} cannot be computed of predictions {right}: {error}") from error
    if greater_is_better is None:
        if best == worst:
            raise ValueError(
                f"The metric {label!r} is {best:g} of right and of wrong predictions: pass `greater_is_better` to "
                "`load_metric`."
            )
        greater_is_better = best > worst
    return Metric(name, greater_is_better, lambda scores: compute(_with_valid_labels(scores))[1], needs_references)


def refuse_two_metrics(task: Any, metric: Any) -> None:
    """Raise a ValueError where a metric is given beside a task, which has its own."""
    if task is not None and metric is not None:
        raise ValueError(
            f"metric is given beside task, which measures {task.metric}: give the metric to the task, as in "
            "ClassificationTask(metric=...), or leave the task out."
        )


def _with_valid_labels(scores: dict[str, list]) -> dict[str, list]:
    """Replace -1, the prediction of a broken model, by a class that exists and is wrong.

    A class of its own would be averaged over by a macro F1, and be refused by a binary one.
    """
    if "references" not in scores:
        return scores
    pairs = zip(scores["predictions"], scores["references"], strict=True)
    return {**scores, "predictions": [int(truth == 0) if label == -1 else label for label, truth in pairs]}


def _accuracy(scores: dict[str, list]) -> float:
    return float(np.mean(np.asarray(scores["predictions"]) == np.asarray(scores["references"])))


def _mean_squared_error(scores: dict[str, list]) -> float:
    return float(np.mean(scores["predictions"]))


def _mean_average_precision(scores: dict[str, list]) -> float:
    from sklearn.metrics import average_precision_score

    logits, labels = np.asarray(scores["predictions"]), np.asarray(scores["references"]) > 0.5
    occurring = labels.any(axis=0)
    return float(average_precision_score(labels[:, occurring], logits[:, occurring])) if occurring.any() else 0.0


def _micro_f1(scores: dict[str, list]) -> float:
    found, labels = np.asarray(scores["predictions"]) > 0, np.asarray(scores["references"]) > 0.5
    either = found.sum() + labels.sum()
    return float(2 * (found & labels).sum() / either) if either else 1.0


_OWN = {
    "accuracy": Metric("accuracy", True, _accuracy),
    "mse": Metric("mse", False, _mean_squared_error, needs_references=False),
    "mean_average_precision": Metric("mean_average_precision", True, _mean_average_precision, multi_label=True),
    "micro_f1": Metric("micro_f1", True, _micro_f1, multi_label=True),
}

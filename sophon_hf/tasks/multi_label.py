"""Multi-label classification: each label is a question of its own, answered by one logit."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from sophon_hf.tasks.classification import ClassificationTask
from sophon_hf.tasks.losses import at_least_float32, inverse_cross_entropy, kl_from_uniform
from sophon_hf.tasks.metrics import Metric


def _with_two_classes(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a loss of (batch, classes) for labels of which each is a choice between two: of logits 0 and z."""

    def of_labels(logits: Tensor, labels: Tensor) -> Tensor:
        logits = at_least_float32(logits).flatten()
        return loss(torch.stack([torch.zeros_like(logits), logits], dim=1), labels.flatten().long())

    return of_labels


class MultiLabelTask(ClassificationTask):
    """Learn labels that do not exclude one another, with the binary cross-entropy; suppress each with ICE or KLU.

    Args:
        head: Name of the model's final layer, where it cannot be found by running the model.
        metric: "mean_average_precision" (over the labels that occur), "micro_f1" (of all labels together, at the
            threshold 1/2), or a `Metric` of logits and labels, both of shape (examples, labels).
    """

    multi_label = True
    suppression_losses: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
        "inverse_cross_entropy": _with_two_classes(inverse_cross_entropy),
        "kl_from_uniform": _with_two_classes(kl_from_uniform),
        "negated_cross_entropy": lambda logits, labels: -_binary_cross_entropy(logits, labels),
    }

    def __init__(self, head: str | None = None, metric: str | Metric = "mean_average_precision"):
        super().__init__(head, metric)

    def fits(self, labels: Tensor | None, outputs: int | None) -> bool:
        """Return whether a head of so many outputs has one for every label and none besides."""
        return labels is None or outputs is None or labels.shape[1] == outputs

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the mean binary cross-entropy: what an adversary minimises, and L_beta of the original domain."""
        return _binary_cross_entropy(prediction, target)

    def distance(self, prediction: Tensor, unprotected: Tensor) -> Tensor:
        """Return the KL divergence of the prediction from the unprotected model's, the mean over batch and labels."""
        theirs = at_least_float32(unprotected)
        entropy = _binary_cross_entropy(theirs, theirs.sigmoid())
        return _binary_cross_entropy(prediction, theirs.sigmoid()) - entropy

    def scores(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return logits and labels; what a head has no output for counts as undecided, a broken row as wrong."""
        prediction = F.pad(prediction.float(), (0, target.shape[1] - prediction.shape[1]))
        broken = ~prediction.isfinite().all(dim=1, keepdim=True)
        return {"predictions": torch.where(broken, 1e9 * (1 - 2 * target), prediction), "references": target}


def _binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    if logits.shape != labels.shape:
        raise ValueError(f"The prediction has shape {tuple(logits.shape)}, the labels {tuple(labels.shape)}.")
    logits = at_least_float32(logits)
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))

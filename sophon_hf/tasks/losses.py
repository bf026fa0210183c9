"""Suppression losses L_alpha of the SOPHON paper, section 4.3, and the two it compares them with in section 5.8.

L_alpha is minimised while protecting; `information_maximization` by an adversary without labels.

Every function takes a prediction first and returns a scalar that is *minimised*. It computes in float32, or in float64
where the prediction has it; half-precision predictions are converted, so the tails stay exact.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def at_least_float32(values: Tensor) -> Tensor:
    """Return half precision as float32; float32 and float64 as they are."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def information_maximization(logits: Tensor) -> Tensor:
    """Return what adapts a classifier without labels (Liang et al., 2020): predictions are to be sure, and diverse.

    Args:
        logits: Shape (batch, classes), any floating dtype.

    Returns:
        Scalar: the mean entropy of the predictions minus the entropy of their mean.
    """
    log_probabilities = at_least_float32(logits).log_softmax(dim=1)
    log_mean = log_probabilities.logsumexp(dim=0) - math.log(len(logits))
    entropy = -(log_probabilities.exp() * log_probabilities).sum(dim=1).mean()
    return entropy + (log_mean.exp() * log_mean).sum()


def _check_classes(logits: Tensor) -> None:
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(
            f"logits have shape {tuple(logits.shape)}: expected (batch, classes) with at least 2 classes. A model with "
            "one output has no class to suppress."
        )


def inverse_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the inverse cross-entropy (ICE), eq. 11: the mean of `-log(1 - p_y)`.

    With `d = z_y - logsumexp(z_j, j != y)` it is `-log sigmoid(-d)`, which neither overflows where p_y -> 1
    nor loses its digits where p_y -> 0. Its gradient with respect to the logits is eq. 12.

    Args:
        logits: Shape (batch, classes), any floating dtype.
        labels: Shape (batch,), int64 class indices.

    Returns:
        Scalar, float32 or float64.

    Raises:
        ValueError: If there are fewer than two classes.
    """
    _check_classes(logits)
    logits = at_least_float32(logits)
    of_label = F.one_hot(labels, logits.shape[1]).bool()
    others = logits.masked_fill(of_label, float("-inf")).logsumexp(dim=1)
    margin = logits.gather(1, labels[:, None]).squeeze(1) - others
    return -F.logsigmoid(-margin).mean()


def kl_from_uniform(logits: Tensor, labels: Tensor | None = None) -> Tensor:
    """Return the Kullback-Leibler divergence from the uniform distribution (KLU), eq. 13; its gradient is eq. 14.

    Args:
        logits: Shape (batch, classes), any floating dtype.
        labels: Ignored: KLU suppresses every task on the restricted data.

    Returns:
        Scalar, float32 or float64, zero where every prediction is uniform.

    Raises:
        ValueError: If there are fewer than two classes.
    """
    _check_classes(logits)
    log_probabilities = at_least_float32(logits).log_softmax(dim=1)
    return -(log_probabilities + math.log(logits.shape[1])).mean()


def denial_of_service(prediction: Tensor, target: Tensor | None = None) -> Tensor:
    """Return denial of service (DoS), eq. 16: the batch mean of the squared norm of the predicted noise.

    Args:
        prediction: Shape (batch, ...), any floating dtype.
        target: Ignored: the loss pulls every prediction to zero.

    Returns:
        Scalar, float32 or float64; its gradient is `2 * prediction / batch`.
    """
    return at_least_float32(prediction).square().flatten(1).sum(dim=1).mean()


def negated_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the unstable comparison of section 5.8 for classifiers: minus the cross-entropy (eq. 10)."""
    return -F.cross_entropy(at_least_float32(logits), labels)


def negated_mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the unstable comparison of section 5.8 for diffusion: minus the mean squared error (eq. 15)."""
    return -F.mse_loss(at_least_float32(prediction), target)

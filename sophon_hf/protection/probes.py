"""Closed-form probes: what a new head could do with features, differentiated through its solution.

What a new head can do with a representation does not show in the loss of the model's own head. A probe shows it without
training one: kernel ridge regression on the features of a batch, judged on each example by the regression on all
others. The kernel is that of a new head with a hidden layer, which can use what a linear one cannot.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sophon_hf.finetuning.kernel import tangent_kernel, watched_features
from sophon_hf.models.structure import ModelStructure
from sophon_hf.tasks.losses import at_least_float32

RIDGE = 0.1
TEMPERATURE = 20.0
_SMALLEST_SPREAD = 1e-4


def leave_one_out_logits(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Logits of the kernel ridge regression from features to one-hot labels, for each example fitted on all others.

    With C = G^-1 - G^-1 1 1' G^-1 / (1' G^-1 1), G = k(H, H) + ridge I, the regression with a free intercept that has
    not seen example i predicts y_i - (C Y)_i / C_ii for it (Golub et al., 1979): n regressions for the price of one.
    Features are standardised by all examples. It costs the cube of the examples and their square times the features,
    and its gradient goes through the solution.

    Args:
        features: Shape (n, d), n at least 2.
        labels: Shape (n,), int64; or of several labels an example shape (n, c), of which each is regressed by itself.
        num_classes: c.

    Returns:
        Shape (n, c), float32 or float64: the predictions times the temperature.
    """
    features = at_least_float32(features)
    features = (features - features.mean(dim=0)) / (features.std(dim=0, correction=0) + _SMALLEST_SPREAD)
    # A label by itself is decided at the logit 0, so its targets lie on both sides of it.
    targets = (labels - 0.5 if labels.ndim == 2 else F.one_hot(labels, num_classes)).to(features.dtype)
    ridge = RIDGE * torch.eye(len(features), dtype=features.dtype, device=features.device)
    inverse = torch.linalg.inv(tangent_kernel(features, features) + ridge)
    sums = inverse.sum(dim=1, keepdim=True)
    without_intercept = inverse - sums @ sums.T / sums.sum()
    residuals = without_intercept @ targets / without_intercept.diagonal()[:, None]
    return TEMPERATURE * (targets - residuals)


class Probes:
    """Suppresses what new heads could do with a model's features, at several depths.

    The depths are the input of the head, as a new head sees it, and the outputs of blocks spread evenly over the model.

    Args:
        model: Unwrapped.
        structure: Its head and blocks.
        depths: How many depths, at most as many as blocks; 1 is the head's input alone.
        num_classes: Of the restricted domain.
        loss: L_alpha, of logits and labels.

    Raises:
        ValueError: The model has fewer depths.
    """

    def __init__(
        self,
        model: nn.Module,
        structure: ModelStructure,
        depths: int,
        num_classes: int,
        loss: Callable[[Tensor, Tensor], Tensor],
    ):
        if depths > max(len(structure.blocks), 1):
            raise ValueError(
                f"probe_depths is {depths}, but {type(model).__name__} has {len(structure.blocks)} blocks that "
                "features can be probed after: ask for at most as many, or for 1, which is what the head sees."
            )
        self.model, self.heads, self.num_classes, self.suppress = model, structure.heads, num_classes, loss
        self.blocks = [structure.blocks[round(len(structure.blocks) * part / depths) - 1] for part in range(1, depths)]

    def watching(self) -> AbstractContextManager[list[Tensor]]:
        """Inside the block a forward pass leaves its features, (batch, d) at each depth, in the list."""
        return watched_features(self.model, self.blocks, self.heads)

    def loss(self, features: list[Tensor], labels: Tensor) -> Tensor:
        """L_alpha of probes that are fitted on a batch and judged on each example without it, summed over depths."""
        logits = (leave_one_out_logits(part, labels, self.num_classes) for part in features)
        return torch.stack([self.suppress(part, labels) for part in logits]).sum()

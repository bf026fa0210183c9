"""What a new head could learn from a model's features, in closed form: the kernel that probes and an attack share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sophon_hf.data.domain import Domain
from sophon_hf.finetuning.strategy import NotApplicableError
from sophon_hf.models.loading import evaluation_mode
from sophon_hf.models.structure import ModelStructure
from sophon_hf.tasks.base import Task
from sophon_hf.tasks.classification import ClassificationTask
from sophon_hf.tasks.evaluation import to_device

# The adversary tries each on its own data, leaving one example out.
RIDGES = (1e-3, 1e-2, 0.1, 1.0)
_GRID = 2
_LARGEST_COSINE = 1 - 1e-5
_BATCH = 128
_SMALLEST_SPREAD = 1e-4


def tangent_kernel(a: Tensor, b: Tensor) -> Tensor:
    """The neural tangent kernel of a network with one hidden layer of ReLUs, in the limit of infinite width.

    k(x, x') = |x| |x'| / d (kappa_1(u) + u kappa_0(u)), where u is the cosine between them, t = arccos u its angle,
    kappa_0 = (pi - t) / pi and kappa_1 = (sin t + u (pi - t)) / pi (Cho and Saul, 2009; Jacot et al., 2018). Ridge
    regression with it predicts what such a network learns by gradient descent from both layers.

    Args:
        a: Shape (n, d).
        b: Shape (m, d).

    Returns:
        Shape (n, m); about 2 for a standardised vector with itself.
    """
    lengths = a.norm(dim=1)[:, None] * b.norm(dim=1)[None]
    # The arc cosine has no finite slope at 1.
    cosine = (a @ b.T / (lengths + 1e-6)).clamp(-_LARGEST_COSINE, _LARGEST_COSINE)
    angle = cosine.acos()
    active = (torch.pi - angle) / torch.pi
    return lengths / a.shape[1] * (angle.sin() / torch.pi + 2 * cosine * active)


@contextmanager
def watched_features(model: nn.Module, blocks: Sequence[str], heads: Sequence[str]) -> Iterator[list[Tensor]]:
    """Inside the block a forward pass leaves the output of each of `blocks`, then the heads' inputs, in the list.

    A feature map is given by its means over a 2 x 2 grid, tokens by their mean; shape (batch, d).
    """
    features: list[Tensor] = []

    def after(block: nn.Module, _: tuple, output: Tensor | tuple) -> None:
        features.append(_pooled(output if isinstance(output, Tensor) else output[0]))

    def before(head: nn.Module, inputs: tuple) -> None:
        features.append(_pooled(inputs[0]))

    handles = [model.get_submodule(name).register_forward_hook(after) for name in blocks]
    handles += [model.get_submodule(name).register_forward_pre_hook(before) for name in heads]
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()


def _pooled(output: Tensor) -> Tensor:
    if output.ndim == 4:
        return F.adaptive_avg_pool2d(output, _GRID).flatten(1)
    return output.mean(dim=1) if output.ndim == 3 else output.flatten(1)


class KernelRegression(nn.Module):
    """Kernel ridge regression from a model's features at all depths to classes: an attack without any training.

    It is the cheapest adversary, and a lower bound of what others reach. Depths count alike, however wide they are.

    Args:
        model: It is not changed.
        task: A classification with one label an example.
        training: The adversary's data; the cost grows with the cube of their number.
        structure: Head and blocks of the model.

    Attributes:
        ridge: That of `RIDGES` with the least squared error on each example of a regression on all others.

    Raises:
        NotApplicableError: Another task.
    """

    def __init__(self, model: nn.Module, task: Task, training: Domain, structure: ModelStructure):
        super().__init__()
        if not isinstance(task, ClassificationTask) or training.labels is None or training.labels.ndim != 1:
            raise NotApplicableError("the kernel regression is for classes, one an example")
        self.model, self.blocks, self.heads, self._task = model, structure.blocks, structure.heads, task
        device = next(model.parameters()).device
        with torch.no_grad(), evaluation_mode(model):
            batches = [training.rows(rows) for rows in torch.arange(len(training)).split(_BATCH)]
            parts = [self._features(to_device(batch, device)) for batch in batches]
            depths = [torch.cat(depth) for depth in zip(*parts, strict=True)]
            self._spreads = [(d.mean(dim=0), d.std(dim=0, correction=0) + _SMALLEST_SPREAD) for d in depths]
            self._known = self._joined(depths)
            targets = F.one_hot(training.labels, training.num_classes).to(self._known)
            self._mean = targets.mean(dim=0)
            kernel, errors = tangent_kernel(self._known, self._known), {}
            for ridge in RIDGES:
                inverse = torch.linalg.inv(kernel + ridge * torch.eye(len(kernel)).to(kernel))
                weights = inverse @ (targets - self._mean)
                left_out = weights / inverse.diagonal()[:, None]
                errors[ridge] = (float(left_out.square().mean()), weights)
        self.ridge = min(RIDGES, key=lambda ridge: errors[ridge][0])
        self._weights = errors[self.ridge][1]

    def forward(self, **inputs: Tensor) -> Tensor:
        """Return one value a class, shape (batch, classes)."""
        features = self._joined(self._features(inputs))
        return tangent_kernel(features, self._known) @ self._weights + self._mean

    def _features(self, inputs: dict[str, Tensor]) -> list[Tensor]:
        with watched_features(self.model, self.blocks, self.heads) as features:
            self._task.predict(self.model, inputs)
        return [part.double() for part in features]

    def _joined(self, depths: list[Tensor]) -> Tensor:
        width = sum(depth.shape[1] for depth in depths) / len(depths)
        pairs = zip(depths, self._spreads, strict=True)
        scaled = [(d - mean) / spread * (width / d.shape[1]) ** 0.5 for d, (mean, spread) in pairs]
        return torch.cat(scaled, dim=1)

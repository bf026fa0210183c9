"""Baseline B3: non-transferable learning (Wang et al., ICLR 2022), which protects before fine-tuning only."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from sophon_hf.data.batches import Stream
from sophon_hf.data.domain import Domain
from sophon_hf.tasks.classification import ClassificationTask
from sophon_hf.tasks.evaluation import to_device
from sophon_hf.utils import derive_seed

_KERNELS, _MULTIPLIER = 5, 2.0


def maximum_mean_discrepancy(source: Tensor, target: Tensor) -> Tensor:
    """Squared MMD under five Gaussian kernels, whose middle bandwidth is the mean squared distance of the data.

    Args:
        source: Features, shape (n, d).
        target: Features, shape (n, d), as many.

    Returns:
        Scalar; zero where both samples are the same.
    """
    both = torch.cat([source, target])
    distances = (both[:, None] - both[None]).square().sum(dim=2)
    count = len(both)
    bandwidth = distances.detach().sum() / (count**2 - count) / _MULTIPLIER ** (_KERNELS // 2)
    kernels = [torch.exp(-distances / (bandwidth * _MULTIPLIER**i + 1e-12)) for i in range(_KERNELS)]
    kernel = sum(kernels[1:], kernels[0])
    n = len(source)
    return kernel[:n, :n].mean() + kernel[n:, n:].mean() - kernel[:n, n:].mean() - kernel[n:, :n].mean()


def ntl_loss(
    source_logits: Tensor,
    source_labels: Tensor,
    target_logits: Tensor,
    target_labels: Tensor,
    discrepancy: Tensor,
    a: float = 0.1,
    b: float = 0.1,
) -> Tensor:
    """L_source - min(1, a L_target) min(1, b MMD); the KL divergence to one-hot labels is the cross-entropy."""
    source = F.cross_entropy(source_logits, source_labels)
    target = (a * F.cross_entropy(target_logits, target_labels)).clamp(max=1)
    return source - target * (b * discrepancy).clamp(max=1)


def train_ntl(
    model: nn.Module,
    task: ClassificationTask,
    original: Domain,
    restricted: Domain,
    *,
    steps: int = 500,
    batch_size: int = 64,
    learning_rate: float = 1e-4,
    seed: int = 0,
) -> nn.Module:
    """Train a model with NTL's loss, in place.

    Args:
        model: A pre-trained classifier, unwrapped.
        task: Classification.
        original: The source domain.
        restricted: The target domain; its labels must fit the model's head.
        steps: Updates of Adam.
        batch_size: Examples of each domain a step.
        learning_rate: Adam's; the paper's 1e-4.
        seed: Decides the order of the data.

    Raises:
        ValueError: The restricted domain has labels that the head has no outputs for.
    """
    device = next(model.parameters()).device
    streams = [Stream(d, task.collate, derive_seed(seed, "ntl", d.name)) for d in (original, restricted)]
    sample = to_device(streams[0].batch(0, 2), device)
    head = model.get_submodule(task.structure(model, sample).head)
    outputs = task.predict(model, sample).shape[1]
    if restricted.num_classes > outputs:
        raise ValueError(f"NTL needs labels that fit the head: {restricted.num_classes} classes, {outputs} outputs.")
    features: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0].flatten(1)))
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    try:
        for step in tqdm(range(steps), desc="NTL"):
            model.train()
            features.clear()
            batches = [to_device(s.batch(step * batch_size, batch_size), device) for s in streams]
            source, target = (task.predict(model, batch) for batch in batches)
            loss = ntl_loss(
                source, batches[0]["labels"], target, batches[1]["labels"], maximum_mean_discrepancy(*features)
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    finally:
        hook.remove()
    return model

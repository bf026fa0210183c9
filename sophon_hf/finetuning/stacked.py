"""Fine-tunings of one strategy trained together, as one vectorised pass, where one model alone leaves the device idle."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sophon_hf.data.batches import Batch
from sophon_hf.finetuning.loop import FineTuning
from sophon_hf.models.loading import WithTensors
from sophon_hf.tasks.evaluation import to_device


class StackedFineTuning(FineTuning):
    """Several fine-tunings that differ in weights and batches only: iterate over it, and each item is a step of all of them.

    Each model goes the way that it goes alone, within rounding. Their tensors become slices of one stack, so the models
    can be measured and saved at any time.

    Args:
        runs: Not yet iterated over.

    Raises:
        ValueError: The strategy, or a layer of the model, couples what is stacked or draws random numbers. What cannot be
            told from the layers (a forward pass with branches on values, or with random numbers of its own; batches
            of different shapes) raises in the first step, as torch says it.
    """

    def __init__(self, runs: Sequence[FineTuning]):
        first = runs[0]
        _check(first)
        self.runs = runs
        self.model, self.task, self.strategy, self.steps = first.model, first.task, first.strategy, first.steps
        self.autocast, self.reinitialized, self.after_step = first.autocast, first.reinitialized, None
        self.batches = zip(*(run.batches for run in runs), strict=True)
        updated = {id(parameter) for parameter in first.parameters}
        own = [{**dict(run.model.named_parameters()), **dict(run.model.named_buffers())} for run in runs]
        self.tensors = {name: torch.stack([tensors[name].detach() for tensors in own]) for name in own[0]}
        for number, tensors in enumerate(own):
            for name, tensor in tensors.items():
                tensor.data = self.tensors[name][number]
        self.parameters = [
            self.tensors[n].requires_grad_() for n, p in first.model.named_parameters() if id(p) in updated
        ]

    def _backward(self, batches: tuple[Batch, ...]) -> Tensor:
        """As for one model, but over all; returns their losses, shape (runs,)."""
        self.model.train()
        batch = {name: torch.stack([b[name] for b in batches]) for name in batches[0]}
        losses = torch.vmap(self._loss)(self.tensors, to_device(batch, self.parameters[0].device))
        # The gradient of a sum over models that share nothing is each model's own.
        gradients = torch.autograd.grad(losses.sum(), self.parameters, allow_unused=True)
        self._assign(gradients)
        return losses.detach()

    def _loss(self, tensors: dict[str, Tensor], batch: Batch) -> Tensor:
        with self.autocast():
            prediction = self.task.predict(WithTensors(self.model, tensors), batch)
        return self.task.loss(prediction, self.task.target(batch))

    def gradient_norms(self) -> list[float]:
        """Norm of each model's last gradient; NaN before the first step."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if not gradients:
            return [float("nan")] * len(self.runs)
        return [float(nn.utils.get_total_norm([g[i] for g in gradients])) for i in range(len(self.runs))]


def _check(run: FineTuning) -> None:
    coupled = {"an adapter": run.strategy.adapter, "clipping of the gradient": run.strategy.max_grad_norm}
    layers = [type(m).__name__ for m in run.model.modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0]
    reason = next((what for what, present in coupled.items() if present), layers[0] if layers else None)
    if reason is not None:
        raise ValueError(f"Seeds of '{run.strategy.name}' cannot be stacked, because of {reason}: run them one by one.")

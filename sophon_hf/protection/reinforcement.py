"""The reinforcement loops (lines 17 to 21 of Algorithm 1): their batches of O, and L_beta."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Dataset

from sophon_hf.data.batches import Batch, Stream
from sophon_hf.data.domain import Domain
from sophon_hf.models.sharding import is_sharded, local
from sophon_hf.protection.config import SophonConfig
from sophon_hf.tasks.base import Task
from sophon_hf.utils import derive_seed


class ReinforcementBatches(Dataset):
    """Item i is the i-th micro-batch that the Trainer itself takes a step with: of each iteration's last loop.

    Args:
        domain: The original domain.
        task: What is learned.
        args: Sizes and seed.
    """

    def __init__(self, domain: Domain, task: Task, args: SophonConfig):
        self.stream, self.args = Stream(domain, task.collate, derive_seed(args.seed, "original")), args

    def __len__(self) -> int:
        return self.args.max_steps * self.args.gradient_accumulation_steps

    def __getitem__(self, index: int) -> Batch:
        step, micro_step = divmod(index, self.args.gradient_accumulation_steps)
        return self.batch(step, self.args.l_NTR - 1, micro_step)

    def batch(self, step: int, loop: int, micro_step: int) -> Batch:
        """This process's micro-batch of a loop of an iteration."""
        args = self.args
        position = (step * args.l_NTR + loop) * args.gradient_accumulation_steps + micro_step
        size = args.per_device_train_batch_size
        return self.stream.batch((position * args.world_size + args.process_index) * size, size)


class Distillation:
    """The task's loss, and how far the prediction is from what the model predicted before protection.

    Args:
        unprotected: A copy of the model as it is before protection.
        task: What is learned.
        weight: Of the distance.
        mixup: Replace the second half of every batch by mixtures, which the task's loss leaves out.
    """

    def __init__(self, unprotected: nn.Module, task: Task, weight: float, mixup: bool = False):
        self.unprotected, self.task, self.weight = unprotected.eval().requires_grad_(False), task, weight
        self.mixup = mixup

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """L_beta, a scalar, and the model's prediction."""
        labelled = None
        if self.mixup:
            batch, labelled = mix_second_half(batch)
        prediction = self.task.predict(model, batch)
        with torch.no_grad():
            unprotected = self.task.predict(self.unprotected, batch)
        distance = self.task.distance(prediction, unprotected)
        loss = self.task.loss(prediction[:labelled], self.task.target(batch)[:labelled])
        return loss + self.weight * distance, prediction


def mix_second_half(batch: Batch) -> tuple[Batch, int]:
    """Replace the second half of a batch's inputs by mixtures of two of its examples.

    A mixture is x + s (x' - x), s uniform in [0, 1].
    Images, shape (batch, channels, height, width), are mirrored before with probability 1/2.

    Returns:
        The batch, and how many of its examples are not mixed, so that their labels fit.
    """
    size = len(batch["labels"])
    half = size - size // 2
    inputs = {name: values for name, values in batch.items() if name != "labels" and values.is_floating_point()}
    device = batch["labels"].device
    share, mirrored = torch.rand(size - half).to(device), (torch.rand(size) < 0.5).to(device)

    def along(factor: Tensor, values: Tensor) -> Tensor:
        return factor.view(-1, *[1] * (values.ndim - 1))

    mixed = {}
    for name, values in inputs.items():
        turned = torch.where(along(mirrored, values), values.flip(-1), values) if values.ndim == 4 else values
        mixture = torch.lerp(turned[half:], turned[: size - half], along(share, values).to(values.dtype))
        mixed[name] = torch.cat([values[:half], mixture])
    return {**batch, **mixed}, half


@torch.no_grad()
def average_and_clip(
    gradients: dict[str, Tensor], loss: Tensor, model: nn.Module, accelerator: Accelerator, max_norm: float
) -> tuple[Tensor, Tensor]:
    """Average gradients and loss over the processes in one message, and clip the gradients, in place.

    Those of a sharded model are means over the processes already.

    Args:
        gradients: By parameter name.
        loss: A scalar that is averaged with them.
        model: Whose parameters they belong to.
        accelerator: Of the processes.
        max_norm: What the norm of all gradients together is clipped to; 0 for never.

    Returns:
        The gradients' norm before clipping, and the loss.
    """
    tensors = [local(gradient) for gradient in gradients.values()]
    if is_sharded(model):
        squares = torch.stack([tensor.square().sum() for tensor in tensors]).sum()
        squares, loss = accelerator.reduce(torch.stack([squares, loss.detach().to(squares.dtype)]), reduction="sum")
        norm, loss = squares.sqrt(), loss / accelerator.num_processes
        if max_norm > 0:
            torch._foreach_mul_(tensors, (max_norm / (norm + 1e-6)).clamp(max=1))
        return norm, loss
    vector = torch.cat([*(t.flatten() for t in tensors), loss.detach().to(tensors[0].dtype).view(1)])
    vector = accelerator.reduce(vector, reduction="mean")
    loss, vector = vector[-1], vector[:-1]
    norm = vector.norm()
    if max_norm > 0:
        vector *= (max_norm / (norm + 1e-6)).clamp(max=1)
    for tensor, part in zip(tensors, vector.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
    return norm, loss

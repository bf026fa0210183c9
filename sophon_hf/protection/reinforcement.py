"""The reinforcement loops (lines 17 to 21 of Algorithm 1): their batches of O, and L_beta."""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from sophon_hf.data.batches import Batch, Stream
from sophon_hf.data.domain import Domain
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

    def loader(self) -> DataLoader:
        """Return the items in order, as the Trainer takes them."""
        return DataLoader(
            self,
            batch_size=1,
            collate_fn=itemgetter(0),
            num_workers=self.args.dataloader_num_workers,
            persistent_workers=self.args.dataloader_persistent_workers,
        )

    def batch(self, step: int, loop: int, micro_step: int) -> Batch:
        """This process's micro-batch of a loop of an iteration."""
        args = self.args
        position = (step * args.l_NTR + loop) * args.gradient_accumulation_steps + micro_step
        size = args.per_device_train_batch_size
        return self.stream.batch((position * args.world_size + args.process_index) * size, size)


class ReinforcementLoss:
    """L_beta: the task's loss, with distillation also how far predictions are from those before protection.

    Args:
        task: What is learned.
        args: Weight of the distance, and whether the second half of every batch is replaced by mixtures, which the
            task's loss leaves out.
        unprotected: A copy of the model as it is before protection, to distil from.
        own_loss: Called with (model, batch) in place of all that.
    """

    def __init__(
        self,
        task: Task,
        args: SophonConfig,
        unprotected: nn.Module | None = None,
        own_loss: Callable[[nn.Module, Batch], Tensor] | None = None,
    ):
        self.task, self.weight, self.mixup, self.own_loss = task, args.distillation, args.mixup, own_loss
        self.unprotected = None if unprotected is None else unprotected.eval().requires_grad_(False)

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Return L_beta, a scalar, and the model's prediction where it is known."""
        if self.own_loss is not None:
            return self.own_loss(model, batch), None
        labelled = None
        if self.mixup:
            batch, labelled = mix_second_half(batch)
        prediction = self.task.predict(model, batch)
        loss = self.task.loss(prediction[:labelled], self.task.target(batch)[:labelled])
        if self.unprotected is not None:
            with torch.no_grad():
                unprotected = self.task.predict(self.unprotected, batch)
            loss = loss + self.weight * self.task.distance(prediction, unprotected)
        return loss, prediction


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

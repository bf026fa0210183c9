"""The reinforcement loops (lines 17 to 21 of Algorithm 1): their batches of O, each a function of its place, and L_beta."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from sophon_hf.config import SophonConfig
from sophon_hf.data import Domain, Stream, derive_seed
from sophon_hf.data.streams import Batch
from sophon_hf.tasks import Task


class ReinforcementBatches(Dataset):
    """Item i is the i-th micro-batch that the Trainer itself takes a step with: of each iteration's last loop.

    Args:
        domain: The original domain.
        task: What is learned.
        args: Sizes and seed.
    """

    def __init__(self, domain: Domain, task: Task, args: SophonConfig):
        self.stream, self.args = Stream(domain, task, derive_seed(args.seed, "original")), args

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
    """

    def __init__(self, unprotected: nn.Module, task: Task, weight: float):
        self.unprotected, self.task, self.weight = unprotected.eval().requires_grad_(False), task, weight

    def __call__(self, prediction: Tensor, batch: Batch) -> Tensor:
        """L_beta, a scalar."""
        with torch.no_grad():
            unprotected = self.task.predict(self.unprotected, batch)
        distance = self.task.distance(prediction, unprotected)
        return self.task.loss(prediction, self.task.target(batch)) + self.weight * distance

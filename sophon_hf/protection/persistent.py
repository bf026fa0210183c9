"""Simulated adversaries that live on over the iterations, so that long fine-tunings cost only a few updates each."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from sophon_hf.finetuning.initialization import Stored
from sophon_hf.finetuning.loop import FineTuning, Update
from sophon_hf.protection.environment import Environment


class PersistentAdversary:
    """An adversary that is put aside between iterations; theta may move meanwhile.

    What is kept is how far it has come from theta, its own head, its batch-norm statistics and its optimizer's state:
    about three copies of what it updates. It goes on from where theta is then, by as far as it had come.

    Args:
        environment: Its environment.
        updates: Its horizon: the optimizer steps of its whole life.
    """

    def __init__(self, environment: Environment, updates: int):
        self.environment, self.updates = environment, updates
        self.age = 0
        self.fine_tuning: FineTuning | None = None
        self.warming_up = False

    @property
    def finished(self) -> bool:
        """Whether its horizon is reached."""
        return self.age >= self.updates

    def resume(self, model: nn.Module, begin: Callable[[Environment, int], FineTuning]) -> Iterator[Update]:
        """Make the model, which is theta, this adversary's, and go on with its updates.

        Args:
            model: Unwrapped, and stored by the caller.
            begin: Starts a fine-tuning of the model in an environment, for so many updates; called at birth, and after
                a warm-up.

        Returns:
            The updates that are left of its life; each is made when it is asked for.
        """
        if self.fine_tuning is None:
            self._life = self._live(begin)
        else:
            self._return(model)
        return self._life

    def _live(self, begin: Callable[[Environment, int], FineTuning]) -> Iterator[Update]:
        for environment, updates in self.environment.stages(self.updates):
            self.fine_tuning, self.warming_up = begin(environment, updates), environment is not self.environment
            for update in self.fine_tuning:
                self.age += 1
                yield Update(self.age, update.loss)

    @torch.no_grad()
    def put_aside(self, model: nn.Module, theta: Stored) -> None:
        """Note how far it has come; the caller then puts theta back."""
        if self.fine_tuning is None:
            return  # No step of its first visit was to be run.
        before = {id(tensor): copy for tensor, copy in zip(theta.tensors, theta.copies, strict=True)}
        own = self.fine_tuning.reinitialized
        self._head_name, self._head = theta.head, model.get_submodule(theta.head)
        self._own = {name: p.detach().clone() for name, p in model.named_parameters() if name in own}
        self._moved = {name: p - before[id(p)] for name, p in model.named_parameters() if name not in own}
        self._buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}

    @torch.no_grad()
    def _return(self, model: nn.Module) -> None:
        model.set_submodule(self._head_name, self._head)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.is_floating_point())
            if name in self._own:
                parameter.copy_(self._own[name])
            else:
                parameter.add_(self._moved[name])
        for name, buffer in model.named_buffers():
            buffer.copy_(self._buffers[name])

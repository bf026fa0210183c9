"""The exact suppression gradient (eq. 5), differentiated through every optimizer step; for small, smooth models."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sophon_hf.finetuning.optimizers import make_optimizer, make_scheduler
from sophon_hf.finetuning.strategy import FineTuningStrategy
from sophon_hf.models.loading import WithTensors
from sophon_hf.protection.simulation import SimulatedAdversary
from sophon_hf.protection.suppression import Simulated, Suppression, add_gradients, last_evaluated
from sophon_hf.tasks.evaluation import to_device


class SecondOrderSuppression(Suppression):
    """Computes the exact suppression gradient; `Suppression` computes the first-order one.

    Memory grows with K. Under Adam a gradient of exactly zero (a dead ReLU) has no second derivative, which shows as a
    suppression gradient that is not finite: use smooth models. Adversaries start at theta and end within the call.
    """

    def _simulate(
        self, adversary: SimulatedAdversary, weights: Sequence[float], gradient: dict[str, Tensor], simulated: Simulated
    ) -> None:
        """Fine-tune copies of the parameters that autograd may keep, and differentiate the sum of the losses."""
        strategy, last = adversary.strategy, last_evaluated(weights)
        fine_tuning = self._begin(strategy, adversary.R, len(weights))
        theta = dict(self.model.named_parameters())
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        vartheta = {name: parameter.clone() for name, parameter in theta.items()}
        updated = {id(p) for p in fine_tuning.parameters}
        moving = [vartheta[name] for name, parameter in theta.items() if id(parameter) in updated]
        optimizer = _differentiable_optimizer(strategy, moving)
        scheduler = make_scheduler(strategy, optimizer, len(weights))
        device = moving[0].device
        total = torch.zeros((), device=device)
        for step, batch in zip(range(1, last + 1), fine_tuning.batches, strict=False):
            self.model.train()
            # The optimizer writes in place, so every step works on copies that autograd may keep.
            copies = {name: tensor.clone() for name, tensor in vartheta.items()}
            batch = to_device(batch, device)
            # Fused attention has no second derivative.
            with self.autocast(), sdpa_kernel(SDPBackend.MATH):
                prediction = self.task.predict(WithTensors(self.model, {**copies, **buffers}), batch)
            loss = self.task.loss(prediction, self.task.target(batch))
            slopes = torch.autograd.grad(loss, moving, create_graph=True, allow_unused=True)
            for tensor, slope in zip(moving, _clipped(slopes, strategy.max_grad_norm), strict=True):
                tensor.grad = slope
            _copy_optimizer_state(optimizer)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            adversary.age = step
            if weights[step - 1]:
                # Both are overwritten by the next step, whereas autograd keeps what it is given.
                copies = {name: tensor.clone() for name, tensor in [*vartheta.items(), *buffers.items()]}
                with sdpa_kernel(SDPBackend.MATH):
                    loss, scores = self._evaluate(WithTensors(self.model, copies), adversary)
                total = total + weights[step - 1] * loss
                simulated.losses[step], simulated.after = loss.detach(), scores()
        if simulated.losses:
            names = [name for name in gradient if name not in fine_tuning.reinitialized]
            slopes = torch.autograd.grad(total, [theta[name] for name in names], allow_unused=True)
            add_gradients([gradient[name] for name in names], slopes, 1.0)


def _clipped(gradients: Sequence[Tensor | None], max_norm: float) -> Sequence[Tensor | None]:
    """Clip like `clip_grad_norm_`, but so that autograd can go through it."""
    if not max_norm:
        return gradients
    norm = torch.stack([g.norm() for g in gradients if g is not None]).norm()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1)
    return [None if g is None else g * scale for g in gradients]


def _differentiable_optimizer(strategy: FineTuningStrategy, moving: list[Tensor]) -> torch.optim.Optimizer:
    """Return torch's optimizer, started so that all of it is differentiable and exact.

    Left to itself SGD detaches its first momentum, and Adam raises its decay rates to powers in float32.
    """
    optimizer = make_optimizer(strategy, moving, differentiable=True)
    for tensor in moving:
        zeros = torch.zeros_like(tensor, requires_grad=False)
        if isinstance(optimizer, torch.optim.SGD) and strategy.optimizer != "sgd":
            optimizer.state[tensor] = {"momentum_buffer": zeros}
        if isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
            step = torch.zeros((), dtype=torch.float64, device=tensor.device)
            optimizer.state[tensor] = {"step": step, "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
    return optimizer


def _copy_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    # The optimizer updates its moments in place, and autograd needs those of every earlier step.
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.ndim > 0:
                state[name] = value.clone()

"""The suppression loop's Adam, and what happens to the gradients of both loops before a step."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import get_scheduler

from sophon_hf.models.sharding import is_sharded, local
from sophon_hf.protection.config import SophonConfig
from sophon_hf.protection.guard import Guard


class SuppressionOptimizer(torch.optim.Adam):
    """Adam with the rate alpha, which follows the Trainer's schedule, multiplied by the guard's scale.

    With `preconditioning` c the step is alpha m / (sqrt(v + c w) + epsilon): m and v are the suppression gradient's
    moments, w is the reinforcement gradient's second moment, as beta's optimizer keeps it. A parameter moves less where
    the original domain minds more, and all move less when little is left to suppress.

    Args:
        model: Unwrapped.
        args: alpha, the schedule, `preconditioning`, and Adam's other settings.
        guard: Whose scale it is.

    Attributes:
        scheduler: Steps once an iteration.
    """

    def __init__(self, model: nn.Module, args: SophonConfig, guard: Guard):
        self.preconditioning = args.preconditioning
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        super().__init__(list(self.named.values()), args.alpha, (args.adam_beta1, args.adam_beta2), args.adam_epsilon)
        self.scheduler = get_scheduler(
            args.lr_scheduler_type,
            self,
            num_warmup_steps=args.get_warmup_steps(args.max_steps),
            num_training_steps=args.suppressed_steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
        self.scheduler.lr_lambdas = [
            lambda step, schedule=schedule: guard.state.alpha_scale * schedule(step)
            for schedule in self.scheduler.lr_lambdas
        ]

    @property
    def rate(self) -> float:
        """alpha as it is now."""
        return self.param_groups[0]["lr"]

    @torch.no_grad()
    def apply(self, gradient: dict[str, Tensor], reinforcement: torch.optim.Optimizer) -> None:
        """Step along a gradient, by parameter name; `reinforcement` is beta's optimizer over the same parameters."""
        for name, parameter in self.named.items():
            parameter.grad = gradient.get(name)
        known = reinforcement.state if self.preconditioning else {}
        slowed = [p for p in self.named.values() if p.grad is not None and "exp_avg_sq" in known.get(p, ())]
        before = [local(p).clone() for p in slowed]
        self.step()
        for parameter, old in zip(slowed, before, strict=True):
            v, w = (_second_moment(optimizer, parameter) for optimizer in (self, reinforcement))
            share = v.div(v + self.preconditioning * w).sqrt_().nan_to_num_(0.0)  # 0 / 0 where neither has a gradient.
            local(parameter).sub_(old).mul_(share).add_(old)
        self.zero_grad()

    def rescale(self) -> None:
        """Follow the guard's scale at once, and not only from the next iteration on."""
        scheduler = self.scheduler
        for group, alpha, schedule in zip(self.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
            group["lr"] = alpha * schedule(scheduler.last_epoch)


def _second_moment(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Tensor:
    state, beta = optimizer.state[parameter], optimizer.param_groups[0]["betas"][1]
    return local(state["exp_avg_sq"]) / (1 - beta ** float(state["step"]))


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

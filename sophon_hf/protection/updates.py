"""How theta moves: the suppression loop and its Adam beside the Trainer's own, and the way back where the guard says so."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from sophon_hf.models.sharding import is_sharded, local

if TYPE_CHECKING:
    from accelerate import Accelerator

    from sophon_hf.protection.config import SophonConfig
    from sophon_hf.protection.trainer import SophonTrainer

logger = logging.getLogger(__name__)

# What is left of the iterations then is there for the original metric to come back.
SLACK_ENDS = 0.7


def suppression_loop(trainer: SophonTrainer, loop: int) -> None:
    """Lines 4 to 15 of Algorithm 1: simulate N adversaries, update theta with Adam(alpha).

    Args:
        trainer: Inside an iteration.
        loop: Which of its l_FTS loops.
    """
    args, step = trainer.args, trainer.state.global_step
    result = trainer.suppression(trainer.adversaries.draw(step, loop), args.step_weights)
    norm, result.loss = average_and_clip(
        result.gradient, result.loss, trainer.model, trainer.accelerator, args.max_grad_norm
    )
    if torch.isfinite(norm):
        for name, parameter in trainer.model.named_parameters():
            parameter.grad = result.gradient.get(name)
        trainer.suppression_optimizer.step()
        trainer.suppression_optimizer.zero_grad()
        trainer.guard.state.applied += 1
    else:
        trainer.guard.state.dropped += 1
        logger.warning("Iteration %d: the suppression gradient is not finite and is dropped.", step)
    if loop == args.l_FTS - 1:
        trainer.suppression_scheduler.step()
    trainer.step_log.add_suppression(result, norm)


def reinforcement_loop(
    trainer: SophonTrainer, model: nn.Module, loop: int, backward: Callable[[nn.Module, dict[str, Tensor]], Tensor]
) -> None:
    """Lines 17 to 21 of Algorithm 1, for all loops but the last, which the Trainer itself closes.

    Args:
        trainer: Inside an iteration.
        model: As accelerate wraps it.
        loop: Which of its l_NTR loops.
        backward: The Trainer's own `training_step`: adds the gradient of a micro-batch, and returns its loss.
    """
    args, accelerator, losses = trainer.args, trainer.accelerator, []
    for micro_step in range(args.gradient_accumulation_steps):
        batch = trainer.reinforcement_batches.batch(trainer.state.global_step, loop, micro_step)
        with nullcontext() if is_sharded(trainer.model) else accelerator.no_sync(model):
            losses.append(backward(model, batch))
    # The Trainer's first micro-batch may run without gradient averaging, so average by hand as for suppression.
    gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    average_and_clip(gradients, torch.stack(losses).sum(), trainer.model, accelerator, args.max_grad_norm)
    # The optimizer that accelerate wraps, since accelerate's own would wait for the Trainer's last micro-batch.
    getattr(trainer.optimizer, "optimizer", trainer.optimizer).step()
    model.zero_grad()


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


def make_suppression_optimizer(model: nn.Module, args: SophonConfig) -> torch.optim.Adam:
    """Adam with alpha, beside the Trainer's own with beta."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.Adam(parameters, args.alpha, (args.adam_beta1, args.adam_beta2), args.adam_epsilon)


def make_suppression_scheduler(
    optimizer: torch.optim.Optimizer, args: SophonConfig, iterations: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The schedule that beta has: both move on once an iteration."""
    return get_scheduler(
        args.lr_scheduler_type, optimizer, num_warmup_steps=args.get_warmup_steps(iterations),
        num_training_steps=iterations, scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )  # fmt: skip


def consult_guard(trainer: SophonTrainer, original: float, simulated: float) -> None:
    """Show an evaluation to the guard; where the original metric fell too far, do as `after_rollback` says.

    Args:
        trainer: After an evaluation of its own domains.
        original: The original metric.
        simulated: What fixed simulated adversaries reach.
    """
    guard, step, choice = trainer.guard, trainer.state.global_step, trainer.args.after_rollback
    inside = guard.observe(step, original, simulated)
    if choice == "no_rollback":
        if trainer.args.slack:
            _adapt_alpha(trainer, original, inside)
        return
    if inside:
        return
    _roll_back(trainer)
    if choice == "halve_alpha":
        _scale_alpha(trainer, 1 / 2)
    trainer.control.should_training_stop |= choice == "stop"
    logger.warning(
        "Iteration %d: the original %s is %.4f, beyond the tolerance of %g from its start %.4f. The state of iteration "
        "%d is put back; then: %s.", step, trainer.task.metric, original, guard.tolerance, guard.state.start,
        guard.state.good_step, choice,
    )  # fmt: skip


def _roll_back(trainer: SophonTrainer) -> None:
    trainer.guard.roll_back(trainer.optimizer, trainer.suppression_optimizer)
    trainer.adversaries.start_anew()
    if trainer.keep_norms is not None:
        trainer.keep_norms.set_norms()  # The state from before the first iteration has its own.


def _adapt_alpha(trainer: SophonTrainer, original: float, inside: bool) -> None:
    """Let alpha follow what of lambda and its slack is left.

    Halve it where the original metric stays beyond them and will not be back when the slack ends, and double it back inside the
    tolerance. Where the original domain is lost nothing comes back in time: put the last good state back, and quarter alpha.
    """
    step, guard, scheduler = trainer.state.global_step, trainer.guard, trainer.suppression_scheduler
    slack, end = trainer.args.slack, SLACK_ENDS * trainer.state.max_steps
    if guard.lost(original, slack):
        _roll_back(trainer)
        _scale_alpha(trainer, 1 / 4)
    elif guard.stays_beyond(slack * max(0.0, 1 - step / end)) and not guard.comes_back(end):
        _scale_alpha(trainer, 1 / 2)
    elif inside and scheduler.base_lrs[0] < trainer.args.alpha:
        _scale_alpha(trainer, 2)
    else:
        return
    logger.info(
        "Iteration %d: the original %s is %.4f (start %.4f): alpha is now %g of its schedule.", step, trainer.task.metric,
        original, guard.state.start, scheduler.base_lrs[0] / trainer.args.alpha,
    )  # fmt: skip


def _scale_alpha(trainer: SophonTrainer, factor: float) -> None:
    """Multiply alpha, now and in what is left of its schedule."""
    for group in trainer.suppression_optimizer.param_groups:
        group["lr"] *= factor
    scheduler = trainer.suppression_scheduler
    scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]

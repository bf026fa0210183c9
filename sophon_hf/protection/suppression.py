"""The gradient of the fine-tuning suppression loss (eq. 4 and 5): first order and streamed, or second order and exact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sophon_hf.data.batches import Batch
from sophon_hf.finetuning.initialization import preserved
from sophon_hf.finetuning.loop import FineTuning, make_optimizer, make_scheduler
from sophon_hf.finetuning.strategy import FineTuningStrategy
from sophon_hf.models.loading import WithTensors
from sophon_hf.models.sharding import gradients, local, share
from sophon_hf.models.structure import ModelStructure
from sophon_hf.protection.environment import Environment
from sophon_hf.protection.persistent import PersistentAdversary
from sophon_hf.protection.probes import Probes
from sophon_hf.tasks.evaluation import to_device
from sophon_hf.utils import set_seed

if TYPE_CHECKING:
    from sophon_hf.tasks.base import Task

MEASURED_EXAMPLES = 1000

SuppressionLoss = Callable[[Tensor, Tensor], Tensor]


@dataclass
class SimulatedAdversary:
    """What one simulated fine-tuning showed.

    Attributes:
        strategy: The name of phi_i.
        losses: L_alpha at each step whose gamma is not zero, step number -> scalar on the model's device.
        before: Scores of theta itself on the first batch of T_i; empty where a new head makes it meaningless.
        after: Scores at the last evaluated step.
    """

    strategy: str
    losses: dict[int, Tensor] = field(default_factory=dict)
    before: dict[str, Tensor] = field(default_factory=dict)
    after: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class SuppressionGradient:
    """The gradient of L_FTS (eq. 4) with respect to theta's trainable parameters.

    Attributes:
        gradient: Parameter name -> tensor of the parameter's shape and dtype.
        loss: L_FTS, a scalar on the model's device.
        adversaries: One entry an environment.
    """

    gradient: dict[str, Tensor]
    loss: Tensor
    adversaries: list[SimulatedAdversary]


class Suppression:
    """Computes the suppression gradient of a model.

    Memory holds one copy of theta, one sum of gradients, the gradient and the graph of one step, and the state of one
    adversary's optimizer, whatever K and N are: each step's gradient is added to the sum as it comes.

    Args:
        model: Unwrapped. It is fine-tuned in place and put back exactly: parameters, buffers, random state.
        task: What the adversaries learn.
        structure: Head and blocks of the model.
        loss: L_alpha, of prediction and target.
        num_classes: Classes of the restricted domain, for new heads.
        autocast: Called for a context around each forward pass.
        probes: Suppress them too, on twice as large batches of T_i.
        second_order: Differentiate through the adversaries' optimizer steps. Exact, for small models: memory grows
            with K, and a gradient of exactly zero has no second derivative under Adam, so use smooth models.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        structure: ModelStructure,
        loss: SuppressionLoss,
        *,
        num_classes: int | None = None,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        probes: Probes | None = None,
        second_order: bool = False,
    ):
        self.model, self.task, self.structure, self.loss = model, task, structure, loss
        self.num_classes, self.autocast, self.probes = num_classes, autocast, probes
        self._batch_norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.simulate = self._second_order if second_order else self._first_order

    def __call__(
        self, environments: Sequence[Environment | PersistentAdversary], gamma: Sequence[Sequence[float]]
    ) -> SuppressionGradient:
        """Simulate every adversary and sum the gradients.

        Args:
            environments: N fine-tuning environments, each for an adversary that starts anew, or adversaries that live on
                (first order only).
            gamma: gamma_{i,k}, N rows of K weights. A step of weight 0 is not evaluated, and the steps after the
                last other weight are not run.

        Returns:
            The gradient of eq. 4; in first order, the derivative of every step with respect to theta is the identity
            for what the adversary took over from theta, and zero for what it re-initialised.

        Raises:
            ValueError: Weights and environments differ in number.
        """
        if len(gamma) != len(environments):
            raise ValueError(f"gamma has {len(gamma)} rows for {len(environments)} simulated adversaries.")
        names = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        parameters = dict(self.model.named_parameters())
        gradient = {name: torch.zeros_like(parameters[name]) for name in names}
        adversaries, losses = [], []
        with preserved(self.model, self.structure.head) as stored:
            for number, (environment, weights) in enumerate(zip(environments, gamma, strict=True)):
                if number:
                    stored.restore()
                adversary = self.simulate(environment, weights, gradient)
                if isinstance(environment, PersistentAdversary):
                    environment.put_aside(self.model, stored)
                losses += [weights[step - 1] * value for step, value in adversary.losses.items()]
                adversaries.append(adversary)
        device = next(iter(parameters.values())).device
        total = torch.stack(losses).sum() if losses else torch.zeros((), device=device)
        return SuppressionGradient(gradient, total, adversaries)

    def measure(self, environment: Environment, steps: int, batch_size: int = MEASURED_EXAMPLES) -> dict[str, Tensor]:
        """Run one adversary for `steps` updates and return its scores on T_i, measured `batch_size` examples at a time.

        The model is put back.
        """
        with preserved(self.model, self.structure.head):
            set_seed(environment.seed)
            for _ in self._fine_tuning(environment, steps):
                pass
            held_out, parts = environment.evaluation, []
            examples = min(len(held_out.indices), MEASURED_EXAMPLES)
            with torch.no_grad():
                for start in range(0, examples, batch_size):
                    batch = held_out.batch(start, min(batch_size, examples - start))
                    parts.append(self.task.scores(*self._predict(self.model, batch, batch_statistics=False)))
            return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _first_order(
        self, member: Environment | PersistentAdversary, weights: Sequence[float], gradient: dict[str, Tensor]
    ) -> SimulatedAdversary:
        persistent = member if isinstance(member, PersistentAdversary) else PersistentAdversary(member, len(weights))
        environment, born = persistent.environment, persistent.age
        set_seed(environment.seed + born)
        adversary = SimulatedAdversary(environment.strategy.name)
        adversary.before = self._scores_before(environment)
        last = last_evaluated(weights)
        updates = persistent.resume(self.model, self._fine_tuning)
        fine_tuning = None
        for step, update in enumerate(islice(updates, last), 1):
            weight = weights[step - 1]
            # The head that it warms up with is not one it attacks with: then only what probes see counts.
            if not weight or (persistent.warming_up and not self.probes):
                continue
            if persistent.fine_tuning is not fine_tuning:  # At first, and again after a warm-up.
                fine_tuning, live = persistent.fine_tuning, dict(self.model.named_parameters())
                names = [name for name in gradient if name not in fine_tuning.reinitialized]
                taken_over, sums = [live[name] for name in names], [gradient[name] for name in names]
            for parameter in fine_tuning.parameters:
                parameter.grad = None  # The update is made, so that one gradient at a time is held beside the sum.
            batch = self._held_out(environment, update.step)
            loss, scores = self._evaluate(self.model, *batch, head=not persistent.warming_up)
            _add(sums, gradients(loss, taken_over, self.model), weight)
            adversary.losses[step] = loss.detach()
            if step == last and not persistent.warming_up:
                adversary.after = scores()
        return adversary

    def _second_order(
        self, environment: Environment, weights: Sequence[float], gradient: dict[str, Tensor]
    ) -> SimulatedAdversary:
        set_seed(environment.seed)
        adversary, strategy = SimulatedAdversary(environment.strategy.name), environment.strategy
        adversary.before = self._scores_before(environment)
        fine_tuning = self._fine_tuning(environment, len(weights))
        theta = dict(self.model.named_parameters())
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        vartheta = {name: parameter.clone() for name, parameter in theta.items()}
        updated = {id(p) for p in fine_tuning.parameters}
        moving = [vartheta[name] for name, parameter in theta.items() if id(parameter) in updated]
        optimizer = _differentiable_optimizer(strategy, moving)
        scheduler = make_scheduler(strategy, optimizer, len(weights))
        device = moving[0].device
        total = torch.zeros((), device=device)
        for step, batch in zip(range(1, last_evaluated(weights) + 1), fine_tuning.batches, strict=False):
            self.model.train()
            # The optimizer writes in place, so every step works on copies that autograd may keep.
            copies = {name: tensor.clone() for name, tensor in vartheta.items()}
            batch = to_device(batch, device)
            # Fused attention has no second derivative.
            with self.autocast(), sdpa_kernel(SDPBackend.MATH):
                prediction = self.task.predict(WithTensors(self.model, {**copies, **buffers}), batch)
            loss = self.task.loss(prediction, self.task.target(batch))
            gradients = torch.autograd.grad(loss, moving, create_graph=True, allow_unused=True)
            gradients = _clip(gradients, strategy.max_grad_norm)
            for tensor, slope in zip(moving, gradients, strict=True):
                tensor.grad = slope
            _copy_optimizer_state(optimizer)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            if weights[step - 1]:
                # Both are overwritten by the next step, whereas autograd keeps what it is given.
                copies = {name: tensor.clone() for name, tensor in [*vartheta.items(), *buffers.items()]}
                with sdpa_kernel(SDPBackend.MATH):
                    loss, scores = self._evaluate(WithTensors(self.model, copies), *self._held_out(environment, step))
                total = total + weights[step - 1] * loss
                adversary.losses[step], adversary.after = loss.detach(), scores()
        if adversary.losses:
            names = [name for name in gradient if name not in fine_tuning.reinitialized]
            slopes = torch.autograd.grad(total, [theta[name] for name in names], allow_unused=True)
            _add([gradient[name] for name in names], slopes, 1.0)
        return adversary

    def _fine_tuning(self, environment: Environment, steps: int) -> FineTuning:
        strategy = environment.strategy
        return FineTuning(
            self.model,
            self.task,
            strategy,
            environment.fine_tuning.batches(strategy.batch_size),
            steps,
            structure=self.structure,
            num_classes=self.num_classes,
            autocast=self.autocast,
        )

    def _evaluate(
        self, model: Callable, batch: Batch, weight: float, head: bool = True
    ) -> tuple[Tensor, Callable[[], dict[str, Tensor]]]:
        """L_alpha on a batch of T_i, of head and probes, times the weight of the batch, and what gives the scores."""
        with self.probes.watching() if self.probes else nullcontext() as features:
            prediction, target = self._predict(model, batch)
        # Sharded parameters are gathered for their gradient only where it comes through the prediction.
        loss = self.loss(prediction, target) if head else 0 * prediction.sum()
        if self.probes:
            loss = loss + self.probes.loss(features, target)
        return weight * loss, lambda: self.task.scores(prediction.detach(), target)

    def _predict(self, model: Callable, batch: Batch, batch_statistics: bool = True) -> tuple[Tensor, Tensor]:
        """Prediction and target in evaluation mode, but for batch norm, which takes the statistics of T_i.

        After a few updates the running statistics are still those of the original domain. An adversary's soon are not,
        so suppressing the model under them would suppress a model that no adversary ends up with.
        """
        batch = to_device(batch, next(self.model.parameters()).device)
        self.model.eval()
        for norm in self._batch_norms:
            norm.training = batch_statistics
        with self.autocast():
            return self.task.predict(model, batch), self.task.target(batch)

    def _held_out(self, environment: Environment, step: int) -> tuple[Batch, float]:
        """The batch of T_i for a step, the same one whatever the weights of the other steps, and the weight of its mean.

        No example is in it twice, or a probe would predict one from its own copy. A probe is no mean over examples, so with
        probes every process of a sharded model takes the whole batch.
        """
        size = environment.strategy.batch_size * (2 if self.probes else 1)
        batch = environment.evaluation.distinct_batch(step - 1, size)
        return (batch, 1.0) if self.probes else share(batch, self.model)

    @torch.no_grad()
    def _scores_before(self, environment: Environment) -> dict[str, Tensor]:
        if not environment.strategy.needs_original_head:
            return {}
        batch, _ = self._held_out(environment, 1)
        return self.task.scores(*self._predict(self.model, batch))


def last_evaluated(weights: Sequence[float]) -> int:
    """The last step whose weight is not zero; no step after it has to be run."""
    return max((k for k, weight in enumerate(weights, 1) if weight), default=0)


def _clip(gradients: Sequence[Tensor | None], max_norm: float) -> Sequence[Tensor | None]:
    """`clip_grad_norm_`, differentiable."""
    if not max_norm:
        return gradients
    norm = torch.stack([g.norm() for g in gradients if g is not None]).norm()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1)
    return [None if g is None else g * scale for g in gradients]


def _add(buffers: list[Tensor], gradients: Sequence[Tensor | None], weight: float) -> None:
    pairs = [(b, g) for b, g in zip(buffers, gradients, strict=True) if g is not None]
    if pairs:
        torch._foreach_add_([local(b) for b, _ in pairs], [local(g) for _, g in pairs], alpha=weight)


def _differentiable_optimizer(strategy: FineTuningStrategy, moving: list[Tensor]) -> torch.optim.Optimizer:
    """torch's optimizer, started so that all of it is differentiable and exact.

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
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.ndim > 0:
                state[name] = value.clone()

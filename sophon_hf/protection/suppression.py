"""The gradient of the fine-tuning suppression loss (eq. 4 and 5) in first order, streamed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from sophon_hf.data.batches import Batch, Stream
from sophon_hf.data.domain import Domain
from sophon_hf.finetuning.initialization import preserved
from sophon_hf.finetuning.loop import FineTuning
from sophon_hf.finetuning.strategy import FineTuningStrategy, NotApplicableError
from sophon_hf.models.sharding import gradients, local, share
from sophon_hf.models.structure import ModelStructure
from sophon_hf.protection.config import SophonConfig
from sophon_hf.protection.probes import Probes
from sophon_hf.protection.simulation import SimulatedAdversary
from sophon_hf.tasks.base import Task
from sophon_hf.tasks.evaluation import to_device
from sophon_hf.utils import derive_seed, set_seed

_MEASURED_EXAMPLES = 1000
# The guard's fixed adversaries learn for so many epochs in two batches each, as far as these limits go.
_EPOCHS, _BATCH, _UPDATES = 20, 50, 100
_RATES = {"direct": 1e-3, "new_head": 3e-3, "scratch": 3e-3}


@dataclass
class Simulated:
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
        adversaries: What each of the N adversaries showed.
    """

    gradient: dict[str, Tensor]
    loss: Tensor
    adversaries: list[Simulated]


class Suppression:
    """Computes the first-order suppression gradient of a model.

    Memory holds one copy of theta, one sum of gradients, the gradient and the graph of one step, and the state of one
    adversary's optimizer, for every K and N: each step's gradient is added to the sum as it comes.

    Args:
        model: Unwrapped. It is fine-tuned in place and put back exactly: parameters, buffers, random state.
        task: What the adversaries learn.
        structure: Head and blocks of the model.
        loss: L_alpha, of prediction and target.
        num_classes: Classes of the restricted domain, for new heads.
        autocast: Called for a context around each forward pass.
        probes: Suppress them too, on twice as large batches of T_i.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        structure: ModelStructure,
        loss: Callable[[Tensor, Tensor], Tensor],
        *,
        num_classes: int | None = None,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        probes: Probes | None = None,
    ):
        self.model, self.task, self.structure, self.loss = model, task, structure, loss
        self.num_classes, self.autocast, self.probes = num_classes, autocast, probes
        self._batch_norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

    def __call__(
        self, adversaries: Sequence[SimulatedAdversary], gamma: Sequence[Sequence[float]]
    ) -> SuppressionGradient:
        """Simulate every adversary and sum the gradients (lines 5 to 13 of Algorithm 1).

        Args:
            adversaries: N simulated adversaries; each makes K updates, fewer where its horizon ends.
            gamma: gamma_{i,k}, N rows of K weights. A step of weight 0 is not evaluated, and the steps after the
                last other weight are not run.

        Returns:
            The gradient of eq. 4; in first order, the derivative of every step with respect to theta is the identity
            for what the adversary took over from theta, and zero for what it re-initialised.

        Raises:
            ValueError: Weights and adversaries differ in number.
        """
        if len(gamma) != len(adversaries):
            raise ValueError(f"gamma has {len(gamma)} rows for {len(adversaries)} simulated adversaries.")
        parameters = dict(self.model.named_parameters())
        gradient = {name: torch.zeros_like(p) for name, p in parameters.items() if p.requires_grad}
        found, losses = [], []
        with preserved(self.model, self.structure.heads) as theta:
            for number, (adversary, weights) in enumerate(zip(adversaries, gamma, strict=True)):
                if number:
                    theta.restore()
                set_seed(adversary.seed + adversary.age)
                simulated = Simulated(adversary.strategy.name, before=self._scores_before(adversary))
                self._simulate(adversary, weights, gradient, simulated)
                adversary.suspend(self.model, theta)
                losses += [weights[step - 1] * value for step, value in simulated.losses.items()]
                found.append(simulated)
        device = next(iter(parameters.values())).device
        total = torch.stack(losses).sum() if losses else torch.zeros((), device=device)
        return SuppressionGradient(gradient, total, found)

    def _simulate(
        self, adversary: SimulatedAdversary, weights: Sequence[float], gradient: dict[str, Tensor], simulated: Simulated
    ) -> None:
        """Fine-tune the live model for K updates, and add the weighted gradients of L_alpha to `gradient`."""
        adversary.resume(self.model, self._begin)
        last, known = last_evaluated(weights), None
        for step in range(1, last + 1):
            if not adversary.step():
                break
            # The head that an adversary warms up with is not the one it attacks with: then only probes count.
            if not weights[step - 1] or (adversary.warming_up and not self.probes):
                continue
            fine_tuning = adversary.fine_tuning
            assert fine_tuning is not None, "a step was made"
            if fine_tuning is not known:  # At the first step, and after a warm-up.
                known, live = fine_tuning, dict(self.model.named_parameters())
                names = [name for name in gradient if name not in fine_tuning.reinitialized]
                taken_over, sums = [live[name] for name in names], [gradient[name] for name in names]
            for parameter in fine_tuning.parameters:
                parameter.grad = None  # The update is made, so that one gradient at a time is held beside the sum.
            loss, scores = self._evaluate(self.model, adversary, head=not adversary.warming_up)
            add_gradients(sums, gradients(loss, taken_over, self.model), weights[step - 1])
            simulated.losses[step] = loss.detach()
            if step == last and not adversary.warming_up:
                simulated.after = scores()

    def measure(self, adversary: SimulatedAdversary, batch_size: int = _MEASURED_EXAMPLES) -> dict[str, Tensor]:
        """Run an adversary to its horizon and return its scores on T_i; the model is put back.

        Args:
            adversary: One that has not started.
            batch_size: Examples that are measured at a time.
        """
        with preserved(self.model, self.structure.heads):
            set_seed(adversary.seed)
            adversary.resume(self.model, self._begin)
            while adversary.step():
                pass
            examples, parts = min(len(adversary.T.indices), _MEASURED_EXAMPLES), []
            with torch.no_grad():
                for start in range(0, examples, batch_size):
                    batch = adversary.T.batch(start, min(batch_size, examples - start))
                    parts.append(self.task.scores(*self._predict(self.model, batch, batch_statistics=False)))
            return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def simulated_metric(
        self,
        starts: set[str],
        restricted: Domain,
        held_out: Domain,
        args: SophonConfig,
        blocks: int = 0,
        draw: str = "fixed",
    ) -> float:
        """Return the metric that the strongest of some fixed few-shot adversaries reaches on held-out restricted data.

        Args:
            starts: The adversaries' initializations; "scratch" is the yardstick.
            restricted: What the adversaries have `simulated_examples` of.
            held_out: What they are measured on.
            args: `simulated_examples`, the seed, and how many examples are measured at a time.
            blocks: How many of the last blocks they re-initialise.
            draw: Another one has other examples and other new heads.

        Returns:
            NaN without starts, or where no model can be newly initialised from this one's parts.
        """
        found, examples = [], args.simulated_examples
        for start in sorted(starts):
            batch = min(_BATCH, math.ceil(examples / 2))
            strategy = FineTuningStrategy(start, blocks, learning_rate=_RATES[start], batch_size=batch)
            updates = min(_UPDATES, strategy.step_of_epoch(_EPOCHS, examples))
            # Every start has the same examples, so that differences are those of the starts.
            adversary = SimulatedAdversary(
                restricted,
                self.task,
                strategy,
                derive_seed(args.seed, draw),
                updates,
                held_out=held_out,
                examples=examples,
            )
            try:
                measured = self.measure(adversary, args.per_device_eval_batch_size)
            except NotApplicableError:
                return math.nan
            found.append(self.task.compute_metric({name: values.tolist() for name, values in measured.items()}))
        if not found:
            return math.nan
        # One process decides for all: a kernel that is not deterministic must not make them choose differently.
        return broadcast_object_list([max(found) if self.task.greater_is_better else min(found)])[0]

    def _evaluate(
        self, model: Callable, adversary: SimulatedAdversary, head: bool = True
    ) -> tuple[Tensor, Callable[[], dict[str, Tensor]]]:
        """Return L_alpha of head and probes on the batch of T_i for the last update, and what gives the scores."""
        batch, weight = self._held_out(adversary)
        with self.probes.watching() if self.probes else nullcontext() as features:
            prediction, target = self._predict(model, batch)
        # Sharded parameters are gathered for their gradient only where it comes through the prediction.
        loss = self.loss(prediction, target) if head else 0 * prediction.sum()
        if self.probes and features is not None:
            loss = loss + self.probes.loss(features, target)
        return weight * loss, lambda: self.task.scores(prediction.detach(), target)

    def _begin(self, strategy: FineTuningStrategy, stream: Stream, updates: int) -> FineTuning:
        return FineTuning(
            self.model,
            self.task,
            strategy,
            stream.batches(strategy.batch_size),
            updates,
            structure=self.structure,
            num_classes=self.num_classes,
            autocast=self.autocast,
        )

    def _predict(self, model: Callable, batch: Batch, batch_statistics: bool = True) -> tuple[Tensor, Tensor]:
        """Return prediction and target in evaluation mode, but for batch norm, which takes the statistics of T_i.

        After a few updates the running statistics are still those of the original domain. An adversary's soon are not,
        so suppressing the model under them would suppress a model that no adversary ends up with.
        """
        batch = to_device(batch, next(self.model.parameters()).device)
        self.model.eval()
        for norm in self._batch_norms:
            norm.training = batch_statistics
        with self.autocast():
            return self.task.predict(model, batch), self.task.target(batch)

    def _held_out(self, adversary: SimulatedAdversary, number: int | None = None) -> tuple[Batch, float]:
        """Return a batch of T_i, and the weight of its mean; with probes every process takes the whole batch.

        A probe is fitted on the whole batch, so the mean over the processes' parts of it would be another loss.
        """
        batch = adversary.held_out_batch(adversary.strategy.batch_size * (2 if self.probes else 1), number)
        return (batch, 1.0) if self.probes else share(batch, self.model)

    @torch.no_grad()
    def _scores_before(self, adversary: SimulatedAdversary) -> dict[str, Tensor]:
        if not adversary.strategy.needs_original_head:
            return {}
        batch, _ = self._held_out(adversary, number=0)
        return self.task.scores(*self._predict(self.model, batch))


def last_evaluated(weights: Sequence[float]) -> int:
    """Return the last step whose weight is not zero; no step after it has to be run."""
    return max((k for k, weight in enumerate(weights, 1) if weight), default=0)


def add_gradients(sums: list[Tensor], gradients: Sequence[Tensor | None], weight: float) -> None:
    """Add weighted gradients to their sums in place; None where a loss does not depend on a parameter."""
    pairs = [(s, g) for s, g in zip(sums, gradients, strict=True) if g is not None]
    if pairs:
        torch._foreach_add_([local(s) for s, _ in pairs], [local(g) for _, g in pairs], alpha=weight)


def simulated_error(task: Task, held_out: Domain) -> float:
    """Return a bound on the standard error of `simulated_metric`; 0 for an MSE, whose spread is unknown."""
    return 0.5 / math.sqrt(min(len(held_out), _MEASURED_EXAMPLES)) if task.greater_is_better else 0.0

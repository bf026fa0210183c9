"""Simulated adversaries: fine-tuning environments (phi_i, R_i, T_i) of section 4.1.1, as live objects."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from sophon_hf.data.batches import Batch, Stream, epoch_order
from sophon_hf.data.domain import Domain
from sophon_hf.finetuning.initialization import Stored
from sophon_hf.finetuning.loop import FineTuning, Update
from sophon_hf.finetuning.preparations import shrink_and_perturb
from sophon_hf.finetuning.strategy import FineTuningStrategy, StrategySpace
from sophon_hf.protection.config import SophonConfig
from sophon_hf.tasks.base import Task
from sophon_hf.utils import derive_seed

_HELD_OUT_SHARE = 0.1

# Starts a fine-tuning of the live model by a strategy, on a stream, for so many updates.
_Begin = Callable[[FineTuningStrategy, Stream, int], FineTuning]


def stratified(order: Tensor, labels: Tensor | None, examples: int | None) -> Tensor:
    """Return the first rows of an order that hold `examples`, with as many of every class as can be.

    Args:
        order: Shape (n,), int64: rows of a domain.
        labels: Shape (domain,), int64; None where there are no classes.
        examples: How many rows to keep; all where None.
    """
    if examples is None or examples >= len(order):
        return order
    if labels is None:
        return order[:examples]
    by_class = order[labels[order].argsort(stable=True)]
    counts = torch.bincount(labels[by_class])
    number = torch.arange(len(order)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    # The first of every class, then the second of every class, and so on.
    return by_class[number.argsort(stable=True)[:examples]]


def held_out_examples(examples: int) -> int:
    """Return how many of a restricted domain's examples T_i has."""
    return max(1, round(_HELD_OUT_SHARE * examples))


class SimulatedAdversary:
    """An adversary that fine-tunes the live model: `resume`, then `step` after `step`, then `suspend`.

    One that starts at theta in every iteration, as in the paper, has a horizon of K updates. One that lives on has a
    longer one, and is suspended between iterations while theta moves. What is kept is how far it has come from theta,
    its own head, its batch-norm statistics and its optimizer's state: about three copies of what it updates. It resumes
    from the theta of then, by as far as it had come.

    Args:
        domain: The restricted domain. R_i and T_i are disjoint parts of it, nine to one.
        task: What is learned.
        strategy: phi_i.
        seed: Decides R_i, T_i, the order of the data, the new head and the dropout.
        updates: Its horizon, in optimizer steps.
        original: The original domain, for a strategy that warms up: half of the updates are made on it.
        held_out: Measure it on this domain in place of T_i.
        examples: How many R_i holds, stratified; all that are not in T_i where None.

    Attributes:
        R: R_i, what it trains on.
        T: T_i, what it is measured on.
        age: Updates made so far.
        fine_tuning: The fine-tuning under way; None before the first step.
        warming_up: Whether the last update was made on original data.

    Raises:
        ValueError: The restricted domain has fewer than two examples, or original data for a warm-up are missing.
    """

    def __init__(
        self,
        domain: Domain,
        task: Task,
        strategy: FineTuningStrategy,
        seed: int,
        updates: int,
        original: Domain | None = None,
        held_out: Domain | None = None,
        examples: int | None = None,
    ):
        if len(domain) < 2:
            raise ValueError("The restricted domain has one example only: R_i and T_i need at least one each.")
        order, count = epoch_order(len(domain), seed, 0), held_out_examples(len(domain))
        self.strategy, self.seed, self.updates = strategy, seed, updates
        rows = stratified(order[count:], domain.labels, examples)
        self.R = Stream(domain, task.collate, derive_seed(seed, "R"), rows)
        if held_out is None:
            self.T = Stream(domain, task.collate, derive_seed(seed, "T"), order[:count])
        else:
            self.T = Stream(held_out, task.collate, seed)
        self.warm_up = None
        if strategy.preparation == "warm_up":
            if original is None:
                raise ValueError("The strategy warms up on original data, and there are none.")
            self.warm_up = Stream(original, task.collate, derive_seed(seed, "warm-up"))
        self.age = 0
        self.fine_tuning: FineTuning | None = None
        self.warming_up = False
        self._life: Iterator[Update] | None = None

    @property
    def finished(self) -> bool:
        """Whether its horizon is reached."""
        return self.age >= self.updates

    def resume(self, model: nn.Module, begin: _Begin) -> None:
        """Make the model, which is theta, this adversary's.

        Args:
            model: Unwrapped; the caller has stored theta.
            begin: Starts a fine-tuning; called at the first step, and after a warm-up.
        """
        if self.fine_tuning is None:
            if self.strategy.preparation == "shrink_and_perturb":
                shrink_and_perturb(model, self.seed)
            self._life = self._live(begin)
        else:
            self._put_back(model)

    def step(self) -> bool:
        """Make the next update of eq. 3; return False where none is left."""
        assert self._life is not None, "call `resume` first"
        return next(self._life, None) is not None

    def held_out_batch(self, size: int, number: int | None = None) -> Batch:
        """Return the batch of T_i that belongs to the last update, or the batch of this number.

        It depends on the number alone, so that steps of weight 0 change nothing for the others. It holds no example
        twice, or a closed-form probe would predict one from its own copy.
        """
        return self.T.distinct_batch(self.age - 1 if number is None else number, size)

    @torch.no_grad()
    def suspend(self, model: nn.Module, theta: Stored) -> None:
        """Store how far it has come from theta; the caller then puts theta back."""
        if self.fine_tuning is None:
            return  # Every weight of its first visit was 0, so it has not started.
        if self.finished:
            self.fine_tuning = self._life = None  # Frees its optimizer's state: memory must not grow with N.
            return
        before = {id(tensor): copy for tensor, copy in zip(theta.tensors, theta.copies, strict=True)}
        own = self.fine_tuning.reinitialized
        self._heads = {name: model.get_submodule(name) for name in theta.heads}
        self._own = {name: p.detach().clone() for name, p in model.named_parameters() if name in own}
        self._moved = {name: p - before[id(p)] for name, p in model.named_parameters() if name not in own}
        self._buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}

    @torch.no_grad()
    def _put_back(self, model: nn.Module) -> None:
        for name, head in self._heads.items():
            model.set_submodule(name, head)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.is_floating_point())
            if name in self._own:
                parameter.copy_(self._own[name])
            else:
                parameter.add_(self._moved[name])
        for name, buffer in model.named_buffers():
            buffer.copy_(self._buffers[name])

    def _live(self, begin: _Begin) -> Iterator[Update]:
        stages = [(self.strategy, self.R, self.updates)]
        if self.warm_up is not None:
            # The head that it warms up with is the model's own; a new one comes with the second half.
            first, second = self.updates // 2, self.updates - self.updates // 2
            stages = [(self.strategy.warm_up, self.warm_up, first), (self.strategy, self.R, second)]
        for strategy, stream, updates in stages:
            self.fine_tuning, self.warming_up = begin(strategy, stream, updates), stream is self.warm_up
            for update in self.fine_tuning:
                self.age += 1
                yield update


class Adversaries:
    """Draws the adversaries of a suppression loop: a function of seed, iteration, loop and process.

    Args:
        restricted: The restricted domain.
        original: The original domain, for those who warm up on it.
        task: What is learned.
        space: Phi.
        args: N, K, l_FTS, num_persistent, horizon and the seed.
        process: Whose adversaries; those of a sharded model are the same on all processes.
    """

    def __init__(
        self, restricted: Domain, original: Domain, task: Task, space: StrategySpace, args: SophonConfig, process: int
    ):
        self.restricted, self.original, self.task, self.space, self.args = restricted, original, task, space, args
        self.process = process
        self._persistent: dict[int, SimulatedAdversary] = {}

    def draw(self, step: int, loop: int) -> list[SimulatedAdversary]:
        """Return the N adversaries of a loop of an iteration."""
        args = self.args
        # Adversaries are numbered over all processes, so 2 processes with N simulate what 1 with 2 N does.
        numbers = range(self.process * args.N, (self.process + 1) * args.N)
        seeds = [derive_seed(args.seed, "adversary", step, loop, n) for n in numbers]
        if not args.num_persistent:
            return [self._adversary(seed, args.K) for seed in seeds]
        turn = (step * args.l_FTS + loop) * args.N
        return [self._in_turn((turn + n) % args.num_persistent, seed) for n, seed in enumerate(seeds)]

    def forget(self) -> None:
        """Forget those that live on: after a roll-back, and at checkpoints, which therefore need not hold them."""
        self._persistent.clear()

    def _adversary(self, seed: int, updates: int) -> SimulatedAdversary:
        strategy = self.space.sample(derive_seed(seed, "strategy"))
        examples = self.space.sample_examples(derive_seed(seed, "examples"))
        return SimulatedAdversary(self.restricted, self.task, strategy, seed, updates, self.original, examples=examples)

    def _in_turn(self, place: int, seed: int) -> SimulatedAdversary:
        adversary = self._persistent.get(place)
        if adversary is None or adversary.finished:
            # The first ones live shorter, so that young and old are always mixed.
            share = (place + 1) / self.args.num_persistent if adversary is None else 1
            adversary = self._adversary(seed, max(self.args.K, round(share * self.args.horizon)))
            self._persistent[place] = adversary
        return adversary

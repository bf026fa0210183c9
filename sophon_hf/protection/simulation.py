"""The adversaries that are simulated: drawn from Phi, and for a persistent one taken up again until its horizon."""

from __future__ import annotations

from sophon_hf.data.batches import derive_seed
from sophon_hf.data.domain import Domain
from sophon_hf.finetuning.strategy import StrategySpace
from sophon_hf.protection.config import SophonConfig
from sophon_hf.protection.environment import Environment, sample_environment
from sophon_hf.protection.persistent import PersistentAdversary
from sophon_hf.tasks.base import Task


class Adversaries:
    """Says which adversaries this process simulates in a suppression loop: a function of seed, step, loop and process.

    Args:
        domain: The restricted domain.
        original: The original domain, for those who warm up on it.
        task: What is learned.
        space: Phi.
        args: N, K, l_FTS, persistent, horizon and the seed.
        shared: Whether all processes simulate the same ones, each on its share of every batch.
    """

    def __init__(
        self, domain: Domain, original: Domain, task: Task, space: StrategySpace, args: SophonConfig, shared: bool
    ):
        self.domain, self.original, self.task, self.space, self.args = domain, original, task, space, args
        self.process = 0 if shared else args.process_index
        self._alive: dict[int, PersistentAdversary] = {}

    def draw(self, step: int, loop: int) -> list[Environment | PersistentAdversary]:
        """The N adversaries of a loop of an iteration."""
        args = self.args
        # Adversaries are numbered over all processes, so 2 processes with N simulate what 1 with 2 N does.
        numbers = range(self.process * args.N, (self.process + 1) * args.N)
        seeds = [derive_seed(args.seed, "adversary", step, loop, n) for n in numbers]
        if not args.num_persistent:
            return [self._environment(seed) for seed in seeds]
        turn = (step * args.l_FTS + loop) * args.N
        return [self._in_turn((turn + n) % args.num_persistent, seed) for n, seed in enumerate(seeds)]

    def start_anew(self) -> None:
        """Forget those that live on."""
        self._alive.clear()

    def _environment(self, seed: int) -> Environment:
        strategy = self.space.sample(derive_seed(seed, "strategy"))
        return sample_environment(self.domain, self.task, strategy, seed, self.original)

    def _in_turn(self, place: int, seed: int) -> PersistentAdversary:
        alive = self._alive.get(place)
        if alive is None or alive.finished:
            # The first ones live shorter, so that young and old are always mixed.
            share = (place + 1) / self.args.num_persistent if alive is None else 1
            updates = max(self.args.K, round(share * self.args.horizon))
            alive = PersistentAdversary(self._environment(seed), updates)
            self._alive[place] = alive
        return alive

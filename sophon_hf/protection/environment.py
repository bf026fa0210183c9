"""Fine-tuning environments (phi_i, R_i, T_i) of section 4.1.1."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sophon_hf.data.batches import Stream, derive_seed, epoch_order
from sophon_hf.data.domain import Domain
from sophon_hf.finetuning.strategy import FineTuningStrategy

if TYPE_CHECKING:
    from sophon_hf.tasks.base import Task


@dataclass(frozen=True)
class Environment:
    """A fine-tuning environment (phi_i, R_i, T_i) of section 4.1.1.

    Attributes:
        strategy: phi_i, what the simulated adversary does.
        fine_tuning: R_i, what it trains on.
        evaluation: T_i, what it is measured on; disjoint from R_i.
        seed: Decides the new head and the dropout of this adversary.
        warm_up: Original data for the first half of its updates, where the strategy warms up.
    """

    strategy: FineTuningStrategy
    fine_tuning: Stream
    evaluation: Stream
    seed: int
    warm_up: Stream | None = None

    def stages(self, updates: int) -> list[tuple[Environment, int]]:
        """What the adversary does one after the other, and for how many of its updates."""
        if self.warm_up is None:
            return [(self, updates)]
        first = replace(self, strategy=self.strategy.warm_up, fine_tuning=self.warm_up, warm_up=None)
        return [(first, updates // 2), (self, updates - updates // 2)]


EVALUATION_SHARE = 0.1


def held_out_examples(examples: int) -> int:
    """How many of a restricted domain's examples T_i has."""
    return max(1, round(EVALUATION_SHARE * examples))


def sample_environment(
    domain: Domain, task: Task, strategy: FineTuningStrategy, seed: int, original: Domain | None = None
) -> Environment:
    """Draw R_i and T_i from the restricted domain: disjoint, nine to one, decided by `seed` alone.

    A strategy that warms up does so on data of `original`.
    """
    if len(domain) < 2:
        raise ValueError("The restricted domain has one example only: R_i and T_i need at least one each.")
    order = epoch_order(len(domain), seed, 0)
    held_out = held_out_examples(len(domain))
    return Environment(
        strategy=strategy,
        fine_tuning=Stream(domain, task, derive_seed(seed, "R"), order[held_out:]),
        evaluation=Stream(domain, task, derive_seed(seed, "T"), order[:held_out]),
        seed=seed,
        warm_up=Stream(original, task, derive_seed(seed, "warm-up")) if strategy.preparation == "warm_up" else None,
    )

"""What fixed simulated adversaries reach: the figure by which the guard compares states while protecting."""

from __future__ import annotations

from dataclasses import replace

from accelerate.utils import broadcast_object_list

from sophon_hf.data import Domain, Stream, derive_seed
from sophon_hf.finetuning import FineTuningStrategy, StrategySpace, sample_environment
from sophon_hf.suppression import Suppression

PROBE_RATE = 1e-3
PROBE_BATCH = 50


def probe(
    suppression: Suppression, space: StrategySpace, restricted: Domain, held_out: Domain, steps: int, seed: int
) -> float:
    """The task's metric on held-out restricted data, over one adversary for each initialization of Phi.

    Args:
        suppression: Runs the adversaries; the model is put back.
        space: Phi.
        restricted: What the adversaries train on.
        held_out: What they are measured on.
        steps: Updates of each (K).
        seed: The same adversaries for the same seed.
    """
    task, scores = suppression.task, {}
    for number, start in enumerate(space.initializations):
        strategy = FineTuningStrategy(initialization=start, learning_rate=PROBE_RATE, batch_size=PROBE_BATCH)
        own_seed = derive_seed(seed, "probe", number)
        environment = sample_environment(restricted, task, strategy, own_seed)
        environment = replace(environment, evaluation=Stream(held_out, task, own_seed))
        for name, values in suppression.measure(environment, steps).items():
            scores.setdefault(name, []).extend(values.tolist())
    # One process decides for all: a kernel that is not deterministic must not make them choose differently.
    return broadcast_object_list([task.compute_metric(scores)])[0]

"""How often the 95 % interval of recovered transfer holds the truth, on synthetic sweeps whose truth is known.

    python benchmarks/interval_coverage.py

A sweep has `--attacks` attacks. Each has a true accuracy on a model, every seed adds noise of its own, and validation
and test split each the noise of their size. Where the protected model is a second copy of the original one the truth is
100 %, and where it is one more model from scratch 0 %. The excess is what choosing the best of so many attacks by the
test split itself would add to the accuracy reported (the winner's curse); choosing by validation data adds only the
luck of seeds that both splits share. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json

import numpy as np

from sophon_hf.attacks.score import AttackSummary, RecoveredTransfer, Scores
from sophon_hf.finetuning.strategy import FineTuningStrategy

ORIGINAL, SCRATCH, ATTACK_SPREAD, SEED_SPREAD = 0.8, 0.6, 0.03, 0.015


def synthetic_sweep(
    truth: float,
    generator: np.random.Generator,
    attacks: int = 20,
    seeds: int = 3,
    test: int = 1000,
    held_out: int = 100,
) -> Scores:
    """Scores of a sweep whose recovered transfer is `truth`, 0 or 1."""
    found = []
    strengths = generator.normal(0, ATTACK_SPREAD, attacks)
    level = {"protected": SCRATCH + truth * (ORIGINAL - SCRATCH), "original": ORIGINAL, "scratch": SCRATCH}
    for model, mean in level.items():
        # The same attacks on every model, but one set of examples for all seeds.
        for number, strength in enumerate(strengths):
            rate = np.clip(mean + strength + generator.normal(0, SEED_SPREAD, seeds), 0.01, 0.99)
            noise = generator.normal(0, np.sqrt(mean * (1 - mean)), 2) / np.sqrt([test, held_out])
            values = tuple(float(value) for value in rate + noise[0])
            strategy = FineTuningStrategy(learning_rate=1e-3 * (1 + number))
            if model == "scratch":
                strategy = strategy.with_changes(initialization="scratch")
            found.append(
                AttackSummary(
                    model,
                    strategy,
                    tuple(range(seeds)),
                    1.0,
                    float(rate.mean() + noise[1]),
                    values,
                    values,
                    float(np.mean(values)),
                )
            )
    return Scores(found, "accuracy", True, test, {}, held_out)


def coverage(truth: float, repetitions: int, seed: int = 0, **sizes: int) -> dict[str, float]:
    """Share of the intervals that hold the truth, their mean width, and what is left of the winner's curse."""
    generator, held, widths, chosen, highest = np.random.default_rng(seed), [], [], [], []
    for _ in range(repetitions):
        scores = synthetic_sweep(truth, generator, **sizes)
        transfer: RecoveredTransfer = scores.recovered_transfer()
        best, top = scores.best("protected"), scores.highest("protected")
        if transfer.interval is None or best is None or top is None or top.highest is None:
            continue
        held.append(transfer.interval[0] <= truth <= transfer.interval[1])
        widths.append(transfer.interval[1] - transfer.interval[0])
        chosen.append(best.mean)
        highest.append(top.highest)
    return {
        "coverage": float(np.mean(held)),
        "width": float(np.mean(widths)),
        "excess": float(np.mean(highest) - np.mean(chosen)),
        "scored": len(held),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=300)
    parser.add_argument("--attacks", type=int, default=20)
    options = parser.parse_args()
    found = {}
    for truth in (1.0, 0.0):
        for seeds in (2, 3, 5):
            name = f"truth {truth:.0%}, {seeds} seeds"
            found[name] = coverage(truth, options.repetitions, attacks=options.attacks, seeds=seeds)
            print(name, {key: round(value, 3) for key, value in found[name].items()}, flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()

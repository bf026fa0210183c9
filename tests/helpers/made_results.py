"""Results of a sweep made by hand, from the figures that a test wants."""

from __future__ import annotations

import math

from sophon_hf import FineTuningStrategy
from sophon_hf.attacks.checks import check
from sophon_hf.attacks.results import AttackResults
from sophon_hf.attacks.run import AttackRun, Curve

A, B = FineTuningStrategy(), FineTuningStrategy("new_head")
# It would break a page, a table and a plot where a name is not escaped.
HOSTILE = FineTuningStrategy(transfer="pattern", pattern=r"<script>alert(1)</script>|&amp;|\frac$|^\s$")
SCRATCH = FineTuningStrategy("scratch")
DISJOINT = {"training": "a", "validation": "b", "test": "c"}


def curve(test, validation=None, **changes) -> Curve:
    """A curve over epochs 0, 1, ... of ten steps each; validation equals test where left out."""
    points = len(test)
    values = {
        "epoch": [float(e) for e in range(points)],
        "step": [10 * e for e in range(points)],
        "test": list(test),
        "validation": list(test if validation is None else validation),
        "loss": [math.nan] + [1.0] * (points - 1),
        "gradient_norm": [math.nan] + [1.0] * (points - 1),
    }
    return Curve(**{**values, **changes})


def runs(model: str, finals, strategy=A, start: float = 0.1) -> list[AttackRun]:
    """One run a seed, which rises from `start` to its final metric at once."""
    return [AttackRun(model, strategy, seed, curve([start, final, final])) for seed, final in enumerate(finals)]


def make_results(protected, original, scratch, **settings) -> AttackResults:
    start = settings.pop("start", 0.1)
    made = [*runs("protected", protected, start=start), *runs("original", original, start=start)]
    made += runs("scratch", scratch, SCRATCH, start)
    defaults = {
        "metric": "accuracy",
        "greater_is_better": True,
        "test_examples": 2000,
        "original_metric": {"original": 0.9, "protected": 0.89},
        "facts": {"seeds": [0, 1, 2], "training_examples": 500, "data": DISJOINT},
    }
    return AttackResults(made, **{**defaults, **settings})


def found(results: AttackResults) -> dict[str, tuple[str, bool]]:
    """The failed checks: name -> message, and whether it voids the score."""
    return {failed.name: (failed.message, failed.voids) for failed in check(results)}

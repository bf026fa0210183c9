"""Checks that doubt the evaluation itself, after AutoAttack's: each names what is wrong, and some void the score."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from sophon_hf.attacks.results import AttackResults
from sophon_hf.attacks.score import Scores, mean_of_finite
from sophon_hf.finetuning.strategy import NO_ORIGINAL_DATA

# In points, or in shares of the error of training from scratch.
_LEARNED = 0.02
_STILL_IMPROVING = 0.01
_MISSED = 0.05
_STANDARD_ERRORS = 3
# Fewer choose by luck: of 20 examples the share that is right has a standard error of 11 points.
_FEWEST_VALIDATION = 20
# What to change to get a score, by the name of the check that voids it.
ADVICE = {
    "too few validation examples": "give the adversary more examples, or leave validation data out.",
    "selection on the test split": "give validation data that are not the test split, or none.",
    "original metric at chance": "see that labels, their order and the preparation of the inputs are those that the "
    "model was trained with, that its own head predicts them, and that the test split has more than one class.",
    "restricted metric at chance": "give the adversary more examples, a test split with more classes, or another "
    "restricted domain.",
    "original domain collapsed": "protect more gently (a smaller alpha, a smaller tolerance, more reinforcement), or "
    "publish an earlier state.",
    "attacks broke off": "run the suite again, which tries them again; else mend what the errors name, or leave these "
    "attacks out on every model.",
    "no transfer to score": "take a pair with more transfer from the original model, or give the adversary fewer "
    "examples, so that scratch reaches less; more seeds and a larger test split lower what is needed.",
    "attacks missing": "let an attack on the protected model, one on the original and one from scratch end with finite "
    "figures: see the runs that failed.",
}


@dataclass(frozen=True)
class FailedCheck:
    """A reason to doubt a result.

    Attributes:
        name: Short.
        message: What was found, with figures.
        voids: Whether no score may be given.
    """

    name: str
    message: str
    voids: bool = False


def check(results: AttackResults) -> list[FailedCheck]:
    """Return all failed checks of a sweep; an empty list means that nothing was found wrong."""
    scores = results.scores()
    return [
        *_failed_runs(results),
        *_without_original_data(results),
        *_too_few_seeds(results, scores),
        *_broken_attacks(results, scores),
        *_still_improving(results, scores),
        *_gradients(results),
        *check_scores(scores),
        *_what_was_given(results.facts),
    ]


def check_scores(scores: Scores) -> list[FailedCheck]:
    """Return the failed checks that need no curve: also the summaries in a claim can be checked by them."""
    found = list(_at_chance(scores))
    lost = [
        f"{len(attack.seeds) - len(kept)} of {len(attack.seeds)} of {attack.name} on {attack.model}"
        for attack in scores.attacks
        # Where no epoch could be chosen, no seed counts.
        if len(kept := attack.finite if attack.epoch is not None else ()) < len(attack.seeds)
    ]
    if lost:
        found.append(FailedCheck("seeds that are not finite", "left out of the means: " + "; ".join(lost)))
    found += _stronger_not_chosen(scores)
    if not {"original", "protected"} <= set(scores.original_metric):
        found.append(FailedCheck("intactness not measured", "no test split of the original domain was given"))
    strongest = [scores.best(model) for model in ("protected", "original", "scratch")]
    missing = any(best is None or not best.finite for best in strongest)
    for name, reason in (
        ("original domain collapsed", scores.collapsed()),
        ("attacks broke off", scores.broken_off()),
        ("attacks missing" if missing else "no transfer to score", scores.recovered_transfer().void),
    ):
        # The score is void for the first two reasons too, and says so in the same words.
        if reason is not None and reason not in [failed.message for failed in found]:
            found.append(FailedCheck(name, reason, voids=True))
    return found


def void_reason(failed: Iterable[FailedCheck]) -> str | None:
    """Return the message of the first failed check that voids the score, or None."""
    return next((check.message for check in failed if check.voids), None)


def _stronger_not_chosen(scores: Scores) -> Iterator[FailedCheck]:
    chosen, highest = scores.best("protected"), scores.highest("protected")
    if chosen is None or highest is None or highest.highest is None:
        return
    # Written so that NaN is missed too.
    if not scores.sign * (highest.highest - chosen.mean) <= _MISSED * scores.scale:
        message = (
            f"{highest.name} reached {scores.figure(highest.highest)} on the test split, {chosen.name}, which was "
            f"chosen, {scores.figure(chosen.mean)}: more validation examples or seeds would choose better"
        )
        yield FailedCheck("a stronger attack was not chosen", message)


def _at_chance(scores: Scores) -> Iterator[FailedCheck]:
    """Find a domain in which the unprotected model is no better than a guess: no attack and no protection moves it."""
    best = scores.best("original")
    strongest = None if best is None else best.mean
    intact = scores.original_metric.get("original")
    for domain, reached, count, whose in (
        ("original", intact, scores.original_examples, "the original model"),
        ("restricted", strongest, scores.test_examples, "the best attack on the original model"),
    ):
        chance = scores.chance.get(domain)
        if chance is None or reached is None or not count:
            continue
        least = _LEARNED * abs(chance)
        if scores.greater_is_better:
            least = _STANDARD_ERRORS * np.sqrt(max(chance * (1 - chance), 0) / count)
        # Written so that NaN is no better than a guess, nor is a metric that no answer can better.
        if not scores.sign * (reached - chance) > least:
            message = (
                f"{whose} reaches {scores.metric} {scores.figure(reached)} on the {domain} test split, where the best "
                f"answer that looks at no input has {scores.figure(chance)}"
            )
            yield FailedCheck(f"{domain} metric at chance", message, voids=True)


def _failed_runs(results: AttackResults) -> Iterator[FailedCheck]:
    if failed := [run for run in results.runs if run.failed]:
        first = f"{failed[0].strategy.name} on {failed[0].model}: {failed[0].error}"
        yield FailedCheck("runs failed", f"{len(failed)} of {len(results.runs)}; the first, {first}")


def _without_original_data(results: AttackResults) -> Iterator[FailedCheck]:
    if count := len({run.strategy for run in results.runs if run.error == NO_ORIGINAL_DATA}):
        message = (
            f"attacks that learn from original data had none ({count} of the sweep): give `original_dataset` "
            "(`--original` of `sophon-hf attack`)"
        )
        yield FailedCheck("attacks on original data left out", message)


def _too_few_seeds(results: AttackResults, scores: Scores) -> Iterator[FailedCheck]:
    asked = len(results.facts.get("seeds", []))
    for model in ("protected", "original", "scratch"):
        best = scores.best(model)
        if best is not None and len(best.finite) < max(asked, 3):
            message = f"the best attack on {model} has {len(best.finite)} seeds, asked were {asked}, 3 are usual"
            yield FailedCheck("few seeds", message)


def _broken_attacks(results: AttackResults, scores: Scores) -> Iterator[FailedCheck]:
    names, least = [], _LEARNED * scores.scale
    for strategy, curves in results.curves("original").items():
        if len(curves[0].test) < 2:
            continue  # A single point, such as that of a kernel regression, tells of no learning.
        gain = mean_of_finite([scores.sign * (curve.test[-1] - curve.test[0]) for curve in curves])
        # Written so that NaN has learned nothing too.
        if not gain > least:
            names.append(strategy.name)
    if names:
        message = "no evidence of resistance: " + "; ".join(names)
        yield FailedCheck("attack learns nothing on the original model", message)


def _still_improving(results: AttackResults, scores: Scores) -> Iterator[FailedCheck]:
    best = scores.best("protected")
    if best is None:
        return
    mean = scores.sign * mean_of_finite([curve.test for curve in results.curves("protected")[best.strategy]])
    if len(mean) > 1 and mean[-1] - mean[-2] > _STILL_IMPROVING * scores.scale:
        moved = f"{'rose' if scores.greater_is_better else 'fell'} by {scores.figure(mean[-1] - mean[-2])}"
        message = f"the {scores.metric} of {best.name} {moved} between the last two points: give it more epochs"
        yield FailedCheck("still improving at the last epoch", message)


def _gradients(results: AttackResults) -> Iterator[FailedCheck]:
    bad: dict[str, None] = {}
    for run in results.runs:
        if run.curve is None:
            continue
        # The first point lies before the first gradient.
        norms, losses = np.array(run.curve.gradient_norm[1:]), np.array(run.curve.loss[1:])
        if not np.isfinite(norms).all() or not np.isfinite(losses).all():
            bad[f"non-finite: {run.strategy.name} on {run.model}"] = None
        elif len(norms) and (norms == 0).all():
            bad[f"zero: {run.strategy.name} on {run.model}"] = None
    if bad:
        yield FailedCheck("zero or non-finite gradients", "; ".join(bad))


def _what_was_given(facts: dict[str, Any]) -> Iterator[FailedCheck]:
    examples, data, weights = (facts.get(name) for name in ("validation_examples", "data", "weights"))
    if examples is not None and examples < _FEWEST_VALIDATION:
        message = (
            f"attacks were chosen by {examples} examples, where {_FEWEST_VALIDATION} are needed: give so many, or "
            "leave validation data out and give the adversary so many, which then choose by cross-validation"
        )
        yield FailedCheck("too few validation examples", message, voids=True)
    if data and data.get("validation") == data.get("test"):
        yield FailedCheck("selection on the test split", "attacks were chosen on the split that reports", voids=True)
    if weights and weights.get("protected") == weights.get("original"):
        message = "the protected and the original model hold the same parameters: is one of them named twice?"
        yield FailedCheck("one model", message)

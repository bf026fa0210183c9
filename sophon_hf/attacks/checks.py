"""Checks that doubt the evaluation itself, after AutoAttack's: each names what is wrong, and some void the score."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sophon_hf.attacks.results import AttackResults
from sophon_hf.attacks.score import mean_of_finite
from sophon_hf.finetuning.preparations import NO_ORIGINAL_DATA

LEARNED = 0.02
STILL_RISING = 0.01


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
    """All failed checks of a sweep; an empty list means that nothing was found wrong."""
    found = [
        *_failed_cells(results),
        *_warm_ups_left_out(results),
        *_too_few_seeds(results),
        *_seeds_not_finite(results),
        *_broken_attacks(results),
        *_still_rising(results),
        *_gradients(results),
        *_original_collapsed(results),
        *_broken_off(results),
    ]
    transfer = results.recovered_transfer()
    # A check of its own may have said it.
    if transfer.void is not None and transfer.void not in [failed.message for failed in found]:
        found.append(FailedCheck("no transfer to score", transfer.void, voids=True))
    data = results.facts.get("data", {})
    if data and data.get("validation") == data.get("test"):
        found.append(
            FailedCheck("selection on the test split", "attacks were chosen on the split that reports", voids=True)
        )
    return found


def _sign(results: AttackResults) -> int:
    return 1 if results.greater_is_better else -1


def _scale(results: AttackResults) -> float:
    """Thresholds are points of accuracy; for MSE they are shares of scratch's."""
    scratch = results.best("scratch")
    return 1.0 if results.metric == "accuracy" or scratch is None else abs(scratch.mean)


def _failed_cells(results: AttackResults) -> list[FailedCheck]:
    failed = [cell for cell in results.cells if cell.failed]
    if not failed:
        return []
    first = failed[0]
    return [
        FailedCheck(
            "cells failed",
            f"{len(failed)} of {len(results.cells)}; the first, {first.strategy.name} on {first.model}: {first.error}",
        )
    ]


def _warm_ups_left_out(results: AttackResults) -> list[FailedCheck]:
    count = len({cell.strategy for cell in results.cells if cell.error == NO_ORIGINAL_DATA})
    if not count:
        return []
    return [
        FailedCheck(
            "warm-ups left out",
            f"attacks that warm up on original data had none ({count} of the sweep): give `original_dataset` (`--original_data` of "
            "`sophon-hf attack`)",
        )
    ]


def _too_few_seeds(results: AttackResults) -> list[FailedCheck]:
    asked = len(results.facts.get("seeds", []))
    found = []
    for model in ("protected", "original", "scratch"):
        best = results.best(model)
        if best is not None and len(best.test) < max(asked, 3):
            found.append(
                FailedCheck(
                    "few seeds",
                    f"the best attack on {model} has {len(best.test)} seeds, asked were {asked}, 3 are usual",
                )
            )
    return found


def _seeds_not_finite(results: AttackResults) -> list[FailedCheck]:
    found = []
    for model in dict.fromkeys(cell.model for cell in results.cells):
        stopped = results.stopped(model)
        for strategy, cells in results.by_strategy(model):
            lost = len(cells) - (len(stopped[strategy].test) if strategy in stopped else 0)
            if lost:
                found.append(f"{lost} of {len(cells)} of {strategy.name} on {model}")
    return [FailedCheck("seeds that are not finite", "left out of the means: " + "; ".join(found))] if found else []


def _broken_attacks(results: AttackResults) -> list[FailedCheck]:
    names, least = [], LEARNED * _scale(results)
    for strategy, cells in results.by_strategy("original"):
        gain = mean_of_finite([_sign(results) * (cell.curve.test[-1] - cell.curve.test[0]) for cell in cells])
        if not gain > least:
            names.append(strategy.name)
    if not names:
        return []
    return [
        FailedCheck("attack learns nothing on the original model", "no evidence of resistance: " + "; ".join(names))
    ]


def _still_rising(results: AttackResults) -> list[FailedCheck]:
    best = results.best("protected")
    if best is None:
        return []
    cells = [cell for cell in results.of("protected") if cell.strategy == best.strategy]
    mean = _sign(results) * mean_of_finite([cell.curve.test for cell in cells])
    if len(mean) < 2 or not mean[-1] - mean[-2] > STILL_RISING * _scale(results):
        return []
    return [
        FailedCheck(
            "still rising at the last epoch",
            f"{best.strategy.name} gained {abs(mean[-1] - mean[-2]):.3f} between the last two points: give it more epochs",
        )
    ]


def _gradients(results: AttackResults) -> list[FailedCheck]:
    bad = []
    for cell in results.cells:
        if cell.curve is None:
            continue
        norms, losses = np.array(cell.curve.gradient_norm[1:]), np.array(cell.curve.loss[1:])
        if not np.isfinite(norms).all() or not np.isfinite(losses).all():
            bad.append(f"non-finite: {cell.strategy.name} on {cell.model}")
        elif len(norms) and (norms == 0).all():
            bad.append(f"zero: {cell.strategy.name} on {cell.model}")
    bad = list(dict.fromkeys(bad))
    return [FailedCheck("zero or non-finite gradients", "; ".join(bad))] if bad else []


def _original_collapsed(results: AttackResults) -> list[FailedCheck]:
    if not {"original", "protected"} <= set(results.original_metric):
        return [FailedCheck("intactness not measured", "no test split of the original domain was given")]
    reason = results.collapsed()
    return [] if reason is None else [FailedCheck("original domain collapsed", reason, voids=True)]


def _broken_off(results: AttackResults) -> list[FailedCheck]:
    reason = results.broken_off()
    return [] if reason is None else [FailedCheck("attacks broke off", reason, voids=True)]

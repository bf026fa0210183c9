"""The interval of recovered transfer holds the truth about as often as it says, on sweeps whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from interval_coverage import ATTACK_SPREAD, ORIGINAL, coverage, synthetic_sweep
from made_results import make_results, runs

from sophon_hf import FineTuningStrategy
from sophon_hf.attacks.report import write_report
from sophon_hf.attacks.score import AttackSummary, Scores


@pytest.mark.parametrize("truth", [1.0, 0.0])
def test_about_95_of_100_intervals_hold_the_truth(truth):
    found = coverage(truth, 60, attacks=12)
    assert found["scored"] > 50
    assert 0.88 <= found["coverage"] <= 1 and found["width"] < 1.2


def test_few_validation_examples_widen_the_interval():
    assert coverage(1.0, 20, held_out=20)["width"] > 1.1 * coverage(1.0, 20, held_out=400)["width"]


def test_the_best_of_the_test_split_is_too_good_by_luck():
    assert coverage(1.0, 25)["excess"] > 0.01


def test_the_winner_s_curse_is_as_large_as_told():
    """Over sweeps whose truth is known, the figures exceed it by what each sweep tells of itself."""
    found, told = [], []
    for seed in range(120):
        scores = synthetic_sweep(1.0, np.random.default_rng(seed), attacks=12, test=400)
        strengths = np.random.default_rng(seed).normal(0, ATTACK_SPREAD, 12)
        attacks = [attack.strategy for attack in scores.attacks if attack.model == "protected"]
        worth = dict(zip(attacks, ORIGINAL + strengths, strict=True))
        chosen, highest = scores.best("protected"), scores.highest("protected")
        found.append((chosen.mean - worth[chosen.strategy], highest.highest - worth[highest.strategy]))
        told.append(scores.optimism("protected"))
    # Four standard errors of the mean of the 120.
    np.testing.assert_allclose(np.mean(told, axis=0), np.mean(found, axis=0), rtol=0, atol=0.006)
    assert np.mean(told, axis=0)[1] > 0.015


def test_the_winner_s_curse_of_one_seed_is_not_known():
    assert synthetic_sweep(1.0, np.random.default_rng(0), seeds=1).optimism("protected") is None
    assert synthetic_sweep(1.0, np.random.default_rng(0), attacks=1).optimism("protected") is None


# How many attacks are enough.


def attacks_of(validation: list[float], test: list[float], metric: str = "accuracy") -> Scores:
    strategies = [FineTuningStrategy(learning_rate=1e-3 * (1 + number)) for number in range(len(test))]
    summaries = [
        AttackSummary("protected", strategy, (0, 1), 1.0, chosen_by, (reached, reached), (reached, reached))
        for strategy, chosen_by, reached in zip(strategies, validation, test, strict=True)
    ]
    return Scores(summaries, metric, metric == "accuracy", 1000)


def test_the_curve_of_the_best_attack_is_that_of_random_orders():
    test = [0.1, 0.2, 0.3, 0.4]
    reached = attacks_of(test, test).best_by_number("protected")
    assert (np.diff(reached, axis=1) >= 0).all() and (reached[:, -1] == 0.4).all()
    # The expected maximum of k of 1, 2, 3, 4 without replacement is 5 k / (k + 1).
    expected = [0.1 * 5 * k / (k + 1) for k in range(1, 5)]
    np.testing.assert_allclose(reached.mean(axis=0), expected, rtol=0, atol=0.03)
    lower = attacks_of(test, test, "mse").best_by_number("protected")
    assert (lower[:, -1] == 0.1).all() and (np.diff(lower, axis=1) <= 0).all()


def test_the_best_is_chosen_by_validation_data():
    reached = attacks_of([0.9, 0.1, 0.2], [0.3, 0.8, 0.5]).best_by_number("protected")
    assert (reached[:, -1] == 0.3).all() and reached[:, 0].max() == 0.8


def test_a_curve_that_still_rises_is_told_from_one_that_has_flattened():
    rising = attacks_of(steps := [0.1 * k for k in range(1, 9)], steps)
    gain, error = rising.last_quarter("protected")
    # 0.9 (8 / 9 - 6 / 7): the expected maximum of all eight and of six.
    assert gain == pytest.approx(0.9 * (8 / 9 - 6 / 7), abs=0.015)
    assert error == pytest.approx((0.8 * 0.2 / 1000) ** 0.5) and gain > error
    flat = attacks_of([0.8] * 8, [0.8] * 8)
    assert flat.last_quarter("protected")[0] == 0
    assert attacks_of(steps[:7], steps[:7]).last_quarter("protected") is None
    assert attacks_of([-s for s in steps], [1 - s for s in steps], "mse").last_quarter("protected")[0] > 0.01


def test_the_report_says_whether_more_attacks_would_be_stronger(tmp_path):
    results = make_results([0.7, 0.72, 0.74], [0.9] * 3, [0.6] * 3, test_examples=20000)
    for number in range(1, 8):
        strategy = FineTuningStrategy(learning_rate=1e-4 * number)
        results.runs += runs("protected", [0.08 * number - 0.01, 0.08 * number, 0.08 * number + 0.01], strategy)
        results.runs += runs("original", [0.9] * 3, strategy)
    summary = write_report(results, tmp_path)
    for name in ("index.html", "report.md"):
        text = (tmp_path / name).read_text()
        assert "the curve of the best attack has not flattened, and more attacks" in text
        assert text.count("the curve of the best attack has flattened") == 1
        assert "As the strongest of many, the chosen figure is expected to be 0.00" in text
    assert set(summary["best"]["protected"]["last_quarter"]) == {"gain", "error"}
    assert set(summary["best"]["protected"]["optimism"]) == {"chosen", "highest"}


def test_the_interval_of_one_sweep_is_always_the_same():
    scores = synthetic_sweep(1.0, np.random.default_rng(0))
    assert scores.recovered_transfer() == scores.recovered_transfer()

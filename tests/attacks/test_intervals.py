"""The interval of recovered transfer holds the truth about as often as it says, on sweeps whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from interval_coverage import coverage, synthetic_sweep


@pytest.mark.parametrize("truth", [1.0, 0.0])
def test_about_95_of_100_intervals_hold_the_truth(truth):
    found = coverage(truth, 60, attacks=12)
    assert found["scored"] > 50
    assert 0.88 <= found["coverage"] <= 1 and found["width"] < 1.2


def test_few_validation_examples_widen_the_interval():
    assert coverage(1.0, 20, held_out=20)["width"] > 1.1 * coverage(1.0, 20, held_out=400)["width"]


def test_the_best_of_the_test_split_is_too_good_by_luck():
    assert coverage(1.0, 25)["excess"] > 0.01


def test_the_interval_of_one_sweep_is_always_the_same():
    scores = synthetic_sweep(1.0, np.random.default_rng(0))
    assert scores.recovered_transfer() == scores.recovered_transfer()

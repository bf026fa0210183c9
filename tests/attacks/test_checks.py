"""Attacks that broke off or diverged, and models that lost the original domain: none of them passes for resistance."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from made_results import A, B, found, make_results, runs
from points import TinyNet, make_points

from sophon_hf import AttackSuite, FineTuningStrategy
from sophon_hf.attacks.report import write_report
from sophon_hf.attacks.results import AttackResults
from sophon_hf.attacks.run import AttackRun
from sophon_hf.attacks.score import RecoveredTransfer, mean_of_finite
from sophon_hf.auditing.verdicts import judge_consistency
from sophon_hf.data.fingerprint import DataFingerprint
from sophon_hf.hub.card import make_card
from sophon_hf.hub.claim import AttackReport


@pytest.fixture
def clean() -> AttackResults:
    return make_results([0.7] * 3, [0.9] * 3, [0.6] * 3)


def broken(model: str, **settings) -> list[AttackRun]:
    return [AttackRun(model, B, seed, error="RuntimeError: boom", **settings) for seed in range(3)]


# Attacks that broke off.


def test_an_attack_that_broke_off_on_the_protected_model_only_voids(clean):
    clean.runs += [*runs("original", [0.9] * 3, B), *broken("protected")]
    message, voids = found(clean)["attacks broke off"]
    assert voids and message.endswith(f": {B.name}") and A.name not in message.split("; ")
    assert "no transfer to score" not in found(clean), "one reason is said once"
    assert clean.recovered_transfer().void == message
    assert clean.recovered_transfer([A]).value == pytest.approx(1 / 3), "it is not among these"


def test_one_model_under_two_names_is_told(clean):
    clean.facts["weights"] = {"protected": "a", "original": "b"}
    assert "one model" not in found(clean)
    clean.facts["weights"]["original"] = "a"
    assert found(clean)["one model"] == (
        "the protected and the original model hold the same parameters: is one of them named twice?",
        False,
    )


def test_a_seed_that_ended_on_the_protected_model_is_a_result(clean):
    clean.runs += [*runs("original", [0.9] * 3, B), *broken("protected")[1:], *runs("protected", [0.7], B)]
    assert clean.recovered_transfer().void is None and not found(clean)["runs failed"][1]


@pytest.mark.parametrize(
    "more",
    [
        # No attack that was ever compared.
        [*broken("protected"), *broken("original")],
        # No attack at all on such a model.
        [*broken("protected", applicable=False), *broken("original", applicable=False)],
        [*broken("protected", applicable=False), *runs("original", [0.9] * 3, B)],
    ],
    ids=["on both", "not applicable", "not applicable to one"],
)
def test_what_is_not_hidden_by_a_failure_on_the_protected_model_does_not_void(clean, more):
    clean.runs += more
    assert clean.recovered_transfer().value == pytest.approx(1 / 3)
    assert not any(voids for _, voids in found(clean).values())


def test_another_model_is_scored_by_its_own_attacks(clean):
    clean.runs += [*runs("original", [0.9] * 3, B), *broken("protected"), *runs("ntl", [0.8] * 3)]
    assert clean.recovered_transfer(model="ntl").value == pytest.approx(2 / 3)
    clean.runs += broken("ntl")
    assert "broke off with every seed on ntl" in clean.recovered_transfer(model="ntl").void


def test_a_claim_of_a_score_that_its_broken_attacks_void_contradicts_itself(truth):
    claim = truth["claim"]
    assert judge_consistency(claim) is None
    first = next(a for a in claim.attacks.attacks if a.model == "protected")
    gone = replace(first, seeds=(), test=(), final=(), epoch=None, validation=None, failed=3)
    attacks = [gone if attack is first else attack for attack in claim.attacks.attacks]
    score = RecoveredTransfer(0.1, (0.0, 0.2))
    report = replace(claim.attacks, attacks=attacks, recovered_transfer=score)
    assert f"every seed on protected, where they might have been the strongest: {first.name}" in judge_consistency(
        replace(claim, attacks=report)
    )


# Models that lost the original domain.


@pytest.mark.parametrize("after, void", [(0.81, False), (0.79, True), (0.11, True), (math.nan, True)])
def test_a_broken_model_has_no_score(clean, after, void):
    clean.original_metric["protected"] = after
    transfer = clean.recovered_transfer()
    assert (transfer.value is None) == void
    if void:
        assert transfer.void == found(clean)["original domain collapsed"][0] and f"{after:.3f} after" in transfer.void
        assert "no transfer to score" not in found(clean)


def test_each_model_is_judged_by_its_own_original_metric(clean):
    clean.runs += runs("ntl", [0.8] * 3)
    clean.original_metric |= {"protected": 0.11, "ntl": 0.88}
    assert clean.recovered_transfer(model="ntl").value == pytest.approx(2 / 3)
    del clean.original_metric["original"]
    assert clean.recovered_transfer().void is None, "what was not measured is told, and voids nothing"


def test_an_error_of_nothing_has_collapsed_once_there_is_one():
    results = make_results([0.05] * 3, [0.02] * 3, [0.08] * 3, metric="mse", greater_is_better=False, start=1.0)
    results.original_metric = {"original": 0.0, "protected": 0.01}
    assert results.recovered_transfer().value is None


# Seeds that diverged.


@pytest.fixture
def diverged() -> AttackResults:
    """An MSE, where one of three seeds of the strongest attack on the protected model has no number at the end."""
    error = {"metric": "mse", "greater_is_better": False, "start": 1.0}
    results = make_results([0.04, 0.05, 0.06], [0.02] * 3, [0.08] * 3, **error)
    results.runs += runs("protected", [0.07] * 3, B, start=1.0)
    first = results.of("protected")[0].curve
    first.test, first.validation = [1.0, math.nan, math.inf], [1.0, math.inf, math.nan]
    return results


@pytest.mark.filterwarnings("error")
def test_a_seed_that_diverged_does_not_hide_the_others(diverged, tmp_path):
    best = diverged.best("protected")
    assert best.strategy == A and best.test == (None, 0.05, 0.06) and best.finite == (0.05, 0.06)
    assert (best.mean, best.sd) == (pytest.approx(0.055), pytest.approx(np.std([0.05, 0.06], ddof=1)))
    assert best.standard_error == pytest.approx(best.sd / math.sqrt(2))
    transfer = diverged.recovered_transfer()
    assert transfer.value == pytest.approx((0.08 - 0.055) / 0.06)
    assert transfer.interval[0] < transfer.value < transfer.interval[1]
    assert diverged.cost_to_recover()["steps"] == 10
    message, voids = found(diverged)["seeds that are not finite"]
    assert message == f"left out of the means: 1 of 3 of {A.name} on protected" and not voids
    assert "few seeds" in found(diverged) and "still improving at the last epoch" not in found(diverged)
    write_report(diverged, tmp_path)
    assert "| 0.0550 ±0.0071 (2 of 3) |" in (tmp_path / "report.md").read_text()


def test_results_that_were_saved_and_claimed_keep_what_diverged_out_of_the_means(diverged, tmp_path, truth):
    diverged.save(tmp_path / "results.json")
    loaded, report = AttackResults.load(tmp_path / "results.json"), AttackReport.from_results(diverged)
    assert loaded.best("protected") == diverged.best("protected")
    claim = replace(truth["claim"], attacks=report, metric="mse", greater_is_better=False)
    figures = claim.scores.best("protected")
    assert figures == diverged.best("protected") and figures.test == (None, 0.05, 0.06)
    assert "0.055 ± 0.007071 (2 of 3 seeds are finite)" in str(make_card(tmp_path, claim, "alice/model"))


@pytest.mark.filterwarnings("error")
def test_an_attack_of_which_no_seed_is_finite_is_told_and_never_chosen(diverged):
    for run in diverged.of("protected"):
        if run.strategy == A:
            run.curve.test = run.curve.validation = [math.nan] * 3
    assert diverged.best("protected").strategy == B
    assert f"3 of 3 of {A.name} on protected" in found(diverged)["seeds that are not finite"][0]


@pytest.mark.filterwarnings("error")
def test_a_best_attack_without_a_finite_test_metric_voids(clean):
    for run in clean.of("protected"):
        run.curve.test = [0.1, math.nan, math.nan]
    assert clean.best("protected").finite == () and math.isnan(clean.best("protected").mean)
    assert f"{A.name}, is finite on the test split" in clean.recovered_transfer().void


@pytest.mark.filterwarnings("error")
def test_means_of_what_is_finite():
    nan, inf = math.nan, math.inf
    np.testing.assert_equal(mean_of_finite([[1.0, nan, nan, inf], [3.0, 5.0, nan, 2.0]]), [2.0, 5.0, nan, 2.0])
    assert mean_of_finite([1.0, nan, 2.0]) == 1.5 and math.isnan(mean_of_finite([]))


# Metrics that mean nothing.


def with_chance(results: AttackResults, original: float, restricted: float, examples: int = 400) -> AttackResults:
    results.facts["chance"] = {"original": original, "restricted": restricted}
    results.facts["fingerprints"] = {"original_test": vars(DataFingerprint(None, None, None, "0" * 64, examples))}
    return results


@pytest.mark.parametrize(
    "reached, chance, at_chance",
    # Three standard errors of 400 examples at 0.5 are 0.075; a test split with one class has chance 1.
    [
        (0.9, 0.5, False),
        (0.58, 0.5, False),
        (0.57, 0.5, True),
        (0.1, 0.5, True),
        (1.0, 1.0, True),
        (math.nan, 0.1, True),
    ],
)
def test_an_original_domain_at_chance_voids(clean, reached, chance, at_chance, tmp_path):
    clean.original_metric = {"original": reached, "protected": reached}
    results = with_chance(clean, chance, 0.1)
    assert ("original metric at chance" in found(results)) == at_chance
    if at_chance:
        message, voids = found(results)["original metric at chance"]
        assert voids and f"{chance:.3f}" in message and f"{reached:.3f} on the original test split" in message
        assert write_report(results, tmp_path)["recovered_transfer"] is None
        assert AttackReport.from_results(results).recovered_transfer.value is None


def test_a_restricted_domain_at_chance_voids(clean):
    message, voids = found(with_chance(clean, 0.1, 0.89))["restricted metric at chance"]
    assert voids and "the best attack on the original model reaches accuracy 0.900 on the restricted" in message
    assert found(with_chance(clean, 0.1, 0.85)) == {}


def test_an_error_at_chance_voids():
    settings = {"metric": "mse", "greater_is_better": False, "start": 1.0}
    results = make_results([0.05] * 3, [0.02] * 3, [0.08] * 3, **settings)
    results.original_metric = {"original": 0.99, "protected": 0.99}
    assert list(found(with_chance(results, 1.0, 1.0))) == ["original metric at chance"]
    results.original_metric = {"original": 0.9, "protected": 0.9}
    assert found(results) == {}


@pytest.mark.parametrize("labels, chance", [([0, 1, 2, 2], 0.5), ([1, 1, 1, 1], 1.0)])
def test_the_suite_tells_what_a_guess_reaches(tmp_path, labels, chance):
    points = make_points(1)
    test = points.select(range(100, 104)).remove_columns("label").add_column("label", labels)
    arguments = {
        "protected": TinyNet(),
        "original": TinyNet(),
        "restricted_dataset": points.select(range(60)),
        "eval_dataset": points.select(range(60, 90)),
    }
    suite = AttackSuite([FineTuningStrategy(epochs=1)], tmp_path, seeds=[0])
    results = suite.run(**arguments, original_eval_dataset=test)
    assert results.facts["chance"]["original"] == chance
    common = max(map(points["label"][60:90].count, range(3))) / 30
    assert results.facts["chance"]["restricted"] == pytest.approx(common)

"""Recovered transfer against curves made by hand, and the checks that doubt a result."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
from made_results import DISJOINT, SCRATCH, A, B, curve, found, make_results, runs

from sophon_hf.attacks.checks import check
from sophon_hf.attacks.report import write_report
from sophon_hf.attacks.results import AttackResults
from sophon_hf.attacks.run import AttackRun
from sophon_hf.hub.claim import AttackReport
from sophon_hf.utils import write_atomically


def test_results_with_infinities_are_saved_and_read_as_not_a_number(tmp_path):
    results = make_results([0.7] * 3, [0.9] * 3, [0.6] * 3)
    results.runs[0].curve.loss[2], results.runs[1].curve.test[0] = math.inf, -math.inf
    results.original_metric = {"original": math.inf, "protected": math.nan}
    results.benign = {"protected": math.inf, "original": 0.1, "scratch": math.nan, "difference": math.nan}
    results.save(tmp_path / "results.json")
    assert not {"NaN", "Infinity"} & set(re.findall("[A-Z][A-Za-z]+", (tmp_path / "results.json").read_text()))
    loaded = AttackResults.load(tmp_path / "results.json")
    assert math.isnan(loaded.runs[0].curve.loss[2]) and math.isnan(loaded.runs[1].curve.test[0])
    assert loaded.runs[2].curve.test == results.runs[2].curve.test
    assert all(map(math.isnan, loaded.original_metric.values()))
    assert loaded.benign["original"] == 0.1 and math.isnan(loaded.benign["protected"])
    assert "original domain collapsed" in [found.name for found in check(loaded)]


# Recovered transfer.


@pytest.mark.parametrize("protected, expected", [(0.9, 1.0), (0.6, 0.0), (0.75, 0.5), (0.45, -0.5), (0.96, 1.2)])
def test_recovered_transfer(protected, expected):
    transfer = make_results([protected] * 3, [0.9] * 3, [0.6] * 3).recovered_transfer()
    assert transfer.value == pytest.approx(expected) and transfer.void is None


def test_it_is_made_of_means_over_seeds():
    transfer = make_results([0.70, 0.76, 0.79], [0.88, 0.9, 0.92], [0.58, 0.6, 0.62]).recovered_transfer()
    assert transfer.value == pytest.approx((0.75 - 0.6) / 0.3)


@pytest.mark.parametrize("protected, expected", [(0.02, 1.0), (0.08, 0.0), (0.05, 0.5), (0.11, -0.5)])
def test_signs_turn_for_an_error(protected, expected):
    results = make_results([protected] * 3, [0.02] * 3, [0.08] * 3, metric="mse", greater_is_better=False, start=1.0)
    assert results.recovered_transfer().value == pytest.approx(expected)


@pytest.mark.parametrize(
    "original, scratch, settings, void",
    [
        (0.629, 0.6, {"test_examples": 10**9}, True),
        (0.631, 0.6, {"test_examples": 10**9}, False),
        (0.5, 0.6, {}, True),
        # Three standard errors of two accuracies near 0.6 on 200 examples are 14.6 points.
        (0.73, 0.6, {"test_examples": 200}, True),
        (0.76, 0.6, {"test_examples": 200}, False),
        # Three hundredths of scratch's error.
        (0.0971, 0.1, {"metric": "mse", "greater_is_better": False, "start": 1.0}, True),
        (0.0969, 0.1, {"metric": "mse", "greater_is_better": False, "start": 1.0}, False),
        (math.nan, 0.6, {}, True),
    ],
)
def test_a_small_gap_voids_the_score(original, scratch, settings, void):
    results = make_results([0.6] * 3, [original] * 3, [scratch] * 3, **settings)
    for run in results.runs:
        run.curve.validation = [0.0, 0.0, 0.5 if results.greater_is_better else -0.5]
    transfer = results.recovered_transfer()
    assert (transfer.value is None, transfer.interval is None) == (void, void)
    assert ("too close to scratch" in (transfer.void or "")) == void
    assert str(transfer).startswith("void (" if void else f"{transfer.value or 0:.0%} [")


def test_seeds_that_disagree_void_the_score():
    steady, loose = [0.70, 0.70, 0.70], [0.55, 0.70, 0.85]
    assert make_results([0.6] * 3, steady, [0.6] * 3, test_examples=10**9).recovered_transfer().void is None
    assert make_results([0.6] * 3, loose, [0.6] * 3, test_examples=10**9).recovered_transfer().void is not None


@pytest.mark.parametrize("model", ["protected", "original", "scratch"])
def test_a_missing_attack_voids_the_score(model):
    results = make_results([0.7] * 3, [0.9] * 3, [0.6] * 3)
    for run in results.of(model):
        run.curve, run.error = None, "RuntimeError: x"
    assert "is missing" in results.recovered_transfer().void
    assert results.best(model) is None


def test_the_best_attack_is_chosen_on_validation_over_strategies_and_epochs():
    results = make_results([], [0.9] * 3, [0.6] * 3)
    lucky = curve([0.1, 0.95, 0.2], [0.1, 0.5, 0.4])
    chosen = curve([0.3, 0.6, 0.4], [0.2, 0.7, 0.8])
    results.runs += [AttackRun("protected", A, 0, lucky), AttackRun("protected", B, 0, chosen)]
    best = results.best("protected")
    assert (best.strategy, best.epoch, best.test) == (B, 2.0, (0.4,))
    assert results.best("protected", [A]).test == (0.95,)
    assert results.best("protected", []) is None
    assert results.recovered_transfer([A]).value == pytest.approx((0.95 - 0.6) / 0.3)
    assert results.recovered_transfer().value == pytest.approx((0.4 - 0.6) / 0.3)


def test_one_epoch_is_chosen_for_all_seeds_by_their_mean():
    results = make_results([], [0.9] * 3, [0.6] * 3)
    results.runs += [
        AttackRun("protected", A, 0, curve([0.1, 0.2, 0.3], [0.0, 0.9, 0.5])),
        AttackRun("protected", A, 1, curve([0.4, 0.5, 0.6], [0.0, 0.1, 0.6])),
    ]
    best = results.best("protected")
    assert (best.epoch, best.test, best.mean) == (2.0, (0.3, 0.6), pytest.approx(0.45))
    assert best.sd == pytest.approx(np.std([0.3, 0.6], ddof=1))


def test_points_that_diverged_are_never_chosen():
    results = make_results([], [0.02] * 3, [0.08] * 3, metric="mse", greater_is_better=False, start=1.0)
    results.runs += [
        AttackRun("protected", A, 0, curve([1.0, 0.5, math.nan])),
        AttackRun("protected", B, 0, curve([math.nan] * 3)),
    ]
    best = results.best("protected")
    assert (best.strategy, best.test) == (A, (0.5,))


def test_the_interval_holds_the_value_and_shrinks_with_evidence():
    def interval(spread, seeds=3, examples=2000):
        values = np.linspace(-spread, spread, seeds)
        results = make_results(0.7 + values, 0.9 + values, 0.6 + values, test_examples=examples)
        transfer = results.recovered_transfer()
        low, high = transfer.interval
        assert low < transfer.value < high
        return high - low

    assert interval(0.02, seeds=12) < interval(0.02, seeds=3)
    assert interval(0, examples=8000) < interval(0, examples=2000)
    assert interval(0) < interval(0.03)
    # On the test split's noise alone it is, to first order, what error propagation gives.
    noise = {name: math.sqrt(p * (1 - p) / 2000) for name, p in (("p", 0.7), ("o", 0.9), ("s", 0.6))}
    value = 1 / 3
    error = math.hypot(noise["p"], value * noise["o"], (1 - value) * noise["s"]) / 0.3
    assert interval(0) == pytest.approx(2 * 1.96 * error, rel=0.1)


# Cost to recover.


def test_cost_to_recover():
    results = make_results([], [0.9] * 3, [0.6] * 3)
    results.runs += [
        AttackRun("protected", A, 0, curve([0.1, 0.5, 0.9, 0.9])),
        AttackRun("protected", A, 1, curve([0.1, 0.6, 0.4, 0.9])),
    ]
    assert results.cost_to_recover() == {"steps": 20, "images": 20 * 50}
    results.facts |= {"flops_per_example": 7.0, "training_examples": 30}
    assert results.cost_to_recover() == {"steps": 20, "images": 20 * 30, "flops": 20 * 30 * 7.0}


def test_cost_to_recover_of_an_error_and_where_it_never_does():
    error = {"metric": "mse", "greater_is_better": False, "start": 1.0}
    assert make_results([0.07] * 3, [0.02] * 3, [0.08] * 3, **error).cost_to_recover()["steps"] == 10
    assert make_results([0.09] * 3, [0.02] * 3, [0.08] * 3, **error).cost_to_recover() is None
    assert make_results([0.5] * 3, [0.9] * 3, [0.6] * 3).cost_to_recover() is None
    assert make_results([], [0.9] * 3, [0.6] * 3).cost_to_recover() is None


# On disk.


def test_results_survive_the_disk(tmp_path):
    results = make_results([0.7] * 3, [0.9] * 3, [0.6] * 3)
    results.runs.append(AttackRun("protected", B, 0, error="ValueError: x", applicable=False))
    results.save(tmp_path / "deep" / "results.json")
    loaded = AttackResults.load(tmp_path / "deep" / "results.json")
    assert repr(loaded) == repr(results)
    assert loaded.recovered_transfer() == results.recovered_transfer()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["results.json"]


def test_a_write_that_breaks_off_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    write_atomically(path, "old")

    def torn(self, text, encoding):
        with open(self, "w", encoding=encoding) as file:
            file.write(text[: len(text) // 2])
        raise OSError("disk is full")

    monkeypatch.setattr(Path, "write_text", torn)
    with pytest.raises(OSError, match="full"):
        write_atomically(path, "the new text")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_results_as_a_dataset():
    results = make_results([0.7], [0.9], [0.6])
    results.runs.append(AttackRun("protected", B, 0, error="x"))
    rows = results.to_dataset()
    assert len(rows) == 3 * 3
    expected = {"model": "protected", "attack": A.name, "seed": 0, "epoch": 1.0, "step": 10, "test": 0.7}
    assert {name: rows[1][name] for name in expected} == expected


# Checks.


@pytest.fixture
def clean() -> AttackResults:
    return make_results([0.7] * 3, [0.9] * 3, [0.6] * 3)


def test_nothing_is_found_in_a_clean_sweep(clean):
    assert check(clean) == []


def test_check_of_failed_runs(clean):
    clean.runs.append(AttackRun("protected", B, 0, error="RuntimeError: boom"))
    clean.runs.append(AttackRun("original", B, 0, error="no norm", applicable=False))
    message, voids = found(clean)["runs failed"]
    assert message.startswith("1 of 11; the first, new head") and message.endswith("on protected: RuntimeError: boom")
    assert not voids


@pytest.mark.parametrize("model", ["protected", "original", "scratch"])
def test_check_of_seeds(clean, model):
    clean.runs.remove(clean.of(model)[-1])
    assert list(found(clean)) == ["few seeds"]
    assert f"best attack on {model} has 2 seeds, asked were 3" in found(clean)["few seeds"][0]


def test_check_of_attacks_that_learn_nothing(clean):
    clean.runs += [AttackRun("original", B, seed, curve([0.5, 0.4, 0.51])) for seed in range(3)]
    message, voids = found(clean)["attack learns nothing on the original model"]
    assert message == f"no evidence of resistance: {B.name}" and not voids


def test_a_single_point_is_not_blamed_for_learning_nothing(clean):
    clean.runs += [AttackRun("original", B, seed, curve([0.5])) for seed in range(3)]
    assert found(clean) == {}


@pytest.mark.parametrize(
    "settings, points, words",
    [
        ({}, [0.1, 0.66, 0.7], "accuracy of direct, all, adam 0.001, batch 50 rose by 0.040 between"),
        (
            {"metric": "mse", "greater_is_better": False, "original_metric": {"original": 0.1, "protected": 0.1}},
            [0.9, 0.74, 0.7],
            "mse of direct, all, adam 0.001, batch 50 fell by 0.0400 between",
        ),
    ],
)
def test_check_of_attacks_that_still_improve(settings, points, words):
    scores = [[0.7] * 3, [0.9] * 3, [0.6] * 3] if not settings else [[0.7] * 3, [0.2] * 3, [0.8] * 3]
    results = make_results(*scores, **settings)
    for run in results.of("protected"):
        run.curve.test = run.curve.validation = points
    message, voids = found(results)["still improving at the last epoch"]
    assert words in message and not voids


@pytest.mark.parametrize(
    "gradient_norm, loss, message",
    [
        ([math.nan, 0.0, 0.0], [math.nan, 1.0, 1.0], "zero: "),
        ([math.nan, math.inf, 1.0], [math.nan, 1.0, 1.0], "non-finite: "),
        ([math.nan, 1.0, 1.0], [math.nan, 1.0, math.nan], "non-finite: "),
    ],
)
def test_check_of_gradients(clean, gradient_norm, loss, message):
    clean.of("protected")[1].curve.gradient_norm = gradient_norm
    clean.of("protected")[1].curve.loss = loss
    assert found(clean) == {"zero or non-finite gradients": (f"{message}{A.name} on protected", False)}


@pytest.mark.parametrize(
    "metric, after, voids",
    [("accuracy", 0.81, False), ("accuracy", 0.79, True), ("mse", 0.98, False), ("mse", 1.0, True)],
)
def test_a_collapsed_original_domain_voids(metric, after, voids):
    if metric == "mse":
        results = make_results([0.05] * 3, [0.02] * 3, [0.08] * 3, metric="mse", greater_is_better=False, start=1.0)
    else:
        results = make_results([0.7] * 3, [0.9] * 3, [0.6] * 3)
    results.original_metric["protected"] = after
    assert [(f.name, f.voids) for f in check(results)] == [("original domain collapsed", True)] * voids


def test_check_of_intactness_not_measured(clean):
    clean.original_metric = {}
    assert {name: voids for name, (_, voids) in found(clean).items()} == {"intactness not measured": False}


def test_selection_on_the_test_split_voids(clean):
    clean.facts["data"] = {**DISJOINT, "validation": "c"}
    assert {name: voids for name, (_, voids) in found(clean).items()} == {"selection on the test split": True}


def test_no_transfer_voids():
    results = make_results([0.6] * 3, [0.61] * 3, [0.6] * 3)
    assert found(results)["no transfer to score"][1]


# Sweeps of thousands of runs.


class Watched(AttackRun):
    """Counts how often a curve is looked at."""

    looks = 0

    def __getattribute__(self, name):
        Watched.looks += name == "curve"
        return super().__getattribute__(name)


@pytest.mark.parametrize("metric", ["accuracy", "mse"])
@pytest.mark.parametrize(
    "use",
    [
        lambda results, folder: results.recovered_transfer(),
        lambda results, folder: AttackReport.from_results(results),
        lambda results, folder: write_report(results, folder),
    ],
    ids=["score", "claim", "report"],
)
def test_work_grows_with_the_number_of_runs_and_not_faster(tmp_path, use, metric):
    def looks(strategies: int) -> int:
        made = make_results([0.7] * 3, [0.9] * 3, [0.6] * 3, metric=metric, greater_is_better=metric == "accuracy")
        rates = [A.with_changes(learning_rate=1e-4 * (1 + i)) for i in range(strategies)]
        made.runs = [Watched(**vars(run) | {"strategy": s}) for run in made.runs for s in rates]
        Watched.looks = 0
        use(made, tmp_path)
        return Watched.looks

    assert looks(24) == pytest.approx(3 * looks(8), rel=0.05)


def test_an_attack_on_a_model_is_stopped_where_its_validation_is_best():
    rising, falling = curve([0.1, 0.2, 0.3], [0.1, 0.5, 0.4]), curve([0.3, 0.4, 0.2], [0.2, 0.3, 0.35])
    made = [
        AttackRun("protected", A, 0, rising),
        AttackRun("protected", A, 1, falling),
        AttackRun("protected", B, 0, rising),
    ]
    made.append(AttackRun("protected", SCRATCH, 0, curve([0.1, 0.2], [math.nan, math.nan])))
    stopped = [a for a in AttackResults(made, "accuracy", True, 100).summaries() if a.epoch is not None]
    assert [a.strategy for a in stopped] == [A, B], "nothing can be chosen for the third"
    assert (stopped[0].epoch, stopped[0].validation, stopped[0].test) == (1.0, pytest.approx(0.4), (0.2, 0.4))
    assert (stopped[1].epoch, stopped[1].validation, stopped[1].test) == (1.0, 0.5, (0.2,))


def test_what_original_data_alone_recover_is_told_on_the_scale_of_the_score(tmp_path):
    results = make_results([0.7] * 3, [0.9] * 3, [0.5] * 3)
    assert (
        results.recovered_transfer(model="untrained").void == "an attack on untrained, original or scratch is missing"
    )
    assert write_report(results, tmp_path)["recovered_by_original_data"] is None
    assert "untrained" not in (tmp_path / "report.md").read_text()
    warm = A.with_changes(preparation="warm_up")
    results.runs += runs("untrained", [0.6] * 3, warm)
    assert results.recovered_transfer(model="untrained").value == pytest.approx(0.25)
    assert results.recovered_transfer().value == pytest.approx(0.5), "the score leans on plain scratch"
    assert write_report(results, tmp_path)["recovered_by_original_data"].startswith("25% [")
    text = (tmp_path / "report.md").read_text()
    assert "warms up on the adversary's original data recovers 25% [" in text


def test_an_mse_of_one_seed_has_no_interval_rather_than_one_of_no_width(tmp_path):
    results = make_results([0.05], [0.04], [0.06], metric="mse", greater_is_better=False, start=1.0)
    transfer = results.recovered_transfer()
    assert transfer.value == pytest.approx(0.5) and transfer.interval is None
    assert "no interval" in str(transfer)
    assert write_report(results, tmp_path)["interval"] is None
    assert "50% (no interval: one seed does not tell the error of an MSE)" in (tmp_path / "report.md").read_text()
    report = AttackReport.from_results(results)
    assert (report.recovered_transfer.value, report.recovered_transfer.interval) == (pytest.approx(0.5), None)
    several = make_results(
        [0.05, 0.051], [0.04, 0.041], [0.06, 0.061], metric="mse", greater_is_better=False, start=1.0
    )
    assert several.recovered_transfer().interval is not None

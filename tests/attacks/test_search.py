"""The seeded search over the strategy space."""

from __future__ import annotations

from pathlib import Path

import pytest
from attacked import make_data, make_suite
from points import make_points

from sophon_hf import AttackSuite, FineTuningStrategy
from sophon_hf.attacks.search import Search
from sophon_hf.attacks.sweeps import load_sweep


def search(trials: int = 30, **changes) -> Search:
    settings = {"direct": True, "original": True, "greater_is_better": True, "epochs": 7.0}
    return Search(trials, **{**settings, **changes})


def spend(found: Search, value) -> list[FineTuningStrategy]:
    tried = []
    while proposed := found.propose():
        tried += proposed
        for strategy in proposed:
            found.tell(strategy, value(strategy))
    return tried


def closeness(strategy: FineTuningStrategy) -> float:
    """Best at one point of the space."""
    return (strategy.initialization == "new_head") + (strategy.optimizer == "adam") + (strategy.schedule == "cosine")


def test_a_search_spends_its_trials_and_comes_closer_to_the_best():
    found = search(40)
    tried = spend(found, closeness)
    assert found.spent == 40 and {s.epochs for s in tried} == {7.0}
    scores = [closeness(s) for s in tried]
    assert sum(scores[-16:]) / 16 > sum(scores[:10]) / 10 + 0.5


def test_the_same_values_lead_to_the_same_strategies_and_other_values_to_others():
    assert spend(search(), closeness) == spend(search(), closeness)
    assert spend(search(), closeness) != spend(search(), lambda s: -closeness(s))


def test_an_error_is_searched_for_downwards():
    tried = spend(search(40, greater_is_better=False), lambda s: -closeness(s))
    assert tried == spend(search(40), closeness)


@pytest.mark.parametrize("nothing", [None, float("nan")])
def test_what_reached_nothing_is_a_trial_too(nothing):
    found = search(20)
    spend(found, lambda s: nothing if s.optimizer == "adam" else closeness(s))
    assert found.spent == 20


def test_what_cannot_be_carried_out_is_not_proposed():
    tried = spend(search(60, direct=False, original=False), closeness)
    assert {s.initialization for s in tried} == {"new_head"}
    assert not any(s.needs_original_data for s in tried)
    assert {"batch_norm", "rescale", "shrink_and_perturb", None} == {s.preparation for s in tried}


def files(folder: Path) -> set[str]:
    return {path.name for path in (folder / "runs").iterdir()}


def test_every_model_gets_the_same_trials_and_a_second_run_computes_nothing(tmp_path):
    settings = {"trials": 12, "seeds": [0], "epochs": 1, "measured_epochs": [1]}
    data = {**make_data(), "validation_dataset": make_points(5, 30)}
    results = make_suite(tmp_path, "search", **settings).run(**data)
    for model in ("protected", "original"):
        tried = {run.strategy for run in results.runs if run.model == model}
        assert 8 < len(tried) <= 12
        assert {s.with_changes(epochs=1) for s in load_sweep("search")} <= tried
    assert results.facts["sweep"] == "search" and results.facts["trials"] == 12
    before = files(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    again = make_suite(tmp_path, "search", **settings).run(**data)
    assert files(tmp_path) == before and {p: p.stat().st_mtime_ns for p in times} == times
    assert repr(again.runs) == repr(results.runs)
    assert load_sweep(tmp_path / "best-protected.yaml") == [results.best("protected").strategy]


@pytest.mark.parametrize("trials", [1, 4])
def test_too_few_trials_are_refused(tmp_path, trials):
    with pytest.raises(ValueError, match=f"trials is {trials}, but a search begins with 4 strategies"):
        AttackSuite("search", tmp_path, trials=trials)


def test_trials_of_a_sweep_that_does_not_search_are_refused(tmp_path):
    with pytest.raises(ValueError, match='trials is 40, but only the sweep "search" has trials'):
        AttackSuite("strong", tmp_path, trials=40)


def test_the_plan_counts_trials(tmp_path):
    plan = AttackSuite("search", tmp_path, trials=10, seeds=[0]).plan(50)
    assert plan["runs"] == 2 * 10 + len({s.learning_rate for s in load_sweep("search")}) + 6

"""The suite, which runs every attack once and keeps what it has."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from attacked import DIRECT, NEW_HEAD, make_data, make_model, make_suite
from points import TinyNet, make_points

from sophon_hf import FineTuningStrategy
from sophon_hf.attacks.checks import check
from sophon_hf.attacks.results import AttackResults
from sophon_hf.attacks.run import AttackRun
from sophon_hf.data.domain import build_domain
from sophon_hf.finetuning.preparations import untrained_copy
from sophon_hf.tasks.base import infer_task


@pytest.fixture
def data() -> dict:
    return make_data()


@pytest.fixture
def computed(tmp_path) -> Callable[[], list[FineTuningStrategy]]:
    """Call it for the strategies of the runs that were computed since the last call: each is a file."""
    seen: dict[Path, int] = {}

    def look() -> list[FineTuningStrategy]:
        times = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*.json")}
        new = sorted((path for path in times if seen.get(path) != times[path]), key=times.__getitem__)
        seen.update(times)
        return [AttackRun.from_dict(json.loads(path.read_text())).strategy for path in new]

    return look


class Unlucky(TinyNet):
    """Breaks off in training while `failing` is set."""

    failing = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and Unlucky.failing:
            raise RuntimeError("out of luck")
        return super().forward(x)


def test_a_sweep_runs_every_attack_on_every_model_and_tunes_scratch(tmp_path, data, computed):
    results = make_suite(tmp_path).run(**data)
    assert len(results.runs) == len(computed()) == 2 * (2 + 2 + 1)
    assert {(c.model, c.strategy.initialization, c.seed) for c in results.runs} == {
        (model, start, seed)
        for seed in (0, 1)
        for model, starts in (
            ("protected", ("direct", "new_head")),
            ("original", ("direct", "new_head")),
            ("scratch", ("scratch",)),
        )
        for start in starts
    }
    assert all(run.curve.epoch == [0, 1, 2] and not run.error for run in results.runs)
    assert results.test_examples == 60
    assert (results.facts["training_examples"], results.facts["validation_examples"]) == (60, 60)
    # Two operations a weight and pass: forward, weights' gradient and, but for the first layer, inputs' gradient.
    assert results.facts["flops_per_example"] == pytest.approx(2 * (2 * 6 * 16 + 3 * 16 * 3))
    loaded = AttackResults.load(tmp_path / "results.json")
    assert [c.strategy for c in loaded.runs] == [c.strategy for c in results.runs]


def test_runs_are_files_and_a_second_run_computes_what_is_missing(tmp_path, data, computed):
    first = make_suite(tmp_path).run(**data)
    files = sorted((tmp_path / "runs").iterdir())
    assert len(files) == 10
    assert len(computed()) == 10
    again = make_suite(tmp_path).run(**data)
    assert not computed()
    assert repr(again.runs) == repr(first.runs)

    files[3].unlink()
    make_suite(tmp_path, seeds=[0, 1, 2]).run(**data)
    assert len(computed()) == 1 + 5, "the one that was removed, and those of the new seed"


def test_runs_are_bound_to_weights_data_and_measured_epochs(tmp_path, data, computed):
    make_suite(tmp_path, seeds=[0]).run(**data)
    computed()
    make_suite(tmp_path, seeds=[0]).run(**{**data, "protected": make_model(5)})
    assert [s.initialization for s in computed()] == ["direct", "new_head"], "original and scratch are kept"
    for changed, settings in (({"eval_dataset": make_points(7)}, {}), ({}, {"measured_epochs": [0, 2]})):
        make_suite(tmp_path, seeds=[0], **settings).run(**{**data, **changed})
        assert len(computed()) == 5


def test_a_torn_file_is_computed_again_and_said(tmp_path, data, computed, caplog):
    first = make_suite(tmp_path, seeds=[0]).run(**data)
    torn = sorted((tmp_path / "runs").iterdir())[0]
    for content in ("", '{"model": "prot', "[1]", '{"model": "protected"}', "null"):
        computed()
        caplog.clear()
        torn.write_text(content)
        with caplog.at_level(logging.WARNING):
            again = make_suite(tmp_path, seeds=[0]).run(**data)
        assert len(computed()) == 1 and f"{torn.name} is torn" in caplog.text, content
        assert repr(again.runs) == repr(first.runs), content


def test_a_failing_run_is_recorded_others_go_on_and_it_is_tried_again(tmp_path, data, computed, caplog, monkeypatch):
    data["protected"] = Unlucky()
    monkeypatch.setattr(Unlucky, "failing", True)
    results = make_suite(tmp_path, seeds=[0]).run(**data)
    failed = [run for run in results.runs if run.failed]
    assert [(run.model, run.strategy, run.error) for run in failed] == [
        ("protected", strategy, "RuntimeError: out of luck") for strategy in (DIRECT, NEW_HEAD)
    ]
    assert all(run.curve for run in results.runs if run not in failed) and "out of luck" in caplog.text

    monkeypatch.setattr(Unlucky, "failing", False)
    computed()
    results = make_suite(tmp_path, seeds=[0]).run(**data)
    assert computed() == [DIRECT, NEW_HEAD]
    assert not any(run.failed for run in results.runs)


def test_operations_that_cannot_be_counted_cost_no_results(tmp_path, data, caplog, monkeypatch):
    """Counting takes a pass in training mode, which this original does not survive."""
    data["original"] = Unlucky()
    monkeypatch.setattr(Unlucky, "failing", True)
    results = make_suite(tmp_path, [DIRECT], seeds=[0]).run(**data)
    assert results.facts["flops_per_example"] is None and "cannot be counted: RuntimeError" in caplog.text
    assert [run.model for run in AttackResults.load(tmp_path / "results.json").of("protected")] == ["protected"]


def test_direct_attacks_with_too_many_classes_are_not_applicable(tmp_path, data, computed):
    points = make_points(1, num_classes=5)
    data |= {"restricted_dataset": points.select(range(60)), "eval_dataset": points.select(range(60, 120))}
    results = make_suite(tmp_path, seeds=[0]).run(**data)
    direct = [run for run in results.runs if run.strategy == DIRECT]
    assert len(direct) == 2
    for run in direct:
        assert run.curve is None and not run.applicable and not run.failed
        assert run.error == "the head has fewer outputs than the 5 restricted classes"
    assert results.best("protected").strategy == NEW_HEAD
    computed()
    make_suite(tmp_path, seeds=[0]).run(**data)
    assert not computed(), "it stays not applicable"


def test_a_warm_up_that_lacked_original_data_runs_once_it_has_them(tmp_path, data, computed):
    warm = NEW_HEAD.with_changes(preparation="warm_up")
    first = make_suite(tmp_path, [warm], seeds=[0]).run(**data)
    assert [c.applicable for c in first.runs] == [False, False, True]
    assert "learn from original data had none (1 of the sweep): give `original_dataset`" in left_out(first)
    computed()
    second = make_suite(tmp_path, [warm], seeds=[0]).run(**data, original_dataset=make_points(3))
    assert computed() == [warm, warm, warm]
    assert [c.model for c in second.runs] == ["protected", "original", "scratch", "untrained"]
    assert all(run.curve for run in second.runs)
    assert left_out(second) == ""


def left_out(results: AttackResults) -> str:
    return "".join(failed.message for failed in check(results) if failed.name == "attacks on original data left out")


def test_an_untrained_model_warms_up_too_each_seed_its_own_and_whatever_is_published(tmp_path, data):
    warm = NEW_HEAD.with_changes(preparation="warm_up")
    given = data | {"original_dataset": make_points(3)}
    results = make_suite(tmp_path / "a", [warm, DIRECT]).run(**given)
    first, second = results.of("untrained")
    assert {first.strategy, second.strategy} == {warm}
    assert first.curve.test != second.curve.test

    model = untrained_copy(data["original"], infer_task(data["original"]), results_domain(data), 0)
    weights = dict(data["original"].named_parameters())
    assert not any(torch.equal(p, weights[n]) for n, p in model.named_parameters() if p.ndim > 1)
    alone = make_suite(tmp_path / "b", [warm], seeds=[0]).run(**given | {"protected": model})
    assert alone.of("protected")[0].curve.test == first.curve.test


def results_domain(data: dict):
    return build_domain(data["restricted_dataset"], infer_task(data["original"]).inputs(data["original"]))


def test_names_of_the_suites_own_models_are_no_baselines(tmp_path, data):
    with pytest.raises(ValueError, match=r"baselines has \['untrained'\], which are names of the suite's own"):
        make_suite(tmp_path).run(**data, baselines={"untrained": make_model(4)})


def test_a_suite_measures_every_few_steps(tmp_path, data, computed):
    results = make_suite(tmp_path, [DIRECT], seeds=[0], measured_every=2).run(**data)
    assert all(c.curve.step == [0, 2, 4, 6] for c in results.runs if c.model != "scratch")
    assert results.facts["measured_every"] == 2
    computed()
    make_suite(tmp_path, [DIRECT], seeds=[0], measured_every=3).run(**data)
    assert len(computed()) == 3, "other points are other runs"
    with pytest.raises(ValueError, match="measured_every is 0, but must be a whole number of 1"):
        make_suite(tmp_path, measured_every=0)


def test_attacks_in_mixed_precision_are_other_runs_with_nearly_the_same_results(tmp_path, data, computed):
    full, mixed = (make_suite(tmp_path, [NEW_HEAD], seeds=[0], bf16=bf16).run(**data) for bf16 in (False, True))
    assert len(computed()) == 6
    assert (full.facts["precision"], mixed.facts["precision"]) == ("float32", "bf16")
    for one, other in zip(full.runs, mixed.runs, strict=True):
        assert one.curve.loss[1:] != other.curve.loss[1:]
        assert one.curve.loss[1:] == pytest.approx(other.curve.loss[1:], rel=0.02)
    assert all(p.dtype == torch.float32 for p in data["original"].parameters())


@pytest.mark.parametrize("models, seeds", [(2, [0, 1]), (3, [0])])
def test_the_plan_counts_what_a_run_does(tmp_path, data, computed, models, seeds):
    short = NEW_HEAD.with_changes(steps=3, batch_size=100, learning_rate=0.1)
    suite = make_suite(tmp_path, [DIRECT, NEW_HEAD, short], seeds=seeds)
    if models == 3:
        data["baselines"] = {"ntl": make_model(4)}
    results = suite.run(**data)
    steps = [c.curve.step[-1] for c in results.runs]
    assert suite.plan(60, models, folds=5) == {
        "runs": len(results.runs),
        "steps": 6 * sum(steps),
        "images": 6 * sum(s * min(c.strategy.batch_size, 60) for s, c in zip(steps, results.runs)),
        "measurements": sum(len(c.curve.step) for c in results.runs),
    }
    assert len(computed()) == len(results.runs)


def test_a_strategy_that_is_named_twice_runs_once(tmp_path, data, computed):
    make_suite(tmp_path, [DIRECT, DIRECT], seeds=[0]).run(**data)
    assert len(computed()) == 3

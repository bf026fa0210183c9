"""The suite, which runs every attack once and keeps what it has."""

from __future__ import annotations

import logging

import pytest
import torch
from attacked import DIRECT, NEW_HEAD, STEADY, make_data, make_model, make_suite
from points import TinyNet, make_points

from sophon_hf.attacks import suite
from sophon_hf.attacks.checks import check
from sophon_hf.attacks.results import AttackResults
from sophon_hf.attacks.run import run_attacks
from sophon_hf.data.domain import build_domain
from sophon_hf.finetuning.preparations import untrained_copy
from sophon_hf.tasks.base import infer_task


@pytest.fixture
def data() -> dict:
    return make_data()


@pytest.fixture
def calls(monkeypatch) -> list:
    """The strategies of all calls of `run_attacks`; one that is put into `calls.failing` raises."""

    class Calls(list):
        failing: tuple = ()

    calls = Calls()

    def counted(model, task, strategy, *args, **settings):
        calls.append(strategy)
        if strategy in calls.failing:
            raise RuntimeError("out of luck")
        return run_attacks(model, task, strategy, *args, **settings)

    monkeypatch.setattr(suite, "run_attacks", counted)
    return calls


def test_a_sweep_runs_every_attack_on_every_model_and_tunes_scratch(tmp_path, data, calls):
    results = make_suite(tmp_path).run(**data)
    assert len(results.cells) == len(calls) == 2 * (2 + 2 + 1)
    assert {(c.model, c.strategy.initialization, c.seed) for c in results.cells} == {
        (model, start, seed)
        for seed in (0, 1)
        for model, starts in (
            ("protected", ("direct", "new_head")), ("original", ("direct", "new_head")), ("scratch", ("scratch",)),
        )
        for start in starts
    }  # fmt: skip
    assert all(cell.curve.epoch == [0, 1, 2] and not cell.error for cell in results.cells)
    assert results.test_examples == 60
    assert (results.facts["training_examples"], results.facts["validation_examples"]) == (54, 6)
    # Two operations a weight and pass: forward, weights' gradient and, but for the first layer, inputs' gradient.
    assert results.facts["flops_per_example"] == pytest.approx(2 * (2 * 6 * 16 + 3 * 16 * 3))
    loaded = AttackResults.load(tmp_path / "results.json")
    assert [c.strategy for c in loaded.cells] == [c.strategy for c in results.cells]


def test_cells_are_files_and_a_second_run_computes_what_is_missing(tmp_path, data, calls):
    first = make_suite(tmp_path).run(**data)
    files = sorted((tmp_path / "cells").iterdir())
    assert len(files) == 10
    calls.clear()
    again = make_suite(tmp_path).run(**data)
    assert not calls
    assert repr(again.cells) == repr(first.cells)

    files[3].unlink()
    make_suite(tmp_path, seeds=[0, 1, 2]).run(**data)
    assert len(calls) == 1 + 5, "the one that was removed, and those of the new seed"


def test_each_result_is_read_once_and_each_model_hashed_once(tmp_path, data, monkeypatch):
    make_suite(tmp_path).run(**data)
    read, hashed, from_dict, hash_state = [], [], suite.AttackRun.from_dict, suite.hash_state
    monkeypatch.setattr(suite.AttackRun, "from_dict", lambda values: read.append(values) or from_dict(values))
    monkeypatch.setattr(suite, "hash_state", lambda model: hashed.append(model) or hash_state(model))
    results = make_suite(tmp_path).run(**data)
    assert len(read) == len(results.cells) == 10
    assert hashed == [data["protected"], data["original"]]
    assert results.facts["weights"] == {name: hash_state(data[name]) for name in ("protected", "original")}


def test_cells_are_bound_to_weights_data_and_measured_epochs(tmp_path, data, calls):
    make_suite(tmp_path, seeds=[0]).run(**data)
    calls.clear()
    make_suite(tmp_path, seeds=[0]).run(**{**data, "protected": make_model(5)})
    assert [s.initialization for s in calls] == ["direct", "new_head"], "original and scratch are kept"
    for changed, settings in (({"eval_dataset": make_points(7)}, {}), ({}, {"measured_epochs": [0, 2]})):
        calls.clear()
        make_suite(tmp_path, seeds=[0], **settings).run(**{**data, **changed})
        assert len(calls) == 5


def test_a_cell_of_a_long_attack_is_bound_to_its_points_and_others_keep_their_names(tmp_path, data, calls, monkeypatch):
    """So that seeds that were measured at other points never stand in one mean."""
    usual, long = DIRECT.with_changes(epochs=20), DIRECT.with_changes(epochs=40)
    make_suite(tmp_path, [usual, long], seeds=[0]).run(**data)
    calls.clear()
    monkeypatch.setattr(suite, "measured_epochs", lambda strategy, examples, epochs: list(epochs))
    make_suite(tmp_path, [usual, long], seeds=[0]).run(**data)
    assert {s.epochs for s in calls} == {40}


@pytest.mark.parametrize("content", ["", '{"model": "prot', "[1]", '{"model": "protected"}', "null"])
def test_a_torn_file_is_computed_again_and_said(tmp_path, data, calls, caplog, content):
    first = make_suite(tmp_path, seeds=[0]).run(**data)
    torn = sorted((tmp_path / "cells").iterdir())[0]
    torn.write_text(content)
    calls.clear()
    with caplog.at_level(logging.WARNING):
        again = make_suite(tmp_path, seeds=[0]).run(**data)
    assert len(calls) == 1 and f"{torn.name} is torn" in caplog.text
    assert repr(again.cells) == repr(first.cells)


def test_a_failing_cell_is_recorded_others_go_on_and_it_is_tried_again(tmp_path, data, calls, caplog):
    calls.failing = (DIRECT,)
    results = make_suite(tmp_path, seeds=[0]).run(**data)
    failed = [cell for cell in results.cells if cell.failed]
    assert [(c.model, c.strategy, c.error) for c in failed] == [
        (model, DIRECT, "RuntimeError: out of luck") for model in ("protected", "original")
    ]
    assert all(cell.curve for cell in results.cells if cell not in failed) and "out of luck" in caplog.text

    calls.failing = ()
    calls.clear()
    results = make_suite(tmp_path, seeds=[0]).run(**data)
    assert calls == [DIRECT, DIRECT]
    assert not any(cell.failed for cell in results.cells)


def test_direct_attacks_with_too_many_classes_are_not_applicable(tmp_path, data, calls):
    points = make_points(1, num_classes=5)
    data |= {"restricted_dataset": points.select(range(60)), "eval_dataset": points.select(range(60, 120))}
    results = make_suite(tmp_path, seeds=[0]).run(**data)
    direct = [cell for cell in results.cells if cell.strategy == DIRECT]
    assert len(direct) == 2
    for cell in direct:
        assert cell.curve is None and not cell.applicable and not cell.failed
        assert cell.error == "the head has fewer outputs than the 5 restricted classes"
    assert results.best("protected").strategy == NEW_HEAD
    calls.clear()
    make_suite(tmp_path, seeds=[0]).run(**data)
    assert not calls, "it stays not applicable"


def test_a_warm_up_that_lacked_original_data_runs_once_it_has_them(tmp_path, data, calls):
    warm = NEW_HEAD.with_changes(preparation="warm_up")
    first = make_suite(tmp_path, [warm], seeds=[0]).run(**data)
    assert [c.applicable for c in first.cells] == [False, False, True]
    assert "warm up on original data had none (1 of the sweep): give `original_dataset`" in left_out(first)
    calls.clear()
    second = make_suite(tmp_path, [warm], seeds=[0]).run(**data, original_dataset=make_points(3))
    assert calls == [warm, warm, warm]
    assert [c.model for c in second.cells] == ["protected", "original", "scratch", "untrained"]
    assert all(cell.curve for cell in second.cells)
    assert left_out(second) == ""


def left_out(results: AttackResults) -> str:
    return "".join(failed.message for failed in check(results) if failed.name == "warm-ups left out")


@pytest.mark.parametrize("stack_seeds", (False, True))
def test_an_untrained_model_warms_up_too_each_seed_its_own_and_whatever_is_published(tmp_path, data, stack_seeds):
    warm = NEW_HEAD.with_changes(preparation="warm_up")
    given = data | {"original_dataset": make_points(3)}
    results = make_suite(tmp_path / "a", [warm, DIRECT], stack_seeds=stack_seeds).run(**given)
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


def test_a_suite_measures_every_few_steps(tmp_path, data, calls):
    results = make_suite(tmp_path, [DIRECT], seeds=[0], measured_every=2).run(**data)
    assert all(c.curve.step == [0, 2, 4, 6] for c in results.cells if c.model != "scratch")
    assert results.facts["measured_every"] == 2
    calls.clear()
    make_suite(tmp_path, [DIRECT], seeds=[0], measured_every=3).run(**data)
    assert len(calls) == 3, "other points are other cells"
    with pytest.raises(ValueError, match="measured_every is 0, but must be a number of steps"):
        make_suite(tmp_path, measured_every=0)


@pytest.mark.parametrize("models", [2, 3])
def test_the_plan_counts_what_a_run_does(tmp_path, data, calls, models):
    short = NEW_HEAD.with_changes(steps=3, batch_size=100, learning_rate=0.1)
    suite = make_suite(tmp_path, [DIRECT, NEW_HEAD, short])
    if models == 3:
        data["baselines"] = {"ntl": make_model(4)}
    results = suite.run(**data)
    steps = [c.curve.step[-1] for c in results.cells]
    assert suite.plan(54, models) == {
        "cells": len(results.cells),
        "steps": sum(steps),
        "images": sum(s * min(c.strategy.batch_size, 54) for s, c in zip(steps, results.cells)),
    }
    assert len(calls) == len(results.cells)


def test_a_strategy_that_is_named_twice_runs_once(tmp_path, data, calls):
    make_suite(tmp_path, [DIRECT, DIRECT], seeds=[0]).run(**data)
    assert len(calls) == 3


# Seeds as one stack.


class Noisy(TinyNet):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + 0.1 * torch.randn_like(x) if self.training else x)


def test_a_suite_stacks_seeds_and_runs_one_by_one_what_it_cannot(tmp_path, data, calls, caplog):
    clipped = STEADY.with_changes(max_grad_norm=1.0)
    single = make_suite(tmp_path / "single", [STEADY, clipped]).run(**data)
    calls.clear()
    with caplog.at_level(logging.WARNING):
        stacked = make_suite(tmp_path / "stacked", [STEADY, clipped], stack_seeds=True).run(**data)
    # On both models, and from scratch with both; a stack that was refused is followed by its two seeds.
    assert calls.count(STEADY) == 2 and calls.count(clipped) == 2 * (1 + 2)
    assert "run one by one: Seeds of" in caplog.text and "because of clipping" in caplog.text
    names = [sorted(path.name for path in (tmp_path / f / "cells").iterdir()) for f in ("single", "stacked")]
    assert names[0] == names[1]
    for one, other in zip(single.cells, stacked.cells, strict=True):
        assert (one.model, one.strategy, one.seed) == (other.model, other.strategy, other.seed) and not other.error
        assert other.curve.loss == pytest.approx(one.curve.loss, rel=1e-3, nan_ok=True)
        assert other.curve.test == pytest.approx(one.curve.test, abs=0.02)
    calls.clear()
    make_suite(tmp_path / "stacked", [STEADY], seeds=[0, 1, 2], stack_seeds=True).run(**data)
    assert len(calls) == 3, "only the new seed"


def test_random_numbers_in_a_forward_pass_are_not_stacked(tmp_path, data):
    data |= {"protected": Noisy(), "original": Noisy()}
    single = make_suite(tmp_path / "single", [STEADY]).run(**data)
    stacked = make_suite(tmp_path / "stacked", [STEADY], stack_seeds=True).run(**data)
    assert repr(stacked.cells) == repr(single.cells)

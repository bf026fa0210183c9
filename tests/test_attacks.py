"""Attacks and sweeps, and the suite that runs every attack once and keeps what it has."""

from __future__ import annotations

import json
import logging
import os
import runpy
import subprocess
import sys

import pytest
import torch
from conftest import TinyNet, make_points
from torch import nn

from sophon_hf import AttackSuite, FineTuningStrategy
from sophon_hf.attacks import AttackResults, run_attack, run_attacks, suite
from sophon_hf.attacks.sweeps import SWEEPS, load_sweep, scratch
from sophon_hf.data import build_domain
from sophon_hf.tasks import evaluate_model, infer_task

DIRECT = FineTuningStrategy(epochs=2, learning_rate=0.01, batch_size=20)
NEW_HEAD = DIRECT.with_changes(initialization="new_head")


def make_model(seed: int = 0, num_classes: int = 3) -> TinyNet:
    torch.manual_seed(seed)
    return TinyNet(num_classes)


@pytest.fixture
def parts(model) -> dict:
    """One rule, cut into the adversary's 40, 20 validation and 60 test examples."""
    needs, points = infer_task(model).inputs(model), make_points(1)
    ranges = {"training": range(40), "validation": range(40, 60), "test": range(60, 120)}
    return {name: build_domain(points.select(rows), needs, name="restricted") for name, rows in ranges.items()}


@pytest.fixture
def data() -> dict:
    """Arguments of `AttackSuite.run`, models included."""
    points = make_points(1)
    return {
        "protected": make_model(1),
        "original": make_model(0),
        "restricted_dataset": points.select(range(60)),
        "eval_dataset": points.select(range(60, 120)),
    }


def make_suite(folder, sweep=(DIRECT, NEW_HEAD), **settings) -> AttackSuite:
    return AttackSuite(sweep, folder, **{"seeds": [0, 1], "measured_epochs": [0, 1, 2], **settings})


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


# One attack.


def test_an_attack_measures_where_asked_and_at_its_end(model, parts):
    strategy = DIRECT.with_changes(epochs=3)
    curve = run_attack(model, infer_task(model), strategy, parts["training"], parts["test"], epochs=(0, 0.5, 2, 7))
    assert (curve.epoch, curve.step) == ([0, 0.5, 2, 3], [0, 1, 4, 6])
    assert len(curve.test) == len(curve.loss) == len(curve.gradient_norm) == 4
    assert curve.validation == []


def test_an_attack_measures_every_few_steps(model, parts):
    strategy = DIRECT.with_changes(epochs=4)
    arguments = (model, infer_task(model), strategy, parts["training"], parts["test"])
    curve = run_attack(*arguments, every=3)
    assert (curve.step, curve.epoch) == ([0, 3, 6, 8], [0, 1.5, 3, 4])
    by_epoch = run_attack(*arguments, epochs=(0, 1.5, 3))
    assert curve.test == by_epoch.test, "measuring leaves no trace in the attack"
    assert run_attack(*arguments, every=1).step == list(range(9))


def test_an_attack_starts_from_the_model_as_it_is_and_leaves_it_so(model, parts):
    task = infer_task(model)
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    curve = run_attack(model, task, DIRECT, parts["training"], parts["test"], validation=parts["validation"])
    assert curve.test[0] == evaluate_model(task, model, parts["test"], 7).metric
    assert curve.validation[0] == evaluate_model(task, model, parts["validation"], 7).metric
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.training and all(p.grad is None and p.requires_grad for p in model.parameters())


def test_an_attack_learns_and_is_decided_by_its_seed(model, parts):
    def run(seed):
        strategy = NEW_HEAD.with_changes(epochs=20)
        return run_attack(model, infer_task(model), strategy, parts["training"], parts["test"], seed=seed).to_dict()

    first, again, other = run(0), run(0), run(1)
    assert repr(first) == repr(again) != repr(other)
    assert first["test"][-1] > first["test"][0] + 0.2
    assert first["loss"][-1] < first["loss"][1]


def test_after_step_hears_of_every_step(model, parts):
    heard = []
    run_attack(
        model,
        infer_task(model),
        DIRECT,
        parts["training"],
        parts["test"],
        epochs=(),
        after_step=lambda *s: heard.append(s),
    )
    assert heard == [(step, 4) for step in range(1, 5)]


# Sweeps.


def test_paper_sweeps():
    default = {"optimizer": "momentum", "learning_rate": 1e-4, "weight_decay": 1e-4, "batch_size": 200}
    paper = load_sweep("paper")
    assert all(s.to_dict()[name] == value for s in paper for name, value in default.items())
    assert [(s.initialization, s.transfer) for s in paper] == [
        ("direct", "all"), ("new_head", "head"), ("new_head", "all"),
    ]  # fmt: skip
    assert [s.optimizer for s in load_sweep("paper-optimizers")] == [
        "momentum", "nesterov", "adagrad", "adadelta", "adam",
    ]  # fmt: skip
    assert [s.learning_rate for s in load_sweep("paper-rates")] == [5e-6, 1e-5, 1e-4, 1e-3, 1e-2]
    assert [s.batch_size for s in load_sweep("paper-batches")] == [50, 100, 150, 200, 250]


def test_strong_sweep():
    strong = load_sweep("strong")
    whole = {
        (s.optimizer, s.learning_rate, s.initialization, s.reinitialized_blocks) for s in strong if s.transfer == "all"
    }
    assert whole == {
        (*optimizer, *start)
        for optimizer in (("adam", 3e-4), ("adam", 1e-3), ("adam", 3e-3), ("momentum", 1e-2), ("momentum", 1e-1))
        for start in (("direct", 0), ("new_head", 0), ("new_head", 1))
    }
    assert sorted(s.transfer for s in strong if s.transfer != "all") == ["head", "norm"]
    assert len(strong) == 17


def test_peft_and_adaptive_sweeps():
    peft = load_sweep("peft")
    assert {s.initialization for s in peft} == {"new_head"}
    assert {s.rank for s in peft if s.adapter == "lora"} == {1, 8, 64}
    assert {"lora", "dora", "adalora", "ia3", "loha", "lokr"} <= {s.adapter for s in peft}
    adaptive = load_sweep("adaptive")
    assert {s.preparation for s in adaptive} == {None, "batch_norm", "rescale", "shrink_and_perturb", "warm_up"}
    assert {s.initialization for s in adaptive if s.epochs == 200} == {"direct", "new_head"}


def test_the_full_sweep_holds_every_attack_once():
    full = load_sweep("full")
    assert len(set(full)) == len(full)
    assert set(full) == {s for name in SWEEPS if name != "full" for s in load_sweep(name)}
    assert len({s.name for s in full}) == len(full), "tables and heat maps tell attacks apart by name"


def test_scratch_is_tuned_over_optimizers_and_rates():
    tuned = scratch(load_sweep("strong"))
    assert all((s.initialization, s.transfer, s.reinitialized_blocks) == ("scratch", "all", 0) for s in tuned)
    assert {(s.optimizer, s.learning_rate) for s in tuned} == {
        (s.optimizer, s.learning_rate) for s in load_sweep("strong")
    }
    assert len(tuned) == 5
    informed = scratch([*load_sweep("peft"), *load_sweep("adaptive")])
    assert all(s.adapter is None and s.preparation is None for s in informed)


@pytest.mark.parametrize(
    "name, text",
    [
        ("own.json", '[{"optimizer": "sgd", "learning_rate": 0.1}, {"initialization": "new_head"}]'),
        ("own.yaml", "- {optimizer: sgd, learning_rate: 1e-1}\n- initialization: new_head\n"),
    ],
)
def test_a_sweep_from_a_file(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert load_sweep(tmp_path / name) == [
        FineTuningStrategy(optimizer="sgd", learning_rate=0.1),
        FineTuningStrategy("new_head"),
    ]


@pytest.mark.parametrize(
    "text, message",
    [
        ("- optimiser: sgd", "no field 'optimiser'. Did you mean 'optimizer'"),
        ("- optimizer: adamm", "Did you mean 'adam'"),
        ("optimizer: sgd", "must hold a list of strategies"),
        ("- sgd", "must hold a list of strategies"),
    ],
)
def test_a_bad_sweep_file_is_refused(tmp_path, text, message):
    (tmp_path / "own.yml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_sweep(tmp_path / "own.yml")


def test_an_unknown_sweep_names_the_closest():
    with pytest.raises(ValueError, match="no sweep 'storng'. Did you mean 'strong'"):
        load_sweep("storng")
    with pytest.raises(ValueError, match="There are paper, .*json or .yaml"):
        AttackSuite("zzz")


# The suite.


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
    read, hashed, from_dict, hash_state = [], [], suite.Cell.from_dict, suite.hash_state
    monkeypatch.setattr(suite.Cell, "from_dict", lambda values: read.append(values) or from_dict(values))
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
    calls.clear()
    second = make_suite(tmp_path, [warm], seeds=[0]).run(**data, original_dataset=make_points(3))
    assert calls == [warm, warm]
    assert all(cell.curve for cell in second.cells)


def test_a_suite_measures_every_few_steps(tmp_path, data, calls):
    results = make_suite(tmp_path, [DIRECT], seeds=[0], measured_every=2).run(**data)
    assert all(c.curve.step == [0, 2, 4, 6] for c in results.cells if c.model != "scratch")
    assert results.facts["measured_every"] == 2
    calls.clear()
    make_suite(tmp_path, [DIRECT], seeds=[0], measured_every=3).run(**data)
    assert len(calls) == 3, "other points are other cells"
    with pytest.raises(ValueError, match="measured_every is 0, but must be a number of steps"):
        make_suite(tmp_path, measured_every=0)


def test_benign_fine_tunability_is_the_same_sweep_on_an_allowed_task(tmp_path, data):
    allowed = make_points(7)
    benign, test = allowed.select(range(60)), allowed.select(range(60, 120))
    results = make_suite(tmp_path / "both").run(**data, benign_dataset=benign, benign_eval_dataset=test)
    changed = {"restricted_dataset": benign, "eval_dataset": test}
    alone = make_suite(tmp_path / "alone").run(**{**data, **changed})
    means = {name: alone.best(name).mean for name in ("protected", "original", "scratch")}
    assert results.benign == {**means, "difference": means["protected"] - means["original"]}
    assert AttackResults.load(tmp_path / "both" / "results.json").benign == results.benign
    # The restricted domain's own result is what it is without.
    assert results.best("protected") == make_suite(tmp_path / "both").run(**data).best("protected")
    with pytest.raises(ValueError, match="go together"):
        make_suite(tmp_path).run(**data, benign_dataset=benign)


def test_original_metric_and_baselines(tmp_path, data):
    held_out = make_points(3)
    results = make_suite(tmp_path, [DIRECT], seeds=[0]).run(
        **data, original_eval_dataset=held_out, baselines={"ntl": make_model(4)}
    )
    for name, model in (("protected", data["protected"]), ("original", data["original"]), ("ntl", make_model(4))):
        x, labels = torch.tensor(held_out["x"]), torch.tensor(held_out["label"])
        expected = (model.eval()(x).argmax(dim=1) == labels).float().mean().item()
        assert results.original_metric[name] == pytest.approx(expected)
    assert [c.model for c in results.cells] == ["protected", "original", "ntl", "scratch"]


def test_an_original_domain_of_more_classes_than_the_head_is_refused(tmp_path, data):
    with pytest.raises(ValueError, match="original domain's test split has 5 classes, more than the model's head"):
        make_suite(tmp_path).run(**data, original_eval_dataset=make_points(3, num_classes=5))


def test_budget(tmp_path, data):
    """A tenth for validation first, then as many of the rest as are asked for; epochs keep their proportion."""
    long = DIRECT.with_changes(epochs=40, learning_rate=0.02)
    suite = make_suite(tmp_path, [DIRECT.with_changes(epochs=20), long], seeds=[0], examples=25, epochs=2)
    assert [s.epochs for s in suite.strategies] == [2, 4]
    results = suite.run(**data)
    assert results.facts["training_examples"] == 25
    assert {c.curve.step[-1] for c in results.cells} == {3, 5}


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


class Wider(TinyNet):
    def __init__(self):
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(6, 17), nn.BatchNorm1d(17), nn.Linear(17, 3)


class Deeper(TinyNet):
    def __init__(self):
        super().__init__()
        self.more = nn.Linear(3, 3)


@pytest.mark.parametrize(
    "other, message",
    [
        (Wider, r"protected model differs in architecture .*\('body.weight', \(16, 6\)\) against .*\(17, 6\)"),
        (Deeper, "protected model differs in architecture or head from the original one. Compare"),
        (lambda: TinyNet(4), "'head.weight'"),
    ],
)
def test_models_of_other_architecture_are_refused(tmp_path, data, other, message):
    with pytest.raises(ValueError, match=message):
        make_suite(tmp_path).run(**{**data, "protected": other()})


@pytest.mark.parametrize(
    "validation, test, message",
    [
        (range(60, 80), range(55, 120), "training examples are in the test split too"),
        (range(50, 70), range(70, 120), "10 of the adversary's training examples are in the validation split too"),
        (range(60, 80), range(75, 120), "5 of the adversary's validation examples are in the test split too"),
    ],
)
def test_overlapping_data_are_refused(tmp_path, data, validation, test, message):
    points = make_points(1)
    data |= {"validation_dataset": points.select(validation), "eval_dataset": points.select(test)}
    with pytest.raises(ValueError, match=message):
        make_suite(tmp_path).run(**data)
    assert not (tmp_path / "cells").exists()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"sweep": []}, "sweep is empty"),
        ({"seeds": []}, "at least one, each once"),
        ({"seeds": [1, 1]}, r"seeds are \[1, 1\]"),
    ],
)
def test_bad_settings_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make_suite(tmp_path, **settings)


# Seeds as one stack.

STEADY = NEW_HEAD.with_changes(optimizer="momentum")


@pytest.mark.parametrize(
    "strategy",
    [STEADY, STEADY.with_changes(optimizer="sgd", transfer="head"), STEADY.with_changes(schedule="linear", warmup=0.2),
     STEADY.with_changes(preparation="shrink_and_perturb", weight_decay=0.01), STEADY.with_changes(initialization="scratch")],
    ids=["all", "head", "schedule", "prepared", "scratch"],
)  # fmt: skip
def test_a_stack_of_seeds_does_what_each_does_alone(model, parts, strategy):
    """Weights, running statistics and what is measured on the way."""
    ended, settings = {}, {"validation": parts["validation"], "epochs": (0, 1, 2)}
    arguments = (model, infer_task(model), strategy, parts["training"], parts["test"])
    together = run_attacks(
        *arguments, seeds=[3, 4, 5], at_end=lambda s, m: ended.update({s: m.state_dict()}), **settings
    )
    for seed, curve in zip([3, 4, 5], together):
        alone = {}
        expected = run_attack(*arguments, seed=seed, at_end=lambda s, m: alone.update(m.state_dict()), **settings)
        assert (curve.step, curve.epoch) == (expected.step, expected.epoch)
        for name in ("loss", "gradient_norm", "test", "validation"):
            assert getattr(curve, name) == pytest.approx(getattr(expected, name), rel=1e-3, nan_ok=True)
        assert alone.keys() == ended[seed].keys()
        torch.testing.assert_close(ended[seed], alone, rtol=1e-3, atol=1e-5)
    assert not torch.equal(ended[3]["head.weight"], ended[4]["head.weight"])


@pytest.mark.parametrize(
    "strategy, dropout, reason",
    [
        (NEW_HEAD.with_changes(adapter="lora"), 0.0, "an adapter"),
        (NEW_HEAD.with_changes(max_grad_norm=1.0), 0.0, "clipping of the gradient"),
        (NEW_HEAD, 0.1, "Dropout"),
    ],
)
def test_what_cannot_be_stacked_is_refused_with_its_reason(model, parts, strategy, dropout, reason):
    model.norm = nn.Sequential(model.norm, nn.Dropout(dropout))
    arguments = (model, infer_task(model), strategy, parts["training"], parts["test"])
    with pytest.raises(ValueError, match=f"cannot be stacked, because of {reason}: run them one by one"):
        run_attacks(*arguments, seeds=[0, 1])
    assert len(run_attacks(*arguments, seeds=[0])) == 1


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


# Two processes. The test reads `run` from the script too.

SCRIPT = """
import sys

import datasets
import torch
from torch import nn

from sophon_hf import AttackSuite, FineTuningStrategy

torch.set_num_threads(1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


def points(first, last):
    x = torch.randn(120, 6, generator=torch.Generator().manual_seed(0))
    labels = x[:, :3].argmax(dim=1)
    features = datasets.Features(
        {"x": datasets.List(datasets.Value("float32")), "label": datasets.ClassLabel(names=["a", "b", "c"])}
    )
    values = {"x": x[first:last].numpy(), "label": labels[first:last].tolist()}
    return datasets.Dataset.from_dict(values, features=features)


def run(folder):
    torch.manual_seed(0)
    original, protected = Net(), Net()
    strategies = [FineTuningStrategy(start, epochs=2, batch_size=20) for start in ("direct", "new_head")]
    suite = AttackSuite(strategies, folder, seeds=[0, 1], measured_epochs=[0, 1, 2])
    data = dict(restricted_dataset=points(0, 60), eval_dataset=points(60, 120))
    return suite.run(protected=protected, original=original, **data)


if __name__ == "__main__":
    from accelerate import PartialState

    results, state = run(sys.argv[1]), PartialState()
    assert state.num_processes == 2
    with open(f"{sys.argv[1]}/rank-{state.process_index}.txt", "w") as file:
        file.write(repr(results.cells))
"""


def test_two_processes_share_the_cells_and_find_what_one_finds(tmp_path):
    (tmp_path / "run.py").write_text(SCRIPT)
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
        str(tmp_path / "run.py"), str(tmp_path / "two"),
    ]  # fmt: skip
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert process.returncode == 0, process.stderr[-3000:]

    one = runpy.run_path(str(tmp_path / "run.py"))["run"](tmp_path / "one")
    seen = [(tmp_path / "two" / f"rank-{rank}.txt").read_text() for rank in range(2)]
    assert seen == [repr(one.cells)] * 2
    names = [sorted(path.name for path in (tmp_path / folder / "cells").iterdir()) for folder in ("one", "two")]
    assert names[0] == names[1] and len(names[0]) == 10
    saved = json.loads((tmp_path / "two" / "results.json").read_text())
    assert all(cell["curve"] for cell in saved["cells"])

"""Adversaries with few examples, those who shrink and perturb, and the reinforcement at the end of a run."""

import pytest
import torch
from observed import Observer, guarded
from points import fitted, make_points

from sophon_hf import ClassificationTask, FineTuningStrategy, SophonTrainer, StrategySpace
from sophon_hf.data.domain import build_domain
from sophon_hf.finetuning.preparations import PERTURB, SHRINK
from sophon_hf.protection.simulation import SimulatedAdversary
from sophon_hf.tasks.base import infer_task


@pytest.fixture
def domain():
    return build_domain(make_points(1), infer_task(fitted()).inputs(fitted()), name="restricted")


def test_an_adversary_with_few_examples_has_as_many_of_every_class(domain):
    rows = [
        SimulatedAdversary(
            domain, ClassificationTask(), FineTuningStrategy(), seed=seed, updates=4, examples=examples
        ).R.indices
        for seed, examples in ((0, 9), (0, 9), (1, 9), (0, 10), (0, None), (0, 10_000))
    ]
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])
    assert [len(part) for part in rows] == [9, 9, 9, 10, 108, 108], "a tenth of the 120 examples is T_i"
    for part in rows[:4]:
        counts = torch.bincount(domain.labels[part], minlength=3)
        assert counts.max() - counts.min() <= 1
        assert len(part.unique()) == len(part)


def test_the_number_of_examples_is_drawn_from_phi():
    space = StrategySpace(examples=(20, None))
    assert {space.sample_examples(seed) for seed in range(20)} == {20, None}
    assert StrategySpace.from_dict(space.to_dict()) == space


def test_a_simulated_adversary_shrinks_and_perturbs_before_its_first_update(domain):
    model = fitted()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    strategy = FineTuningStrategy(preparation="shrink_and_perturb")
    adversary = SimulatedAdversary(domain, ClassificationTask(), strategy, seed=0, updates=1)
    adversary.resume(model, begin=None)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert torch.equal(parameter, before[name])
        else:
            noise = (parameter - SHRINK * before[name]) / before[name].std(correction=0)
            assert 0.7 < float(noise.std() / PERTURB) < 1.4


def test_the_last_iterations_are_reinforcement_alone(tmp_path):
    observer = Observer()
    args = guarded(tmp_path, max_steps=4, recovery_ratio=0.5, alpha=0.05, beta=1e-9, tolerance=1.0, weight_decay=0.0)
    SophonTrainer(fitted(), make_points(1), make_points(2), args, callbacks=[observer]).train()
    weights = [evaluation["model"]["body.weight"] for evaluation in observer.evaluations[:5]]
    moved = [float((new - old).norm()) for old, new in zip(weights, weights[1:], strict=False)]
    assert min(moved[:2]) > 1e-2 and max(moved[2:]) < 1e-6
    assert ["L_FTS" in entry for entry in observer.steps] == [True, True, False, False]
    assert [entry["alpha"] for entry in observer.steps] == [0.05, 0.05, 0.0, 0.0]


def test_evaluations_tell_what_few_shot_adversaries_recover(tmp_path):
    observer = Observer()
    known, original = make_points(2), make_points(1)  # The model is fitted to the first.
    held_out = {"original": original.select(range(60)), "restricted": known.select(range(60))}
    args = guarded(tmp_path, max_steps=1, tolerance=1.0, simulated_examples=6, alpha=1e-6)
    halves = (data.select(range(60, 120)) for data in (known, original))
    trainer = SophonTrainer(fitted(), *halves, args, eval_dataset=held_out, callbacks=[observer])
    trainer.train()
    name = "eval_restricted_simulated_recovered_transfer"
    assert observer.evaluations[0][name] == pytest.approx(1.0), "nothing is protected yet"
    guard, last = trainer.guard.state, observer.evaluations[-1]
    expected = (last["eval_restricted_simulated_accuracy"] - guard.scratch) / (guard.start_simulated - guard.scratch)
    assert last[name] == pytest.approx(expected)

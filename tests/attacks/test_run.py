"""One attack, of one seed or of several as a stack."""

from __future__ import annotations

import datasets
import pytest
import torch
from attacked import DIRECT, NEW_HEAD, STEADY
from points import make_points
from torch import nn

from sophon_hf.attacks.run import run_attack, run_attacks
from sophon_hf.data.domain import build_domain
from sophon_hf.tasks.base import infer_task
from sophon_hf.tasks.evaluation import evaluate_model


@pytest.fixture
def parts(model) -> dict:
    """One rule, cut into the adversary's 40, 20 validation and 60 test examples."""
    needs, points = infer_task(model).inputs(model), make_points(1)
    ranges = {"training": range(40), "validation": range(40, 60), "test": range(60, 120)}
    return {name: build_domain(points.select(rows), needs, name="restricted") for name, rows in ranges.items()}


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


def test_a_long_attack_is_measured_at_every_tenth_beyond_the_usual_epochs(model, parts):
    task, usual = infer_task(model), [0, 1, 5, 10, 15, 20]
    epochs = {}
    for length, steps in ((20, None), (23, None), (60, None), (20, 100), (3, 100)):
        strategy = NEW_HEAD.with_changes(epochs=length, steps=steps)
        epochs[length, steps] = run_attack(model, task, strategy, parts["training"], parts["test"]).epoch
    assert epochs[20, None] == usual
    assert epochs[23, None] == [*usual, pytest.approx(20.7), 23]
    assert epochs[60, None] == [*usual, 24, 30, 36, 42, 48, 54, 60]
    # A hundred steps of 20 out of 40 examples are 50 epochs.
    assert epochs[20, 100] == epochs[3, 100] == [*usual, 25, 30, 35, 40, 45, 50]


def test_a_class_that_only_the_test_split_has_counts_as_wrong(model, parts):
    """Plain integers name no classes, so a new head has outputs for those of the training split."""
    points = make_points(1, num_classes=4)
    points = points.cast_column("label", datasets.Value("int64"))
    known = [i for i, label in enumerate(points["label"]) if label < 3]
    needs = infer_task(model).inputs(model)
    training = build_domain(points.select(known[:40]), needs)
    test = build_domain(points.select([i for i in range(120) if i not in known[:40]]), needs)
    ended = {}
    curve = run_attack(
        model, infer_task(model), NEW_HEAD, training, test, at_end=lambda seed, m: ended.update({seed: m})
    )
    x, labels = test.rows(torch.arange(len(test))).values()
    right = ended[0].eval()(x).argmax(dim=1) == labels
    assert (labels == 3).any() and ended[0].head.out_features == 3
    assert curve.test[-1] == pytest.approx(right.float().mean().item())


# Seeds as one stack.


@pytest.mark.parametrize(
    "strategy",
    [STEADY, STEADY.with_changes(optimizer="sgd", transfer="head"), STEADY.with_changes(schedule="linear", warmup_ratio=0.2),
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

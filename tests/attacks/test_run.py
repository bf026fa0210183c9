"""One attack: when it is measured, what decides it, and that it leaves the model as it is."""

from __future__ import annotations

import copy

import datasets
import pytest
import torch
from attacked import DIRECT, NEW_HEAD
from points import make_points

from sophon_hf.attacks.adversary import AdversaryDomains
from sophon_hf.attacks.run import Curve, run_attack
from sophon_hf.data.domain import build_domain
from sophon_hf.tasks.base import infer_task
from sophon_hf.tasks.evaluation import evaluate_model


@pytest.fixture
def data(model) -> AdversaryDomains:
    """One rule, cut into the adversary's 40, 20 validation and 60 test examples."""
    needs, points = infer_task(model).inputs(model), make_points(1)
    ranges = {"training": range(40), "validation": range(40, 60), "test": range(60, 120)}
    return AdversaryDomains(
        **{name: build_domain(points.select(rows), needs, name="restricted") for name, rows in ranges.items()}
    )


def test_an_attack_measures_where_asked_and_at_its_end(model, data):
    strategy = DIRECT.with_changes(epochs=3)
    curve = run_attack(model, infer_task(model), strategy, data, measured=(0, 0.5, 2, 7))
    assert (curve.epoch, curve.step) == ([0, 0.5, 2, 3], [0, 1, 4, 6])
    assert len(curve.test) == len(curve.loss) == len(curve.gradient_norm) == 4
    assert len(curve.validation) == 4


def test_an_attack_measures_every_few_steps(model, data):
    strategy = DIRECT.with_changes(epochs=4)
    arguments = (model, infer_task(model), strategy, data)
    curve = run_attack(*arguments, measured=3)
    assert (curve.step, curve.epoch) == ([0, 3, 6, 8], [0, 1.5, 3, 4])
    by_epoch = run_attack(*arguments, measured=(0, 1.5, 3))
    assert curve.test == by_epoch.test, "measuring leaves no trace in the attack"
    assert run_attack(*arguments, measured=1).step == list(range(9))


def test_an_attack_starts_from_the_model_as_it_is_and_leaves_it_so(model, data):
    task = infer_task(model)
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    curve = run_attack(model, task, DIRECT, data)
    assert curve.test[0] == evaluate_model(task, model, data.test, 7).metric
    assert curve.validation[0] == evaluate_model(task, model, data.validation, 7).metric
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.training and all(p.grad is None and p.requires_grad for p in model.parameters())


def test_equal_starts_are_measured_once(model, data):
    task, starts, measured = infer_task(model), {}, []
    model.register_forward_hook(lambda module, *_: None if module.training else measured.append(module))

    def run(strategy, **shared):
        measured.clear()
        curve = run_attack(model, task, strategy, data, measured=(0, 1), **shared)
        return repr(curve), len(measured)

    for strategy in (DIRECT, DIRECT.with_changes(learning_rate=1e-4), NEW_HEAD, NEW_HEAD.with_changes(ema=0.9)):
        alone, first, again = run(strategy), run(strategy, starts=starts), run(strategy, starts=starts)
        assert first[0] == again[0] == alone[0]
        assert again[1] < alone[1]
    assert len(starts) == 4, "two starts, each on two splits"
    assert first[1] == again[1], "a rate or an average changes no start"


def test_an_attack_learns_and_is_decided_by_its_seed(model, data):
    def run(seed):
        strategy = NEW_HEAD.with_changes(epochs=20)
        return run_attack(model, infer_task(model), strategy, data, seed=seed)

    first, again, other = run(0), run(0), run(1)
    assert repr(first) == repr(again) != repr(other)
    assert first.test[-1] > first.test[0] + 0.2
    assert first.loss[-1] < first.loss[1]


def test_an_adversary_without_labels_adapts_the_features_alone(model, data):
    strategy = DIRECT.with_changes(transfer="features", labelled=False, learning_rate=3e-2)
    before, tuned, other = dict(model.named_parameters()), [], copy.deepcopy(data)
    other.training.labels[:] = 0

    def run(data: AdversaryDomains) -> Curve:
        return run_attack(model, infer_task(model), strategy, data, at_end=tuned.append)

    first, blind = run(data), run(other)
    assert first.test == blind.test, "it sees no label"
    assert first.loss[-1] < first.loss[1]
    kept = {name for name, p in tuned[0].named_parameters() if torch.equal(p, before[name])}
    assert kept == {"head.weight", "head.bias"}


def test_after_step_hears_of_every_step(model, data):
    heard = []
    run_attack(
        model,
        infer_task(model),
        DIRECT,
        data,
        measured=(),
        after_step=lambda *s: heard.append(s),
    )
    assert heard == [(step, 4) for step in range(1, 5)]


def test_a_long_attack_is_measured_at_every_tenth_beyond_the_usual_epochs(model, data):
    task, usual = infer_task(model), [0, 1, 5, 10, 15, 20]
    epochs = {}
    for length, steps in ((20, None), (23, None), (60, None), (20, 100), (3, 100)):
        strategy = NEW_HEAD.with_changes(epochs=length, steps=steps)
        epochs[length, steps] = run_attack(model, task, strategy, data).epoch
    assert epochs[20, None] == usual
    assert epochs[23, None] == [*usual, pytest.approx(20.7), 23]
    assert epochs[60, None] == [*usual, 24, 30, 36, 42, 48, 54, 60]
    # A hundred steps of 20 out of 40 examples are 50 epochs.
    assert epochs[20, 100] == epochs[3, 100] == [*usual, 25, 30, 35, 40, 45, 50]


def test_a_class_that_only_the_test_split_has_counts_as_wrong(model, data):
    """Plain integers name no classes, so a new head has outputs for those of the training split."""
    points = make_points(1, num_classes=4)
    points = points.cast_column("label", datasets.Value("int64"))
    known = [i for i, label in enumerate(points["label"]) if label < 3]
    needs = infer_task(model).inputs(model)
    training = build_domain(points.select(known[:40]), needs)
    test = build_domain(points.select([i for i in range(120) if i not in known[:40]]), needs)
    ended = []
    curve = run_attack(model, infer_task(model), NEW_HEAD, AdversaryDomains(training, test), at_end=ended.append)
    x, labels = test.rows(torch.arange(len(test))).values()
    right = ended[0].eval()(x).argmax(dim=1) == labels
    assert (labels == 3).any() and ended[0].head.out_features == 3
    assert curve.test[-1] == pytest.approx(right.float().mean().item())

"""The attack without a training step: kernel regression on the features of all depths."""

from __future__ import annotations

import pytest
import torch
from pairs import ResidualNet
from points import TinyNet, make_points
from torch.nn import functional as F

from sophon_hf import FineTuningStrategy
from sophon_hf.attacks.adversary import AdversaryDomains
from sophon_hf.attacks.run import run_attack
from sophon_hf.data.domain import build_domain
from sophon_hf.finetuning.kernel import RIDGES, KernelRegression, tangent_kernel, watched_features
from sophon_hf.tasks.base import infer_task


def make(examples: int = 60):
    torch.manual_seed(0)
    model = TinyNet()
    task = infer_task(model)
    points = make_points(1, 400)
    parts = (points.select(range(examples)), points.select(range(200, 400)))
    training, test = (build_domain(part, task.inputs(model), name="restricted") for part in parts)
    return model, task, training, test


def test_the_regression_is_the_one_of_a_linear_system_and_its_ridge_is_chosen_by_leaving_one_out():
    model, task, training, test = make(30)
    structure = task.structure(model, training.rows(torch.arange(30)))
    found = KernelRegression(model, task, training, structure)
    x, labels = training.rows(torch.arange(30))["x"], training.labels
    model.eval()
    hidden = torch.tanh(model.norm(model.body(x))).detach().double()
    mean, spread = hidden.mean(0), hidden.std(0, correction=0) + 1e-4

    def solve(rows: list[int], ridge: float):
        known, y = (hidden[rows] - mean) / spread, F.one_hot(labels, 3).double() - F.one_hot(labels, 3).double().mean(0)
        weights = torch.linalg.solve(tangent_kernel(known, known) + ridge * torch.eye(len(rows)), y[rows])
        return lambda h: tangent_kernel((h - mean) / spread, known) @ weights + F.one_hot(labels, 3).double().mean(0)

    def left_out_error(ridge: float) -> float:
        total = 0.0
        for i in range(30):
            predicted = solve([j for j in range(30) if j != i], ridge)(hidden[i : i + 1])
            total += float((predicted - F.one_hot(labels[i : i + 1], 3)).square().mean())
        return total

    assert found.ridge == min(RIDGES, key=left_out_error)
    h = torch.tanh(model.norm(model.body(test.rows(torch.arange(9))["x"]))).detach().double()
    torch.testing.assert_close(found(x=test.rows(torch.arange(9))["x"]), solve(list(range(30)), found.ridge)(h))


def test_the_attack_takes_one_point_and_learns_without_a_step():
    model, task, training, test = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attack = FineTuningStrategy("new_head", transfer="kernel")
    curve = run_attack(model, task, attack, AdversaryDomains(training, test, test))
    assert (curve.epoch, curve.step, attack.total_steps(60)) == ([0.0], [0], 0)
    assert curve.test == curve.validation and curve.test[0] > 0.6
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_from_scratch_it_uses_the_features_of_a_model_that_was_never_trained():
    model, task, training, test = make()
    strategy, data = FineTuningStrategy("scratch", transfer="kernel"), AdversaryDomains(training, test, test)
    curve = run_attack(model, task, strategy, data)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-3)
    assert run_attack(model, task, strategy, data).test == curve.test, "the model's weights do not matter"
    assert run_attack(model, task, FineTuningStrategy("new_head", transfer="kernel"), data).test != curve.test


def test_features_of_every_depth_count_alike():
    torch.manual_seed(0)
    model = ResidualNet(4, (4, 8, 16)).eval()
    blocks = ("stages.0", "stages.1", "stages.2")
    with watched_features(model, blocks, ("head",)) as features:
        model(torch.rand(5, 3, 16, 16))
    assert [part.shape for part in features] == [(5, 16), (5, 32), (5, 64), (5, 16)]
    assert not model.head._forward_pre_hooks and not model.stages[0]._forward_hooks


def test_it_goes_with_a_new_head_on_a_model_as_it_is_or_on_a_new_one():
    with pytest.raises(ValueError, match="'kernel' is a new head on a model as it is"):
        FineTuningStrategy(transfer="kernel")
    assert FineTuningStrategy("new_head", transfer="kernel").name == "new head, kernel regression"

"""Non-transferable learning, the baseline that lowers restricted accuracy before fine-tuning only."""

from __future__ import annotations

import math

import datasets
import pytest
import torch
from points import TinyNet, make_points

from sophon_hf import FineTuningStrategy
from sophon_hf.attacks.adversary import AdversaryDomains
from sophon_hf.attacks.run import run_attack
from sophon_hf.data.domain import build_domain
from sophon_hf.finetuning.loop import FineTuning
from sophon_hf.protection.ntl import maximum_mean_discrepancy, ntl_loss, train_ntl
from sophon_hf.tasks.base import infer_task
from sophon_hf.tasks.evaluation import evaluate_model

SHIFT = 3.0


def naive_mmd(source: torch.Tensor, target: torch.Tensor) -> float:
    points = [*source.tolist(), *target.tolist()]
    n, m = len(source), len(points)
    squared = [[sum((a - b) ** 2 for a, b in zip(p, q)) for q in points] for p in points]
    mean = sum(map(sum, squared)) / (m * m - m)
    total = 0.0
    for i in range(m):
        for j in range(m):
            sign = 1 if (i < n) == (j < n) else -1
            for width in (mean / 4, mean / 2, mean, 2 * mean, 4 * mean):
                total += sign * math.exp(-squared[i][j] / width) / n**2
    return total


@pytest.mark.parametrize("shift", [0.0, 0.5, 3.0])
def test_discrepancy(shift):
    generator = torch.Generator().manual_seed(0)
    source, target = torch.randn(2, 7, 4, generator=generator, dtype=torch.float64)
    assert maximum_mean_discrepancy(source, target + shift).item() == pytest.approx(naive_mmd(source, target + shift))


def test_discrepancy_of_a_sample_with_itself_is_zero():
    source = torch.randn(6, 3)
    assert maximum_mean_discrepancy(source, source.flip(0)).item() == pytest.approx(0, abs=1e-5)
    assert maximum_mean_discrepancy(torch.ones(4, 3), torch.ones(4, 3)).item() == 0


@pytest.mark.parametrize("scale, discrepancy", [(1.0, 2.0), (100.0, 2.0), (1.0, 50.0), (100.0, 50.0)])
def test_loss(scale, discrepancy):
    generator = torch.Generator().manual_seed(0)
    logits, other = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 0, 1])

    def cross_entropy(z):
        return sum(-math.log(math.exp(r[y]) / sum(map(math.exp, r))) for r, y in zip(z.tolist(), labels.tolist())) / 5

    far = cross_entropy(scale * other)
    expected = cross_entropy(logits) - min(1, 0.1 * far) * min(1, 0.1 * discrepancy)
    loss = ntl_loss(logits, labels, scale * other, labels, torch.tensor(discrepancy, dtype=torch.float64))
    assert loss.item() == pytest.approx(expected)


def shifted(points: datasets.Dataset, shift: float) -> datasets.Dataset:
    return points.map(lambda row: {"x": [value + shift for value in row["x"]]}, features=points.features)


def test_ntl_lowers_restricted_accuracy_until_it_is_fine_tuned():
    torch.manual_seed(0)
    model = TinyNet(batch_norm=False)
    task = infer_task(model)
    needs, points = task.inputs(model), make_points(0, 400)
    original = build_domain(points.select(range(200)), needs, name="original")
    restricted = build_domain(shifted(points.select(range(200, 300)), SHIFT), needs, name="restricted")
    test = build_domain(shifted(points.select(range(300, 400)), SHIFT), needs, name="restricted")
    batch = original.rows(torch.arange(200))
    for both in (batch, restricted.rows(torch.arange(100))):
        list(
            FineTuning(
                model,
                task,
                FineTuningStrategy(learning_rate=0.01),
                [both] * 200,
                200,
                structure=task.structure(model, batch),
            )
        )

    def accuracy(domain):
        return evaluate_model(task, model, domain, 100).metric

    before = accuracy(restricted)
    model.eval()
    result = train_ntl(model, task, original, restricted, steps=400, batch_size=50, learning_rate=1e-2)
    assert result is model and not model.head._forward_pre_hooks
    assert before > 0.9 and accuracy(restricted) < 0.4
    assert accuracy(original) > 0.9

    curve = run_attack(
        model, task, FineTuningStrategy(learning_rate=0.01, epochs=30), AdversaryDomains(restricted, test)
    )
    assert curve.test[0] < 0.5 and curve.test[-1] > 0.75


def test_labels_that_the_head_has_no_outputs_for_are_refused(model, domain):
    five = build_domain(make_points(1, num_classes=5), infer_task(model).inputs(model), name="restricted")
    with pytest.raises(ValueError, match="labels that fit the head: 5 classes, 3 outputs"):
        train_ntl(model, infer_task(model), domain, five, steps=1)


def test_ntl_is_decided_by_its_seed(points):
    def train(seed):
        torch.manual_seed(0)
        model = TinyNet()
        needs = infer_task(model).inputs(model)
        original, restricted = (
            build_domain(p, needs, name=n) for p, n in ((points, "original"), (make_points(2), "restricted"))
        )
        return train_ntl(model, infer_task(model), original, restricted, steps=2, seed=seed).body.weight

    assert torch.equal(train(1), train(1)) and not torch.equal(train(1), train(2))

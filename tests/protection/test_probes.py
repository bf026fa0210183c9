"""Probes: their mathematics, where they look, and what the suppression makes of them."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from labelled_data import images, unet
from naive_suppression import assert_gradient, evaluation_mode, make_environment, make_net, suppress
from protected import HEAD_ONLY, build
from tiny_models import small_resnet, small_vit
from torch.nn import functional as F

from sophon_hf import ClassificationTask, SophonConfig, SophonTrainer
from sophon_hf.protection.probes import RIDGE, TEMPERATURE, Probes, leave_one_out_logits, tangent_kernel
from sophon_hf.tasks.losses import inverse_cross_entropy


def naive_kernel(x: np.ndarray, z: np.ndarray) -> float:
    """The tangent kernel of one pair, by its definition: expectations over the angle of two Gaussians."""
    angle = math.acos(np.clip(x @ z / np.linalg.norm(x) / np.linalg.norm(z), -1 + 1e-5, 1 - 1e-5))
    both_active = (math.pi - angle) / (2 * math.pi)
    product = (
        np.linalg.norm(x) * np.linalg.norm(z) * (math.sin(angle) + (math.pi - angle) * math.cos(angle)) / (2 * math.pi)
    )
    return 2 * (product + both_active * (x @ z)) / len(x)


def naive_probe(features: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """One regression an example, which has not seen it: the kernel pair by pair, an intercept that costs nothing."""
    x = (features - features.mean(axis=0)) / (features.std(axis=0) + 1e-4)
    y, logits = np.eye(num_classes)[labels], []
    for left_out in range(len(x)):
        others = [i for i in range(len(x)) if i != left_out]
        system = np.ones((len(others) + 1, len(others) + 1))
        system[:-1, :-1] = [[naive_kernel(x[i], x[j]) + RIDGE * (i == j) for j in others] for i in others]
        system[-1, -1] = 0
        weights = np.linalg.solve(system, np.vstack([y[others], np.zeros(num_classes)]))
        logits.append(np.array([naive_kernel(x[left_out], x[j]) for j in others]) @ weights[:-1] + weights[-1])
    return TEMPERATURE * np.array(logits)


@pytest.mark.parametrize("width", (3, 40))
def test_a_probe_predicts_each_example_from_all_others(width):
    generator = np.random.default_rng(0)
    features, labels = generator.normal(size=(20, width)), generator.integers(0, 3, 20)
    actual = leave_one_out_logits(torch.tensor(features), torch.tensor(labels), 3)
    np.testing.assert_allclose(actual.numpy(), naive_probe(features, labels, 3), atol=2e-3)


def test_the_kernel_is_what_the_gradients_of_a_wide_network_have_in_common():
    """The limit that gives the kernel its name, approached by a network of 100,000 hidden units and autograd."""
    torch.manual_seed(0)
    width, x = 100_000, torch.randn(5, 6, dtype=torch.float64)
    inner = torch.randn(width, 6, dtype=torch.float64, requires_grad=True)
    outer = torch.randn(width, dtype=torch.float64, requires_grad=True)
    outputs = (x @ inner.T / 6**0.5).relu() @ outer * (2 / width) ** 0.5
    slopes = [
        torch.cat([g.flatten() for g in torch.autograd.grad(out, (inner, outer), retain_graph=True)]) for out in outputs
    ]
    slopes = torch.stack(slopes)
    torch.testing.assert_close(tangent_kernel(x, x), slopes.detach() @ slopes.detach().T, rtol=0.03, atol=0.03)


def test_a_probe_sees_what_no_linear_head_could():
    """Labels by the sign of a product: every linear head is at chance, a hidden layer is not."""
    torch.manual_seed(0)
    points = torch.randn(400, 2)
    labels = (points[:, 0] * points[:, 1] > 0).long()
    guesses = leave_one_out_logits(points, labels, 2).argmax(dim=1)
    assert (guesses == labels).float().mean() > 0.9


def test_a_probe_learns_nothing_from_an_example_about_itself():
    """Labels drawn by chance: what fits its own examples would be right, what leaves them out is not."""
    torch.manual_seed(0)
    labels = torch.randint(0, 2, (400,))
    guesses = leave_one_out_logits(torch.randn(400, 50), labels, 2).argmax(dim=1)
    assert 0.4 < (guesses == labels).float().mean() < 0.6


def test_its_gradient_goes_through_the_solution():
    torch.manual_seed(0)
    features = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(9) % 3
    torch.autograd.gradcheck(lambda f: leave_one_out_logits(f, labels, 3), features)


def test_half_precision_and_constant_features_stay_finite():
    features = torch.ones(8, 4, dtype=torch.bfloat16, requires_grad=True)
    logits = leave_one_out_logits(features, torch.arange(8) % 2, 2)
    assert logits.dtype == torch.float32
    (gradient,) = torch.autograd.grad(logits.sum(), features)
    assert gradient.isfinite().all()


def test_probes_add_their_suppression_at_every_step_to_that_of_the_head(float64_domain):
    model = make_net(noisy=False)
    environment = make_environment(float64_domain, 1, batch_size=5, learning_rate=0.01)
    probes = Probes(model, HEAD_ONLY, 1, 3, inverse_cross_entropy)
    result = suppress(model, [environment], [[0.5, 0.5]], structure=HEAD_ONLY, probes=probes)

    adversary, total = copy.deepcopy(model), 0.0
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam(adversary.parameters(), lr=0.01)
    batches, held_out = environment.fine_tuning.batches(5), environment.evaluation.batches(10)
    for _ in range(2):
        batch = next(batches)
        adversary.train().zero_grad()
        F.cross_entropy(adversary(batch["x"]), batch["labels"]).backward()
        optimizer.step()
        batch = next(held_out)
        x, y = batch["x"], batch["labels"]
        evaluation_mode(adversary).zero_grad()
        features = torch.tanh(adversary.body(x))
        loss = inverse_cross_entropy(adversary.head(features), y)
        loss = loss + inverse_cross_entropy(leave_one_out_logits(features, y, 3), y)
        loss.backward()
        total += 0.5 * loss.item()
        for name, parameter in adversary.named_parameters():
            expected[name] += 0.5 * parameter.grad
    assert_gradient(result, (total, expected))


@pytest.mark.parametrize(("make", "shapes"), [(small_resnet, [(4, 32), (4, 16)]), (small_vit, [(4, 12), (4, 12)])])
def test_depths_are_found_in_convolutional_networks_and_transformers(make, shapes):
    model, task = make(), ClassificationTask()
    batch = {"pixel_values": torch.randn(4, 3, 16, 16)}
    structure = task.structure(model, batch)
    probes = Probes(model, structure, 2, 3, inverse_cross_entropy)
    with probes.watching() as features:
        task.predict(model, batch)
    assert [tuple(part.shape) for part in features] == shapes
    assert probes.blocks == [structure.blocks[len(structure.blocks) // 2 - 1]]
    task.predict(model, batch)
    assert len(features) == 2, "the hooks are gone after the block"


def test_more_depths_than_blocks_are_refused(tmp_path):
    with pytest.raises(ValueError, match="probe_depths is 3, but TinyNet has 0 blocks"):
        build(tmp_path, probe_depths=3)


def test_a_task_without_labels_has_no_probes(tmp_path):
    config = SophonConfig(str(tmp_path), probe_depths=1, use_cpu=True)
    with pytest.raises(ValueError, match="A probe predicts labels"):
        SophonTrainer(unet(), images(1), images(2), config)


class Watched(Probes):
    """Notes what it is fitted on."""

    def loss(self, features, target):
        self.seen = [*getattr(self, "seen", []), features[0]]
        return super().loss(features, target)


def test_no_probe_sees_an_example_twice(float64_domain):
    """T_i has 10 examples and a batch 6: a batch that goes on over the end of an epoch would hold copies."""
    model = make_net(noisy=False)
    environment = make_environment(float64_domain, 1, batch_size=3, learning_rate=0.01)
    assert len(environment.evaluation.indices) % 6
    probes = Watched(model, HEAD_ONLY, 1, 3, inverse_cross_entropy)
    suppress(model, [environment], [[0.25] * 4], structure=HEAD_ONLY, probes=probes)
    assert len(probes.seen) == 4
    assert all(len(torch.unique(features, dim=0)) == len(features) == 6 for features in probes.seen)

"""The exact suppression gradient against finite differences."""

import copy

import datasets
import pytest
import torch
from naive_suppression import (
    RATES,
    SMOOTH,
    assert_exact,
    assert_gradient,
    evaluation_mode,
    make_environment,
    make_net,
    naive_first_order,
    naive_loss,
    suppress,
)
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from sophon_hf import ClassificationTask
from sophon_hf.data.domain import build_domain
from sophon_hf.finetuning.loop import FineTuning
from sophon_hf.models.structure import ModelStructure
from sophon_hf.tasks.losses import inverse_cross_entropy, kl_from_uniform


@pytest.mark.parametrize("initialization", ("direct", "new_head"))
@pytest.mark.parametrize("optimizer", RATES)
def test_second_order_equals_finite_differences(float64_domain, optimizer, initialization):
    fields = {"optimizer": optimizer, "learning_rate": RATES[optimizer], "initialization": initialization}
    environments = [make_environment(float64_domain, seed, **fields) for seed in (1, 2)]
    assert_exact(make_net(noisy=False), environments, [[0.2, 0.0, 0.5], [-0.3, 1.0, 0.0]])


@pytest.mark.parametrize("optimizer", RATES)
def test_second_order_with_weight_decay_and_schedule(float64_domain, optimizer):
    rate = RATES[optimizer]
    fields = {"optimizer": optimizer, "learning_rate": rate, "weight_decay": 0.05, "schedule": "linear"}
    environments = [make_environment(float64_domain, 1, **fields)]
    assert_exact(make_net(noisy=False), environments, [[0.5, 0.5]], loss=kl_from_uniform)


@pytest.mark.parametrize("transfer", ("head", "norm"))
def test_second_order_of_partial_transfers(float64_domain, transfer):
    model = make_net(noisy=False)
    model.norm = nn.LayerNorm(8)
    environments = [make_environment(float64_domain, 1, transfer=transfer, optimizer="sgd", learning_rate=0.5)]
    assert_exact(model, environments, [[0.5, 0.5, 1.0]])


def test_second_order_follows_clipped_gradients(float64_domain):
    fields = {"optimizer": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.05}
    assert_exact(make_net(noisy=False), [make_environment(float64_domain, 1, **fields)], [[0.5, 0.5]])


def test_second_order_evaluates_each_step_with_that_steps_batch_norm_statistics(float64_domain):
    model = make_net()
    model.dropout.p = 0.0
    gamma = [[0.2, 0.3, 0.5]]
    environments = [make_environment(float64_domain, 1, optimizer="sgd", learning_rate=0.1)]
    result = suppress(model, environments, gamma, second_order=True)
    assert float(result.loss) == pytest.approx(naive_loss(model, environments, gamma), rel=1e-9)
    # The statistics move at any rate, and at a tiny one the two orders agree.
    environments = [make_environment(float64_domain, 1, optimizer="sgd", learning_rate=1e-12)]
    result = suppress(model, environments, gamma, second_order=True)
    assert_gradient(result, naive_first_order(model, environments, gamma))


def test_second_order_goes_through_attention():
    torch.manual_seed(0)
    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 8, "intermediate_size": 8, "num_labels": 3}
    model = ViTForImageClassification(ViTConfig(num_hidden_layers=1, num_attention_heads=2, **sizes)).eval()
    pixels = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    dataset = datasets.Dataset.from_dict({"pixel_values": pixels.tolist(), "label": [i % 3 for i in range(40)]})
    domain = build_domain(dataset, ClassificationTask().inputs(model))
    environments = [make_environment(domain, 1, optimizer="sgd", learning_rate=1e-8)]
    first, second = (
        suppress(model, environments, [[0.5, 0.5]], structure=ModelStructure("classifier", ()), second_order=exact)
        for exact in (False, True)
    )
    for name, tensor in second.gradient.items():
        torch.testing.assert_close(tensor, first.gradient[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("optimizer", ("sgd", "momentum", "adagrad", "adam"))
def test_second_order_differs_from_first_order_but_tends_to_it(float64_domain, optimizer):
    model = make_net(noisy=False)

    def distance(rate: float) -> float:
        environments = [make_environment(float64_domain, 1, optimizer=optimizer, learning_rate=rate)]
        first, second = (suppress(model, environments, [[0.3] * 3], second_order=exact) for exact in (False, True))
        assert float(first.loss) == pytest.approx(float(second.loss), rel=1e-10)
        gaps = [(first.gradient[n] - second.gradient[n]).norm() / first.gradient[n].norm() for n in first.gradient]
        return float(max(gaps))

    far, near = distance(RATES[optimizer]), distance(RATES[optimizer] * 1e-5)
    assert far > 1e-3
    assert near < 2e-4 * far


def test_the_simulation_is_the_fine_tuning_that_an_attacker_runs(float64_domain):
    model = make_net()
    environment = make_environment(float64_domain, 1, learning_rate=0.01, initialization="new_head")
    seen = []

    def spy(prediction, target):
        seen.append(prediction.detach())
        return inverse_cross_entropy(prediction, target)

    suppress(model, [environment], [[0.0, 0.0, 1.0]], loss=spy)
    attacked = copy.deepcopy(model)
    torch.manual_seed(environment.seed)
    batches = environment.fine_tuning.batches(20)
    list(FineTuning(attacked, ClassificationTask(), environment.strategy, batches, 3, structure=SMOOTH))
    assert torch.equal(seen[0], evaluation_mode(attacked)(environment.evaluation.batch(20, 10)["x"]).detach())

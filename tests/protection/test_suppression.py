"""The suppression gradient against a naive implementation, what it costs, and what it leaves behind."""

import copy
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from naive_suppression import (
    RATES,
    SMOOTH,
    assert_exact,
    assert_gradient,
    evaluation_mode,
    make_environment,
    make_net,
    naive_first_order,
    simulate,
    suppress,
)
from points import make_points

from sophon_hf import ClassificationTask, DiffusionTask
from sophon_hf.data.domain import build_domain
from sophon_hf.models.structure import ModelStructure
from sophon_hf.protection.suppression import Suppression
from sophon_hf.tasks.losses import denial_of_service, inverse_cross_entropy, kl_from_uniform

# First order.


class Masking(torch.nn.Module):
    """Draws from NumPy while it trains, as the masks of audio models do."""

    def __init__(self):
        super().__init__()
        self.body, self.head = torch.nn.Linear(6, 8), torch.nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            x = x * torch.from_numpy(np.random.uniform(size=x.shape))
        return self.head(torch.tanh(self.body(x)))


def test_the_same_adversary_draws_the_same_from_numpy_and_puts_its_state_back(float64_domain):
    torch.manual_seed(0)
    model, environment = Masking(), make_environment(float64_domain, 1, learning_rate=0.01)
    np.random.seed(1)
    first = suppress(model, [environment], [[0.5, 0.5]]).gradient
    drawn = np.random.uniform()
    np.random.seed(1)
    assert drawn == np.random.uniform()
    second = suppress(model, [environment], [[0.5, 0.5]]).gradient
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("initialization", ("direct", "new_head"))
@pytest.mark.parametrize("optimizer", RATES)
def test_first_order_equals_the_naive_implementation(float64_domain, optimizer, initialization):
    model = make_net()
    fields = {"optimizer": optimizer, "learning_rate": RATES[optimizer], "initialization": initialization}
    environments = [make_environment(float64_domain, seed, **fields) for seed in (1, 2)]
    gamma = [[0.25] * 4, [0.1, 0.2, 0.3, 0.4]]
    result = suppress(model, environments, gamma)
    assert_gradient(result, naive_first_order(model, environments, gamma))
    assert all(
        bool(g.any()) for n, g in result.gradient.items() if not n.startswith("head.") or initialization == "direct"
    )


@pytest.mark.parametrize(
    "gamma",
    (
        [[0.0, 0.0, 1.0, 0.0], [0.0, 0.5, 0.0, 0.0]],
        [[1.0, -2.0, 0.5, 3.0], [-1.0, 0.0, 0.0, 1e-3]],
        [[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 7.0]],
        [[1.0], [0.0, 1.0]],
    ),
)
def test_gamma_may_be_any_numbers(float64_domain, gamma):
    model = make_net()
    environments = [
        make_environment(float64_domain, 1, learning_rate=0.01),
        make_environment(float64_domain, 2, learning_rate=0.01, initialization="new_head"),
    ]
    assert_gradient(suppress(model, environments, gamma), naive_first_order(model, environments, gamma))


def test_strategies_of_all_kinds_may_be_mixed(float64_domain):
    model = make_net()
    environments = [
        make_environment(float64_domain, 1, optimizer="adamw", learning_rate=0.01, weight_decay=0.1),
        make_environment(float64_domain, 2, optimizer="sgd", learning_rate=0.1, transfer="head", batch_size=7),
        make_environment(float64_domain, 3, optimizer="momentum", learning_rate=0.1, transfer="norm", batch_size=500),
        make_environment(float64_domain, 4, learning_rate=0.01, max_grad_norm=0.1, initialization="new_head"),
    ]
    gamma = [[0.1, 0.2, 0.3]] * 4
    result = suppress(model, environments, gamma, loss=kl_from_uniform)
    assert_gradient(result, naive_first_order(model, environments, gamma, kl_from_uniform))
    assert [adversary.strategy for adversary in result.adversaries] == [e.strategy.name for e in environments]


@pytest.mark.parametrize("gamma", ([[0.1, 0.2, 0.3, 0.4]], [[0.0, 0.0, 1.0, 0.0]]))
@pytest.mark.parametrize("second_order", (False, True))
def test_a_schedule_runs_over_all_steps_whatever_the_last_weights_are(float64_domain, gamma, second_order):
    model = make_net(noisy=not second_order)
    environments = [make_environment(float64_domain, 1, optimizer="sgd", learning_rate=0.5, schedule="linear")]
    if second_order:
        assert_exact(model, environments, gamma)
    else:
        assert_gradient(suppress(model, environments, gamma), naive_first_order(model, environments, gamma))


def test_the_adversaries_losses_and_scores_are_told(float64_domain):
    model = make_net()
    environments = [
        make_environment(float64_domain, 1, learning_rate=0.01),
        make_environment(float64_domain, 2, learning_rate=0.01, initialization="new_head"),
    ]
    gamma = [[0.0, 0.5, 0.0, 0.5], [0.25] * 4]
    direct, new_head = suppress(model, environments, gamma).adversaries
    values = [v.item() for _, v in simulate(copy.deepcopy(model), environments[0], gamma[0], inverse_cross_entropy)]
    assert list(direct.losses) == [2, 4] and list(new_head.losses) == [1, 2, 3, 4]
    assert [float(v) for v in direct.losses.values()] == pytest.approx(values)
    batch = environments[0].evaluation.batch(0, 10)
    assert torch.equal(direct.before["references"], batch["labels"])
    assert torch.equal(direct.before["predictions"], evaluation_mode(model)(batch["x"]).argmax(1))
    assert new_head.before == {}
    assert len(direct.after["predictions"]) == len(new_head.after["predictions"]) == 10


def test_another_number_of_classes_goes_with_a_new_head():
    torch.set_default_dtype(torch.float64)
    model = make_net()
    domain = build_domain(make_points(1, 100, num_classes=5), ClassificationTask().inputs(model))
    environments = [make_environment(domain, 1, initialization="new_head", learning_rate=0.01)]
    result = suppress(model, environments, [[0.5, 0.5]], num_classes=5)
    assert not result.gradient["head.weight"].any() and result.gradient["head.weight"].shape == (3, 8)
    assert result.gradient["body.weight"].any()
    assert model.head.out_features == 3


@pytest.mark.parametrize("second_order", (False, True))
def test_a_new_head_gives_the_head_no_gradient(float64_domain, second_order):
    model = make_net(noisy=False)
    environments = [make_environment(float64_domain, 1, initialization="new_head", learning_rate=0.01)]
    gradient = suppress(model, environments, [[0.5, 0.5]], second_order=second_order).gradient
    assert not gradient["head.weight"].any() and not gradient["head.bias"].any()
    assert gradient["body.weight"].any() and gradient["body.bias"].any()


@pytest.mark.parametrize("second_order", (False, True))
@pytest.mark.parametrize("initialization", ("direct", "new_head"))
def test_a_head_only_transfer_still_gives_the_backbone_a_gradient(float64_domain, initialization, second_order):
    model = make_net(noisy=False)
    fields = {"initialization": initialization, "transfer": "head", "learning_rate": 0.01}
    environments = [make_environment(float64_domain, 1, **fields)]
    gradient = suppress(model, environments, [[0.5, 0.5]], second_order=second_order).gradient
    assert gradient["body.weight"].all() and gradient["body.bias"].all()


@pytest.mark.parametrize("second_order", (False, True))
def test_what_the_publisher_froze_gets_no_gradient_but_is_fine_tuned(float64_domain, second_order):
    model = make_net(noisy=False)
    environments = [make_environment(float64_domain, 1, learning_rate=0.01)]
    gamma = [[0.5, 0.5]]
    full = suppress(model, environments, gamma, second_order=second_order)
    model.body.requires_grad_(False)
    result = suppress(model, environments, gamma, second_order=second_order)
    assert set(result.gradient) == {"head.weight", "head.bias"}
    assert float(result.loss) == pytest.approx(float(full.loss), rel=1e-12)
    for name, tensor in result.gradient.items():
        torch.testing.assert_close(tensor, full.gradient[name])
    assert not model.body.weight.requires_grad and model.head.weight.requires_grad


def make_unet() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=4,
        in_channels=1,
        out_channels=1,
        block_out_channels=(4,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        norm_num_groups=2,
        add_attention=False,
    ).double()


def test_a_diffusion_model_is_suppressed_as_the_naive_implementation_does_it():
    torch.set_default_dtype(torch.float64)
    model, task = make_unet(), DiffusionTask()
    pixels = torch.randn(40, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    domain = build_domain(datasets.Dataset.from_dict({"sample": pixels.tolist()}), task.inputs(model))
    environment = make_environment(domain, 1, task=task, optimizer="sgd", learning_rate=0.1)
    result = suppress(
        model,
        [environment],
        [[0.5, 0.0, 2.0]],
        loss=denial_of_service,
        task=task,
        structure=ModelStructure("conv_out", ()),
    )
    adversary, total = copy.deepcopy(model), 0.0
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    batches, held_out = environment.fine_tuning.batches(20), environment.evaluation.batches(20)

    def predict(batch):
        return adversary(batch["sample"], batch["timestep"]).sample

    for weight in (0.5, 0.0, 2.0):
        batch = next(batches)
        gradients = torch.autograd.grad(
            (predict(batch) - batch["target"]).square().mean(), list(adversary.parameters())
        )
        with torch.no_grad():
            for parameter, gradient in zip(adversary.parameters(), gradients):
                parameter -= 0.1 * gradient
        batch = next(held_out)
        if weight:
            noise = predict(batch)
            value = noise.square().sum() / len(noise)
            total += weight * value.item()
            for name, gradient in zip(expected, torch.autograd.grad(value, list(adversary.parameters()))):
                expected[name] += weight * gradient
    assert_gradient(result, (total, expected), rtol=1e-7, atol=1e-10)


# What it costs, and what it leaves behind.


@pytest.mark.parametrize("second_order", (False, True))
@pytest.mark.parametrize(
    ("weights", "training", "evaluation"),
    (
        ([1.0, 1.0, 1.0, 1.0], 4, 4),
        ([0.0, 1.0, 0.0, 1.0], 4, 2),
        ([0.0, 1.0, 0.0, 0.0], 2, 1),
        ([0.0, 0.0, 0.0, 0.0], 0, 0),
    ),
)
def test_steps_of_weight_zero_cost_no_evaluation_and_the_last_of_them_no_step(
    float64_domain, weights, training, evaluation, second_order
):
    model, passes = make_net(noisy=False), []
    model.register_forward_hook(lambda module, *_: passes.append(module.training))
    environments = [
        make_environment(float64_domain, 1, initialization="new_head"),
        make_environment(float64_domain, 2),
    ]
    result = suppress(model, environments, [weights, weights], second_order=second_order)
    # A strategy that keeps its head is measured once more, before it starts.
    assert (passes.count(True), passes.count(False)) == (2 * training, 2 * evaluation + 1)
    assert all(len(adversary.losses) == evaluation for adversary in result.adversaries)
    if not evaluation:
        assert float(result.loss) == 0 and not any(g.any() for g in result.gradient.values())


@pytest.mark.parametrize("second_order", (False, True))
@pytest.mark.parametrize("call", ("gradient", "measure", "failure"))
def test_the_model_is_put_back_bit_for_bit(float64_domain, second_order, call):
    model = make_net(noisy=not second_order)
    model.train()
    model.dropout.eval()
    model.head.bias.requires_grad_(False)
    model.body.weight.grad = torch.ones_like(model.body.weight)
    gradient, modes = model.body.weight.grad, [module.training for module in model.modules()]
    before, modules, parameters = (
        copy.deepcopy(model.state_dict()),
        list(model.modules()),
        list(map(id, model.parameters())),
    )
    environments = [
        make_environment(float64_domain, 1, learning_rate=0.1),
        make_environment(float64_domain, 2, learning_rate=0.1, initialization="new_head"),
    ]
    random_state = torch.get_rng_state()
    if call == "failure":
        with pytest.raises(ZeroDivisionError):
            suppress(model, environments, [[1.0, 1.0]] * 2, loss=lambda *_: 1 / 0, second_order=second_order)
    elif call == "measure":
        Suppression(model, ClassificationTask(), SMOOTH, inverse_cross_entropy).measure(environments[1].adversary(3))
    else:
        suppress(model, environments, [[1.0, 1.0]] * 2, second_order=second_order)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert list(model.modules()) == modules and list(map(id, model.parameters())) == parameters
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in (model.body.weight, model.head.weight, model.head.bias)] == [True, True, False]
    assert model.body.weight.grad is gradient and bool((gradient == 1).all())
    assert model.head.weight.grad is None


@pytest.mark.parametrize("second_order", (False, True))
def test_the_same_call_gives_the_same_gradient_whatever_the_random_state(float64_domain, second_order):
    model = make_net(noisy=not second_order)
    environments = [make_environment(float64_domain, seed, initialization="new_head") for seed in (1, 2)]
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        results.append(suppress(model, environments, [[0.5, 0.5]] * 2, second_order=second_order))
    for name, tensor in results[0].gradient.items():
        assert torch.equal(tensor, results[1].gradient[name])
    alone = [suppress(model, [e], [[0.5, 0.5]], second_order=second_order) for e in environments]
    for name, tensor in results[0].gradient.items():
        torch.testing.assert_close(tensor, alone[0].gradient[name] + alone[1].gradient[name])


def test_gamma_must_have_a_row_for_every_environment(float64_domain):
    with pytest.raises(ValueError, match="gamma has 2 rows for 1 simulated adversaries"):
        suppress(make_net(), [make_environment(float64_domain, 1)], [[1.0], [1.0]])


def test_measuring_gives_the_scores_of_the_fine_tuned_adversary(float64_domain):
    model = make_net()
    environment = make_environment(float64_domain, 1, learning_rate=0.05)
    scores = Suppression(model, ClassificationTask(), SMOOTH, inverse_cross_entropy).measure(environment.adversary(5))
    adversary = copy.deepcopy(model)
    for _ in simulate(adversary, environment, [0.0] * 5, inverse_cross_entropy):
        pass
    batch = environment.evaluation.batch(0, len(environment.evaluation.indices))
    assert torch.equal(scores["predictions"], adversary.eval()(batch["x"]).argmax(1))
    assert torch.equal(scores["references"], batch["labels"])


@pytest.mark.parametrize("batch_size", (1, 7, 50))
def test_measuring_in_batches_gives_the_same_scores(float64_domain, batch_size):
    model, environment = make_net(), make_environment(float64_domain, 1, learning_rate=0.05)
    environment = replace(environment, held_out=float64_domain)
    suppression, sizes = Suppression(model, ClassificationTask(), SMOOTH, inverse_cross_entropy), []
    expected = suppression.measure(environment.adversary(3))
    model.body.register_forward_pre_hook(lambda body, inputs: None if body.training else sizes.append(len(inputs[0])))
    scores = suppression.measure(environment.adversary(3), batch_size)
    assert scores.keys() == expected.keys() and all(torch.equal(scores[n], expected[n]) for n in scores)
    assert sum(sizes) == len(scores["references"]) == 100 and max(sizes) == batch_size

"""The suppression gradient against a naive implementation, and the exact one against finite differences."""

import copy

import datasets
import pytest
import torch
from conftest import make_points
from diffusers import UNet2DModel
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from sophon_hf import ClassificationTask, DiffusionTask, FineTuningStrategy
from sophon_hf.data import Domain, build_domain
from sophon_hf.finetuning import Environment, FineTuning, sample_environment
from sophon_hf.losses import denial_of_service, inverse_cross_entropy, kl_from_uniform
from sophon_hf.suppression import Suppression, SuppressionGradient
from sophon_hf.tasks import Task
from sophon_hf.tasks.anatomy import Anatomy

RATES = {"sgd": 0.1, "momentum": 0.05, "nesterov": 0.05, "adagrad": 0.03, "adadelta": 1.0, "adam": 0.01, "adamw": 0.01}
SMOOTH = Anatomy("head", ())


class Net(nn.Module):
    """Smooth; with batch norm and dropout where asked, so that buffers and random state matter."""

    def __init__(self, noisy: bool = True):
        super().__init__()
        self.body = nn.Linear(6, 8, bias=not noisy)
        self.norm = nn.BatchNorm1d(8) if noisy else nn.Identity()
        self.dropout = nn.Dropout(0.2 if noisy else 0.0)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.dropout(torch.tanh(self.norm(self.body(x)))))


def make_net(noisy: bool = True) -> Net:
    torch.manual_seed(0)
    model = Net(noisy).double()
    with torch.no_grad():
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.add_(0.1 * torch.rand_like(buffer))
    return model


@pytest.fixture
def float64_domain() -> Domain:
    torch.set_default_dtype(torch.float64)
    return build_domain(make_points(1, 100), ClassificationTask().inputs(Net()))


def make_environment(domain: Domain, seed: int, task: Task | None = None, **fields) -> Environment:
    fields = {"batch_size": 20, **fields}
    return sample_environment(domain, task or ClassificationTask(), FineTuningStrategy(**fields), seed)


def suppress(model, environments, gamma, *, loss=inverse_cross_entropy, task=None, **options) -> SuppressionGradient:
    anatomy = options.pop("anatomy", SMOOTH)
    return Suppression(model, task or ClassificationTask(), anatomy, loss, **options)(environments, gamma)


def make_optimizer(name: str, parameters, rate: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    common = {"lr": rate, "weight_decay": weight_decay, "foreach": False}
    return {
        "sgd": lambda: torch.optim.SGD(parameters, **common),
        "momentum": lambda: torch.optim.SGD(parameters, momentum=0.9, **common),
        "nesterov": lambda: torch.optim.SGD(parameters, momentum=0.9, nesterov=True, **common),
        "adagrad": lambda: torch.optim.Adagrad(parameters, **common),
        "adadelta": lambda: torch.optim.Adadelta(parameters, **common),
        "adam": lambda: torch.optim.Adam(parameters, **common),
        "adamw": lambda: torch.optim.AdamW(parameters, **common),
    }[name]()


def simulate(model, environment, weights, loss):
    """Algorithm 1's inner loop as one would write it: a copy of theta, fine-tuned; yields (weight, L_alpha) at each step.

    The copy stands at step k while the k-th item is out.
    """
    strategy = environment.strategy
    torch.manual_seed(environment.seed)
    if strategy.initialization == "new_head":
        model.head.reset_parameters()
    for parameter in model.parameters():
        parameter.requires_grad_()
    updated = {"all": model, "head": model.head, "norm": model.norm}[strategy.transfer].parameters()
    optimizer = make_optimizer(strategy.optimizer, list(updated), strategy.learning_rate, strategy.weight_decay)
    batches, held_out = (
        stream.batches(strategy.batch_size) for stream in (environment.fine_tuning, environment.evaluation)
    )
    for k, weight in enumerate(weights):
        batch = next(batches)
        model.train()
        model.zero_grad()
        nn.functional.cross_entropy(model(batch["x"]), batch["labels"]).backward()
        if strategy.max_grad_norm:
            nn.utils.clip_grad_norm_(model.parameters(), strategy.max_grad_norm)
        if strategy.schedule == "linear":
            optimizer.param_groups[0]["lr"] = strategy.learning_rate * (1 - k / len(weights))
        optimizer.step()
        batch = next(held_out)
        if weight:
            evaluation_mode(model)
            yield weight, loss(model(batch["x"]), batch["labels"])


def evaluation_mode(model):
    """No dropout, but batch norm on the statistics of the batch."""
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.train()
    return model


def naive_first_order(model, environments, gamma, loss=inverse_cross_entropy):
    """Gradients at the fine-tuned points, summed as if they were taken at theta."""
    total, gradient = 0.0, {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for environment, weights in zip(environments, gamma):
        adversary = copy.deepcopy(model)
        for weight, value in simulate(adversary, environment, weights, loss):
            total += weight * value.item()
            adversary.zero_grad()
            value.backward()
            for name, parameter in adversary.named_parameters():
                renewed = environment.strategy.initialization == "new_head" and name.startswith("head.")
                if parameter.grad is not None and not renewed:
                    gradient[name] += weight * parameter.grad
    return total, gradient


def naive_loss(model, environments, gamma, loss=inverse_cross_entropy) -> float:
    """L_FTS of eq. 4 as a function of theta."""
    total = 0.0
    for environment, weights in zip(environments, gamma):
        for weight, value in simulate(copy.deepcopy(model), environment, weights, loss):
            total += weight * value.item()
    return total


def assert_gradient(result: SuppressionGradient, expected, rtol: float = 1e-8, atol: float = 1e-11) -> None:
    total, gradient = expected
    assert float(result.loss) == pytest.approx(total, rel=rtol)
    assert result.gradient.keys() == gradient.keys()
    for name, tensor in result.gradient.items():
        torch.testing.assert_close(tensor, gradient[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


# First order.


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
        model, [environment], [[0.5, 0.0, 2.0]], loss=denial_of_service, task=task, anatomy=Anatomy("conv_out", ())
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
        Suppression(model, ClassificationTask(), SMOOTH, inverse_cross_entropy).measure(environments[1], 3)
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
    scores = Suppression(model, ClassificationTask(), SMOOTH, inverse_cross_entropy).measure(environment, 5)
    adversary = copy.deepcopy(model)
    for _ in simulate(adversary, environment, [0.0] * 5, inverse_cross_entropy):
        pass
    batch = environment.evaluation.batch(0, len(environment.evaluation.indices))
    assert torch.equal(scores["predictions"], adversary.eval()(batch["x"]).argmax(1))
    assert torch.equal(scores["references"], batch["labels"])


# Second order.


def finite_difference(model, direction, environments, gamma, loss=inverse_cross_entropy, step: float = 1e-5) -> float:
    values = []
    for sign in (1, -1):
        shifted = copy.deepcopy(model)
        with torch.no_grad():
            for name, parameter in shifted.named_parameters():
                parameter += sign * step * direction[name]
        values.append(naive_loss(shifted, environments, gamma, loss))
    return (values[0] - values[1]) / (2 * step)


def assert_exact(model, environments, gamma, loss=inverse_cross_entropy) -> None:
    """Slopes along every parameter tensor and along random directions agree, and L_FTS does."""
    result = suppress(model, environments, gamma, loss=loss, second_order=True)
    assert float(result.loss) == pytest.approx(naive_loss(model, environments, gamma, loss), rel=1e-9)
    generator = torch.Generator().manual_seed(0)
    noise = {n: torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()}
    directions = [noise] + [{n: v * (n == name) for n, v in noise.items()} for name in noise]
    for direction in directions:
        slope = sum(float((result.gradient[n] * direction[n]).sum()) for n in direction)
        expected = finite_difference(model, direction, environments, gamma, loss)
        assert slope == pytest.approx(expected, rel=1e-4, abs=1e-8)


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
        suppress(model, environments, [[0.5, 0.5]], anatomy=Anatomy("classifier", ()), second_order=exact)
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
    list(FineTuning(attacked, ClassificationTask(), environment.strategy, batches, 3, anatomy=SMOOTH))
    assert torch.equal(seen[0], evaluation_mode(attacked)(environment.evaluation.batch(20, 10)["x"]).detach())

"""The fine-tuning engine, what it updates, and how a model is put back after it."""

import copy
import math

import pytest
import torch
from naive_suppression import make_optimizer
from points import TinyNet
from tiny_models import CLASSES, HEADS, MODELS, changed, make_batch, make_trained, prepare, state
from torch import nn

from sophon_hf import ClassificationTask, FineTuningStrategy
from sophon_hf.data.batches import Stream
from sophon_hf.finetuning.initialization import preserved
from sophon_hf.finetuning.loop import FineTuning
from sophon_hf.models.structure import ModelStructure
from sophon_hf.tasks.base import infer_task

# The engine against a naive loop.


def naive_fine_tuning(model, batches, optimizer, rates, max_grad_norm=0.0):
    """A loop as everybody would write it; `rates` lists the learning rate of each step."""
    losses = []
    for rate, batch in zip(rates, batches):
        model.train()
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(batch["x"]), batch["labels"])
        loss.backward()
        if max_grad_norm:
            norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
            for p in model.parameters():
                p.grad *= min(1.0, max_grad_norm / (norm + 1e-6))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        losses.append(loss.item())
    return losses


RATES = {"sgd": 0.1, "momentum": 0.03, "nesterov": 0.03, "adagrad": 0.03, "adadelta": 1.0, "adam": 0.01, "adamw": 0.01}


def run_both(domain, steps: int, rates: list[float], **fields) -> tuple[float, float]:
    """Fine-tune two equal models, by the engine and by hand, and compare every tensor; returns first and last loss."""
    torch.manual_seed(0)
    model = TinyNet()
    # A bias before a batch norm has no gradient but rounding errors, which adaptive optimizers would blow up.
    model.body = nn.Linear(6, 16, bias=False)
    model.double()
    naive = copy.deepcopy(model)
    strategy = FineTuningStrategy(batch_size=16, **fields)
    stream = Stream(domain, ClassificationTask().collate, 1)
    batches = [{**b, "x": b["x"].double()} for b, _ in zip(stream.batches(16), rates)]
    structure = ModelStructure("head", ())
    fine_tuning = FineTuning(model, ClassificationTask(), strategy, batches, steps, structure=structure)
    updates = []
    for update in fine_tuning:
        updates.append(update)
        model.eval()  # As one who measures between two steps would.
    optimizer = make_optimizer(strategy.optimizer, naive.parameters(), 1.0, strategy.weight_decay)
    losses = naive_fine_tuning(naive, batches, optimizer, rates, strategy.max_grad_norm)
    assert [update.step for update in updates] == list(range(1, steps + 1))
    assert [float(update.loss) for update in updates] == pytest.approx(losses, rel=1e-12)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, naive.state_dict()[name], rtol=1e-9, atol=1e-12)
    return losses[0], losses[-1]


@pytest.mark.parametrize("weight_decay", (0.0, 0.01))
@pytest.mark.parametrize("optimizer", RATES)
def test_the_engine_does_what_a_naive_loop_does(domain, optimizer, weight_decay):
    rate = RATES[optimizer]
    first, last = run_both(domain, 12, [rate] * 12, optimizer=optimizer, learning_rate=rate, weight_decay=weight_decay)
    assert last < first


def test_gradients_are_clipped_to_their_norm(domain):
    run_both(domain, 6, [0.1] * 6, optimizer="momentum", learning_rate=0.1, max_grad_norm=0.05)
    run_both(domain, 6, [0.1] * 6, optimizer="sgd", learning_rate=0.1, max_grad_norm=1e6)


@pytest.mark.parametrize(
    ("schedule", "share"),
    (
        ("constant", lambda progress: 1.0),
        ("linear", lambda progress: 1 - progress),
        ("cosine", lambda progress: (1 + math.cos(math.pi * progress)) / 2),
    ),
)
@pytest.mark.parametrize("warmup_ratio", (0.0, 0.3))
def test_the_rate_follows_schedule_and_warm_up(domain, schedule, share, warmup_ratio):
    steps, rising = 10, round(10 * warmup_ratio)
    shares = [k / rising if k < rising else share((k - rising) / (steps - rising)) for k in range(steps)]
    run_both(
        domain,
        steps,
        [0.05 * s for s in shares],
        optimizer="momentum",
        learning_rate=0.05,
        schedule=schedule,
        warmup_ratio=warmup_ratio,
    )


def test_everything_at_once(domain):
    shares = [0.0, 0.5, *[(1 + math.cos(math.pi * k / 8)) / 2 for k in range(8)]]
    run_both(
        domain,
        10,
        [0.01 * s for s in shares],
        optimizer="adamw",
        learning_rate=0.01,
        weight_decay=0.1,
        schedule="cosine",
        warmup_ratio=0.2,
        max_grad_norm=0.1,
    )


class Odd(nn.Module):
    """Its gradients lie in memory otherwise than its parameters: transposed, expanded, channels last."""

    def __init__(self):
        super().__init__()
        self.weight, self.shift = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(5, 3))
        self.convolution, self.head = nn.Conv2d(2, 4, 3), nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        images = x.reshape(-1, 3, 3, 2).permute(0, 3, 1, 2)
        vectors = (self.weight @ x[:, :6].T).T + self.shift.mean()
        return self.head(torch.cat([vectors, self.convolution(images).flatten(1)], dim=1).tanh())


@pytest.mark.parametrize("optimizer", RATES)
def test_a_step_does_not_depend_on_how_gradients_lie_in_memory(optimizer):
    torch.manual_seed(0)
    model, rate = Odd().double(), RATES[optimizer]
    naive = copy.deepcopy(model)
    batch = {"x": torch.randn(8, 18, dtype=torch.float64), "labels": torch.arange(8) % CLASSES}
    strategy = FineTuningStrategy(optimizer=optimizer, learning_rate=rate)
    for _ in FineTuning(model, ClassificationTask(), strategy, [batch] * 3, 3, structure=ModelStructure("head", ())):
        pass
    naive_fine_tuning(naive, [batch] * 3, make_optimizer(optimizer, naive.parameters(), 1.0), [rate] * 3)
    torch.testing.assert_close(dict(model.state_dict()), dict(naive.state_dict()), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_a_step_of_a_real_model_follows_its_gradient(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    task, batch, before = infer_task(model), make_batch(model), state(model)
    fine_tuning = prepare(model, optimizer="sgd", learning_rate=0.5)
    torch.manual_seed(1)  # Of dropout.
    for _ in fine_tuning:
        pass
    after = state(model)
    model.load_state_dict(before, strict=False)
    model.train().zero_grad()
    torch.manual_seed(1)
    task.loss(task.predict(model, batch), task.target(batch)).backward()
    for parameter_name, parameter in model.named_parameters():
        expected = before[parameter_name] - (0 if parameter.grad is None else 0.5 * parameter.grad)
        torch.testing.assert_close(after[parameter_name], expected, rtol=1e-4, atol=1e-5)


def test_an_adversary_may_train_what_the_publisher_froze(model):
    model.requires_grad_(False)
    before = state(model)
    list(prepare(model, learning_rate=0.1))
    assert {"body.weight", "head.weight", "head.bias"} <= changed(model, before)


def test_no_batch_beyond_the_last_step_is_taken(model):
    batches = iter([make_batch(model)] * 5)
    strategy = FineTuningStrategy()
    list(FineTuning(model, ClassificationTask(), strategy, batches, 3, structure=ModelStructure("head", ())))
    assert len(list(batches)) == 2


# What a transfer updates.


@pytest.mark.parametrize(
    ("fields", "expected"),
    (
        ({"transfer": "all"}, {"body.weight", "body.bias", "norm.weight", "norm.bias", "head.weight", "head.bias"}),
        ({"transfer": "head"}, {"head.weight", "head.bias"}),
        ({"transfer": "features"}, {"body.weight", "body.bias", "norm.weight", "norm.bias"}),
        ({"transfer": "norm"}, {"norm.weight", "norm.bias"}),
        ({"transfer": "pattern", "pattern": r"^body\.w|head\.b"}, {"body.weight", "head.bias"}),
    ),
)
@pytest.mark.parametrize("optimizer", ("adam", "adadelta"))
def test_a_transfer_changes_its_parameters_and_no_other(model, fields, expected, optimizer):
    before = state(model)
    for _ in prepare(model, steps=3, optimizer=optimizer, learning_rate=0.1, weight_decay=0.1, **fields):
        pass
    statistics = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert changed(model, before) == expected | statistics


@pytest.mark.parametrize("fields", ({"transfer": "norm"}, {"transfer": "pattern", "pattern": r"^body\.w"}))
def test_a_new_head_is_always_updated(model, fields):
    fine_tuning = prepare(model, initialization="new_head", learning_rate=0.1, **fields)
    before = state(model)
    list(fine_tuning)
    body = {"norm": {"norm.weight", "norm.bias"}, "pattern": {"body.weight"}}[fields["transfer"]]
    assert {n for n in changed(model, before) if "running" not in n and "tracked" not in n} == body | {
        "head.weight",
        "head.bias",
    }


@pytest.mark.parametrize("name", MODELS)
def test_transfers_of_real_models_take_the_right_parameters(name):
    model = make_trained(name)
    names = {id(p): n for n, p in model.named_parameters()}

    def taken(**fields) -> set[str]:
        return {names[id(p)] for p in prepare(model, **fields).parameters}

    assert taken(transfer="all") == set(names.values())
    assert taken(transfer="head") == {f"{HEADS[name]}.weight", f"{HEADS[name]}.bias"}
    norms = ("norm", "downsampling_layer.0")
    assert taken(transfer="norm") == {n for n in names.values() if any(norm in n.lower() for norm in norms)}
    assert taken(transfer="pattern", pattern="bias$") == {n for n in names.values() if n.endswith("bias")}


def test_a_strategy_that_finds_nothing_is_refused(model):
    with pytest.raises(ValueError, match="finds no parameter of TinyNet to update"):
        prepare(model, transfer="pattern", pattern="adapter")
    with pytest.raises(ValueError, match="finds no parameter"):
        prepare(TinyNet(batch_norm=False), transfer="norm")


# How a model is put back.


def wreck(model: nn.Module, head: str) -> None:
    """Change all that a fine-tuning may change, and more."""
    torch.manual_seed(99)
    model.train(not model.training)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.copy_(torch.ones_like(tensor) * 3)
    for parameter in model.parameters():
        parameter.requires_grad_(not parameter.requires_grad)
        parameter.grad = torch.ones_like(parameter)
    model.set_submodule(head, nn.Linear(16, 9))
    torch.rand(5)


@pytest.mark.parametrize("raises", (False, True))
@pytest.mark.parametrize("name", ("plain", "resnet", "vit"))
def test_a_preserved_model_is_as_it_was(name, raises):
    model, head = make_trained(name), HEADS[name]
    first, second, *rest = model.parameters()
    first.requires_grad_(False)
    second.grad = torch.randn_like(second)
    model.train()
    next(module for module in model.modules() if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm, nn.Linear))).eval()
    torch.manual_seed(3)
    before, random_state = state(model), torch.get_rng_state()
    gradient = second.grad.clone()
    modules, tensors = list(model.named_modules()), [(n, id(p)) for n, p in model.named_parameters()]
    modes = [module.training for _, module in modules]

    if raises:
        with pytest.raises(RuntimeError, match="amid"), preserved(model, [head]):
            wreck(model, head)
            raise RuntimeError("amid the block")
    else:
        with preserved(model, [head]):
            wreck(model, head)

    assert not changed(model, before)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert list(model.named_modules()) == modules, "the very same modules, the head too, in the same order"
    assert [(n, id(p)) for n, p in model.named_parameters()] == tensors
    assert [module.training for module in model.modules()] == modes
    assert not first.requires_grad and all(p.requires_grad for p in (second, *rest))
    assert torch.equal(second.grad, gradient)
    assert first.grad is None and all(p.grad is None for p in rest)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("initialization", ("direct", "new_head", "scratch"))
def test_a_fine_tuning_leaves_no_trace_in_a_preserved_model(name, initialization):
    model = make_trained(name).eval()
    task, batch = infer_task(model), make_batch(model)
    task.loss(task.predict(model, batch), task.target(batch)).backward()
    before, gradients = (
        state(model),
        [(p, p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()],
    )
    head = model.get_submodule(HEADS[name])
    with preserved(model, [HEADS[name]]):
        list(prepare(model, steps=2, initialization=initialization, learning_rate=0.1, max_grad_norm=0.1))
        assert changed(model, before)
    assert not changed(model, before)
    assert model.get_submodule(HEADS[name]) is head
    assert not any(module.training for module in model.modules())
    for parameter, gradient, values in gradients:
        assert parameter.grad is gradient
        assert gradient is None or torch.equal(gradient, values)


def test_a_model_can_be_put_back_within_the_block_as_often_as_wanted(model):
    before, head = state(model), model.head
    with preserved(model, ["head"]) as stored:
        for _ in range(3):
            wreck(model, "head")
            assert changed(model, before)
            stored.restore()
            assert not changed(model, before)
            assert model.head is head

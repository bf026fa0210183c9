"""The fine-tuning engine, what it re-initialises and updates, and how a model is put back after it."""

import copy
import math

import pytest
import torch
from conftest import TinyNet
from diffusers import UNet2DModel
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from sophon_hf import ClassificationTask, FineTuningStrategy
from sophon_hf.data import Stream
from sophon_hf.finetuning import FineTuning, preserved
from sophon_hf.tasks import infer_task
from sophon_hf.tasks.anatomy import Anatomy, find_anatomy

CLASSES = 4


class Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(width, width), nn.BatchNorm1d(width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(torch.tanh(self.norm(self.first(x))))


class Plain(nn.Module):
    """A plain module with a stem, three blocks and a head inside a container."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.layers = nn.Sequential(*[Residual(8) for _ in range(3)])
        self.classifier = nn.Sequential(nn.Tanh(), nn.Linear(8, CLASSES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.layers(self.stem(x)))


def make_resnet():
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 1]}
    return ResNetForImageClassification(ResNetConfig(layer_type="basic", num_labels=CLASSES, **sizes))


def make_vit():
    sizes = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "intermediate_size": 32}
    return ViTForImageClassification(ViTConfig(num_hidden_layers=3, num_attention_heads=2, num_labels=CLASSES, **sizes))


def make_convnext():
    return ConvNextForImageClassification(
        ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 2], num_stages=2, patch_size=2, num_labels=CLASSES)
    )


def make_bert():
    sizes = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 32}
    return BertForSequenceClassification(
        BertConfig(num_hidden_layers=2, num_attention_heads=2, num_labels=CLASSES, **sizes)
    )


def make_unet():
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
    )


MODELS = {
    "plain": Plain,
    "resnet": make_resnet,
    "vit": make_vit,
    "convnext": make_convnext,
    "bert": make_bert,
    "unet": make_unet,
}


def make_batch(model: nn.Module, examples: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(examples) % CLASSES
    if isinstance(model, UNet2DModel):
        sample, target = torch.randn(2, examples, 1, 8, 8, generator=generator)
        return {"sample": sample, "timestep": torch.arange(examples), "target": target}
    if isinstance(model, BertForSequenceClassification):
        return {"input_ids": torch.randint(30, (examples, 5), generator=generator), "labels": labels}
    if isinstance(model, (Plain, TinyNet)):
        dtype = next(model.parameters()).dtype
        return {"x": torch.randn(examples, 6, generator=generator, dtype=dtype), "labels": labels % 3}
    return {"pixel_values": torch.randn(examples, 3, 16, 16, generator=generator), "labels": labels}


@torch.no_grad()
def make_trained(name: str) -> nn.Module:
    """A model with no value left that a re-initialisation would give it."""
    torch.manual_seed(0)
    model = MODELS[name]()
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.add_(0.1 + 0.1 * torch.rand_like(tensor))
        else:
            tensor.add_(7 if tensor.ndim == 0 else 0)
    return model


def prepare(model: nn.Module, *, num_classes: int | None = None, steps: int = 1, **fields) -> FineTuning:
    """A fine-tuning of `model` on one batch, again and again."""
    task, batch = infer_task(model), make_batch(model)
    strategy = FineTuningStrategy(**fields)
    anatomy = task.anatomy(model, batch)
    return FineTuning(model, task, strategy, [batch] * steps, steps, anatomy=anatomy, num_classes=num_classes)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in tensors}


def changed(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    after = state(model)
    assert after.keys() == before.keys()
    return {name for name in after if not torch.equal(after[name], before[name])}


def named(model: nn.Module, prefixes: tuple[str, ...]) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.startswith(prefixes)}


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


def make_naive(name: str, parameters, **common):
    common["foreach"] = False
    return {
        "sgd": lambda: torch.optim.SGD(parameters, **common),
        "momentum": lambda: torch.optim.SGD(parameters, momentum=0.9, **common),
        "nesterov": lambda: torch.optim.SGD(parameters, momentum=0.9, nesterov=True, **common),
        "adagrad": lambda: torch.optim.Adagrad(parameters, **common),
        "adadelta": lambda: torch.optim.Adadelta(parameters, **common),
        "adam": lambda: torch.optim.Adam(parameters, **common),
        "adamw": lambda: torch.optim.AdamW(parameters, **common),
    }[name]()


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
    batches = [{**b, "x": b["x"].double()} for b, _ in zip(Stream(domain, ClassificationTask(), 1).batches(16), rates)]
    anatomy = Anatomy("head", ())
    fine_tuning = FineTuning(model, ClassificationTask(), strategy, batches, steps, anatomy=anatomy)
    updates = []
    for update in fine_tuning:
        updates.append(update)
        model.eval()  # As one who measures between two steps would.
    optimizer = make_naive(strategy.optimizer, naive.parameters(), lr=1.0, weight_decay=strategy.weight_decay)
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
@pytest.mark.parametrize("warmup", (0.0, 0.3))
def test_the_rate_follows_schedule_and_warm_up(domain, schedule, share, warmup):
    steps, rising = 10, round(10 * warmup)
    shares = [k / rising if k < rising else share((k - rising) / (steps - rising)) for k in range(steps)]
    run_both(
        domain,
        steps,
        [0.05 * s for s in shares],
        optimizer="momentum",
        learning_rate=0.05,
        schedule=schedule,
        warmup=warmup,
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
        warmup=0.2,
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
    for _ in FineTuning(model, ClassificationTask(), strategy, [batch] * 3, 3, anatomy=Anatomy("head", ())):
        pass
    naive_fine_tuning(
        naive, [batch] * 3, make_naive(optimizer, naive.parameters(), lr=1.0, weight_decay=0.0), [rate] * 3
    )
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
    list(FineTuning(model, ClassificationTask(), strategy, batches, 3, anatomy=Anatomy("head", ())))
    assert len(list(batches)) == 2


# What a transfer updates.


@pytest.mark.parametrize(
    ("fields", "expected"),
    (
        ({"transfer": "all"}, {"body.weight", "body.bias", "norm.weight", "norm.bias", "head.weight", "head.bias"}),
        ({"transfer": "head"}, {"head.weight", "head.bias"}),
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


HEADS = {
    "plain": "classifier.1",
    "resnet": "classifier.1",
    "vit": "classifier",
    "convnext": "classifier",
    "bert": "classifier",
    "unet": "conv_out",
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


# What an initialization makes new.

LAST_BLOCKS = {
    "plain": ("layers.1.", "layers.2."),
    "resnet": ("resnet.encoder.stages.0.layers.1.", "resnet.encoder.stages.1.layers.0."),
    "vit": ("vit.layers.1.", "vit.layers.2."),
    "convnext": ("convnext.encoder.stages.1.layers.0.", "convnext.encoder.stages.1.layers.1."),
    "bert": ("bert.encoder.layer.0.", "bert.encoder.layer.1."),
    "unet": ("up_blocks.1.resnets.0.", "up_blocks.1.resnets.1."),
}


@pytest.mark.parametrize("name", MODELS)
def test_direct_changes_nothing(name):
    model = make_trained(name)
    before = state(model)
    assert prepare(model).reinitialized == set()
    assert not changed(model, before)


@pytest.mark.parametrize("blocks", (0, 1, 2))
@pytest.mark.parametrize("name", MODELS)
def test_a_new_head_and_new_blocks_change_themselves_only(name, blocks):
    model = make_trained(name)
    before = state(model)
    fine_tuning = prepare(model, initialization="new_head", reinitialized_blocks=blocks, transfer="head")
    prefixes = (HEADS[name] + ".", *LAST_BLOCKS[name][2 - blocks :])
    assert changed(model, before) == {n for n in before if n.startswith(prefixes)}
    assert fine_tuning.reinitialized == named(model, prefixes)
    new = {id(p) for n, p in model.named_parameters() if n.startswith(prefixes)}
    assert {id(p) for p in fine_tuning.parameters} == new


@pytest.mark.parametrize("name", MODELS)
def test_scratch_changes_everything(name):
    model = make_trained(name)
    before = state(model)
    fine_tuning = prepare(model, initialization="scratch")
    constant = {"bert.embeddings.position_ids", "bert.embeddings.token_type_ids"} & before.keys()
    assert changed(model, before) == before.keys() - constant
    assert fine_tuning.reinitialized == {n for n, _ in model.named_parameters()}


@pytest.mark.parametrize("name", MODELS)
def test_scratch_is_like_a_new_model(name):
    model = make_trained(name)
    prepare(model, initialization="scratch")
    fresh = state(MODELS[name]())
    for key, tensor in state(model).items():
        if not tensor.is_floating_point() or (tensor.numel() > 1 and fresh[key].std() == 0):
            assert torch.equal(tensor, fresh[key]), key
        elif tensor.numel() >= 64:
            assert 0.6 < tensor.std() / fresh[key].std() < 1.7, key
            assert abs(float(tensor.mean() - fresh[key].mean())) < float(fresh[key].std()), key


@pytest.mark.parametrize("name", MODELS)
def test_a_new_head_is_drawn_anew_and_is_like_that_of_a_new_model(name):
    heads = []
    for seed in (1, 1, 2):
        model = make_trained(name)
        torch.manual_seed(seed)
        prepare(model, initialization="new_head")
        heads.append(model.get_submodule(HEADS[name]).weight.detach())
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    fresh = torch.stack([MODELS[name]().get_submodule(HEADS[name]).weight.detach() for _ in range(5)])
    assert 0.5 < heads[0].std() / fresh.std() < 2


@pytest.mark.parametrize("initialization", ("new_head", "scratch"))
@pytest.mark.parametrize("name", [name for name in MODELS if name != "unet"])
def test_a_new_head_may_have_another_number_of_classes(name, initialization):
    model = make_trained(name)
    fine_tuning = prepare(model, num_classes=7, steps=2, initialization=initialization, learning_rate=0.01)
    assert model.get_submodule(HEADS[name]).out_features == 7
    assert f"{HEADS[name]}.weight" in fine_tuning.reinitialized
    losses = [float(update.loss) for update in fine_tuning]
    assert all(map(math.isfinite, losses))
    assert ClassificationTask().predict(model, make_batch(model)).shape == (6, 7)


def test_a_new_head_keeps_dtype_and_lack_of_bias(model):
    model.head = nn.Linear(16, 3, bias=False)
    model.double()
    for classes in (None, 3, 5):
        prepare(model, num_classes=classes, initialization="new_head")
        assert model.head.weight.dtype == torch.float64
        assert model.head.bias is None


def test_a_convolutional_head_cannot_change_its_outputs():
    with pytest.raises(ValueError, match="only a linear head can be replaced by one with 7"):
        prepare(make_trained("unet"), num_classes=7, initialization="new_head")


def test_more_blocks_than_there_are_cannot_be_new():
    with pytest.raises(ValueError, match="re-initialises 4 blocks, but the model has 3"):
        prepare(Plain(), initialization="new_head", reinitialized_blocks=4)


class WithToken(Plain):
    """A plain module with a parameter that nothing knows how to re-initialise."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.layers(self.stem(x) + self.token))


def test_a_parameter_that_cannot_be_made_new_is_named():
    with pytest.raises(ValueError, match="'WithToken'.*no `reset_parameters`"):
        prepare(WithToken(), initialization="scratch")


def test_blocks_can_be_new_although_another_part_cannot():
    model = WithToken()
    before = state(model)
    prepare(model, initialization="new_head", reinitialized_blocks=1)
    assert changed(model, before) >= named(model, ("layers.2.first.", "classifier.1."))
    assert torch.equal(model.token, before["token"])


class Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.TransformerEncoderLayer(6, 2, 8, batch_first=True) for _ in range(2)])
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x[:, None].repeat(1, 2, 1)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


def test_a_module_that_resets_its_children_has_the_last_word():
    model = Attentive()
    batch = {"x": torch.randn(4, 6), "labels": torch.tensor([0, 1, 2, 0])}
    anatomy = ClassificationTask().anatomy(model, batch)
    with torch.no_grad():
        model.layers[1].self_attn.out_proj.bias.add_(1)
    strategy = FineTuningStrategy(initialization="new_head", reinitialized_blocks=1)
    FineTuning(model, ClassificationTask(), strategy, [batch], 1, anatomy=anatomy)
    # `nn.MultiheadAttention` makes this bias zero, after its output layer has drawn it at random.
    assert not model.layers[1].self_attn.out_proj.bias.any()


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
        with pytest.raises(RuntimeError, match="amid"), preserved(model, head):
            wreck(model, head)
            raise RuntimeError("amid the block")
    else:
        with preserved(model, head):
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
    with preserved(model, HEADS[name]):
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
    with preserved(model, "head") as stored:
        for _ in range(3):
            wreck(model, "head")
            assert changed(model, before)
            stored.restore()
            assert not changed(model, before)
            assert model.head is head


# Where head and blocks are.

ANATOMIES = {
    "plain": [f"layers.{i}" for i in range(3)],
    "resnet": [f"resnet.encoder.stages.{i}" for i in ("0.layers.0", "0.layers.1", "1.layers.0")],
    "vit": [f"vit.layers.{i}" for i in range(3)],
    "convnext": [f"convnext.encoder.stages.{i}" for i in ("0.layers.0", "1.layers.0", "1.layers.1")],
    "bert": [f"bert.encoder.layer.{i}" for i in range(2)],
    "unet": [
        "down_blocks.0.resnets.0",
        "down_blocks.1.resnets.0",
        "down_blocks.1.attentions.0",
        "mid_block.resnets.0",
        "mid_block.attentions.0",
        "mid_block.resnets.1",
        "up_blocks.0.resnets.0",
        "up_blocks.0.attentions.0",
        "up_blocks.0.resnets.1",
        "up_blocks.0.attentions.1",
        "up_blocks.1.resnets.0",
        "up_blocks.1.resnets.1",
    ],
}


@pytest.mark.parametrize("name", MODELS)
def test_head_and_blocks_are_found_and_the_model_is_left_alone(name):
    model = make_trained(name).train()
    before = state(model)
    anatomy = infer_task(model).anatomy(model, make_batch(model))
    assert (anatomy.head, anatomy.blocks) == (HEADS[name], tuple(ANATOMIES[name]))
    assert anatomy.outputs == (1 if name == "unet" else CLASSES)
    assert not changed(model, before)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_blocks_of_bottlenecks_in_stages_of_one_are_found():
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    model = ResNetForImageClassification(ResNetConfig(layer_type="bottleneck", num_labels=CLASSES, **sizes))
    anatomy = infer_task(model).anatomy(model, make_batch(model))
    assert anatomy.blocks == ("resnet.encoder.stages.0.layers.0", "resnet.encoder.stages.1.layers.0")


def test_a_model_without_repeated_units_has_no_blocks(model):
    anatomy = infer_task(model).anatomy(model, make_batch(model))
    assert anatomy == Anatomy("head", (), 3)
    assert anatomy.last_blocks(0) == ()


def test_the_last_blocks_are_the_last_to_run():
    anatomy = Anatomy("head", ("a", "b", "c"))
    assert [anatomy.last_blocks(n) for n in range(4)] == [(), ("c",), ("b", "c"), ("a", "b", "c")]


class HeadFirst(nn.Module):
    """Its modules are written down in another order than they run in, and a hidden layer is as wide as the head."""

    def __init__(self):
        super().__init__()
        self.out, self.hidden, self.body = nn.Linear(3, 3), nn.Linear(8, 3), nn.Linear(6, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.hidden(torch.tanh(self.body(x)))))


def test_the_head_is_the_last_layer_to_run():
    model, x = HeadFirst(), torch.randn(4, 6)
    assert find_anatomy(model, lambda: model(x)).head == "out"
    assert find_anatomy(model, lambda: model(x), head="hidden").head == "hidden"


class Recurrent(HeadFirst):
    """Its final layer runs once before another one of the same width, and once more after it."""

    def __init__(self):
        super().__init__()
        self.between = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.between(super().forward(x))))


def test_a_head_that_runs_twice_is_still_the_last_layer():
    model, x = Recurrent(), torch.randn(4, 6)
    assert find_anatomy(model, lambda: model(x)).head == "out"


def test_a_head_that_is_no_module_is_refused(model):
    with pytest.raises(ValueError, match="no module 'fc' that could be its head"):
        ClassificationTask(head="fc").anatomy(model, make_batch(model))


def test_a_prediction_that_no_layer_makes_is_refused(model):
    x = torch.randn(4, 6)
    with pytest.raises(ValueError, match="makes its prediction of 6 channels.*Pass its name to the task as `head`"):
        find_anatomy(model, lambda: model(x).repeat(1, 2))


def test_a_failing_model_is_left_as_it_was(model):
    model.train()
    with pytest.raises(RuntimeError):
        find_anatomy(model, lambda: model(torch.randn(4, 5)))
    assert model.training and model.norm.training
    assert not any(module._forward_hooks for module in model.modules())

"""What an informed adversary does first, and the adapters of the peft library."""

from __future__ import annotations

import copy

import datasets
import peft.mapping
import pytest
import torch
from diffusers import UNet2DModel
from points import TinyNet, make_points
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from sophon_hf import FineTuningStrategy
from sophon_hf.attacks.adversary import AdversaryDomains
from sophon_hf.attacks.run import run_attack
from sophon_hf.data.domain import build_domain
from sophon_hf.finetuning.loop import FineTuning
from sophon_hf.finetuning.preparations import prepare_model, reestimate_batch_norm, rescale_weights, shrink_and_perturb
from sophon_hf.finetuning.strategy import ADAPTERS, NotApplicableError
from sophon_hf.tasks.base import infer_task

INFLATION = 30


class ConvNet(nn.Module):
    """Two convolutions with batch norm over 1x8x8 images."""

    def __init__(self, num_classes: int = 3):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 16, 3, padding=1, stride=2), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm1(self.conv1(x)))
        return self.head(torch.relu(self.norm2(self.conv2(x))).mean(dim=(2, 3)))


def make_vit() -> nn.Module:
    sizes = {"image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_size": 16, "intermediate_size": 32}
    return ViTForImageClassification(ViTConfig(num_hidden_layers=2, num_attention_heads=2, num_labels=3, **sizes))


def make_unet() -> nn.Module:
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    )


MODELS = {"conv": (ConvNet, "x"), "vit": (make_vit, "pixel_values"), "unet": (make_unet, "sample")}


def make_images(column: str, examples: int = 120, seed: int = 0) -> datasets.Dataset:
    """8x8 noise in which the class is the place of a bright bar."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(examples) % 3
    images = 0.5 * torch.randn(examples, 1, 8, 8, generator=generator)
    for image, label in zip(images, labels):
        image[:, 2 * label : 2 * label + 2] += 1
    features = datasets.Features(
        {column: datasets.Array3D((1, 8, 8), "float32"), "label": datasets.ClassLabel(names=["a", "b", "c"])}
    )
    return datasets.Dataset.from_dict({column: images.numpy(), "label": labels.tolist()}, features=features)


def make(name: str = "conv"):
    """A model, its task, and a domain for it."""
    torch.manual_seed(0)
    build, column = MODELS[name]
    model = build()
    task = infer_task(model)
    data = make_images(column)
    return model, task, build_domain(data if name != "unet" else data.remove_columns("label"), task.inputs(model))


def predict(model: nn.Module, task, domain) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return task.predict(model, task.collate(domain.rows(torch.arange(20)), list(range(20))))


def settle(model: nn.Module, task, domain) -> None:
    """Give batch norm the statistics of the data."""
    reestimate_batch_norm(model, task, domain)


@torch.no_grad()
def inflate(model: ConvNet, factor: float = INFLATION) -> ConvNet:
    """A protection that changes nothing but how fast the model learns."""
    model = copy.deepcopy(model)
    for conv, norm in ((model.conv1, model.norm1), (model.conv2, model.norm2)):
        conv.weight.mul_(factor)
        conv.bias.mul_(factor)
        norm.running_mean.mul_(factor)
        norm.running_var.mul_(factor**2)
    return model


# Rescaling.


def test_rescaling_restores_norms_and_leaves_the_function():
    model, task, domain = make()
    settle(model, task, domain)
    inflated = inflate(model)
    expected = predict(model, task, domain)
    torch.testing.assert_close(predict(inflated, task, domain), expected, rtol=1e-3, atol=1e-3)
    inflated.train()
    assert rescale_weights(inflated, task, domain) == 2
    assert inflated.training
    torch.testing.assert_close(predict(inflated, task, domain), expected, rtol=1e-3, atol=1e-3)
    for name in ("conv1", "conv2"):
        norms = [m.get_submodule(name).weight.norm().item() for m in (inflated, model)]
        assert norms[0] == pytest.approx(norms[1], rel=0.3)
    torch.testing.assert_close(inflated.head.weight, model.head.weight, rtol=0, atol=0)


def test_an_inflation_hinders_small_rates_and_rescaling_undoes_it():
    model, task, domain = make()
    settle(model, task, domain)
    test = build_domain(make_images("x", seed=1), task.inputs(model))
    attack = FineTuningStrategy(
        "direct", transfer="pattern", pattern="conv", optimizer="sgd", learning_rate=0.1, epochs=15
    )

    def reached(victim, **changes):
        curve = run_attack(victim, task, attack.with_changes(**changes), AdversaryDomains(domain, test), measured=(0,))
        return curve.test[-1] - curve.test[0], curve.loss[-1]

    protected = inflate(model)
    open_gain, open_loss = reached(model)
    hindered_gain, hindered_loss = reached(protected)
    undone_gain, undone_loss = reached(protected, preparation="rescale")
    assert min(open_gain, undone_gain) > 0.2 > 0.05 > hindered_gain
    assert undone_loss == pytest.approx(open_loss, rel=0.05) and hindered_loss > 1.1 * undone_loss


class Skipping(ConvNet):
    """The first convolution feeds a skip connection too, so it is not scale-invariant; the second is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(x)
        x = x + torch.relu(self.norm1(x))
        return self.head(torch.relu(self.norm2(self.conv2(x))).mean(dim=(2, 3)))


class Twice(ConvNet):
    """One convolution feeds two normalisations."""

    def __init__(self):
        super().__init__()
        self.norm3 = nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(x)
        x = torch.relu(self.norm1(x)) + torch.relu(self.norm3(x))
        return self.head(self.conv2(x).mean(dim=(2, 3)))


@pytest.mark.parametrize("build, layer, untouched", [(Skipping, "conv2", "conv1"), (Twice, "conv1", "conv2")])
def test_only_layers_that_feed_nothing_but_normalisations_are_rescaled(build, layer, untouched):
    _, task, domain = make()
    model = build()
    with torch.no_grad():
        for conv in (model.conv1, model.conv2):
            conv.weight.mul_(5)
    settle(model, task, domain)
    expected, before = predict(model, task, domain), copy.deepcopy(model)
    assert rescale_weights(model, task, domain) == 1
    torch.testing.assert_close(predict(model, task, domain), expected, rtol=1e-3, atol=1e-3)
    assert model.get_submodule(layer).weight.norm() < 0.5 * before.get_submodule(layer).weight.norm()
    torch.testing.assert_close(model.get_submodule(untouched).weight, before.get_submodule(untouched).weight)


@pytest.mark.parametrize("name", ["vit", "unet"])
def test_models_whose_layers_feed_skips_are_not_rescaled(name):
    model, task, domain = make(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    expected = predict(model, task, domain)
    with pytest.raises(NotApplicableError, match="no layer that feeds a normalisation"):
        rescale_weights(model, task, domain)
    torch.testing.assert_close(predict(model, task, domain), expected, rtol=1e-4, atol=1e-5)


# Batch-norm statistics.


def test_batch_norm_statistics_are_plain_averages_over_batches():
    model, task, domain = make()
    with torch.no_grad():
        model.norm1.running_mean.fill_(9)
        model.norm2.running_var.fill_(9)
    momentum, weights = model.norm1.momentum, model.conv1.weight.clone()
    reestimate_batch_norm(model, task, domain, seed=3)
    assert model.norm1.momentum == momentum == model.norm2.momentum
    assert torch.equal(model.conv1.weight, weights)

    # 20 batches of 100 out of 120: every image is seen 16 or 17 times, so the statistics are nearly those of all.
    features = model.conv1(domain.rows(torch.arange(120))["x"]).transpose(0, 1).flatten(1)
    torch.testing.assert_close(model.norm1.running_mean, features.mean(dim=1), rtol=0, atol=5e-3)
    torch.testing.assert_close(model.norm1.running_var, features.var(dim=1), rtol=2e-2, atol=0)


def test_batch_norm_statistics_of_one_batch_are_exact(model, points):
    """A domain of less than a batch is one batch, again and again."""
    task = infer_task(model)
    domain = build_domain(points.select(range(30)), task.inputs(model))
    reestimate_batch_norm(model, task, domain)
    features = model.body(domain.rows(torch.arange(30))["x"])
    torch.testing.assert_close(model.norm.running_mean, features.mean(dim=0))
    torch.testing.assert_close(model.norm.running_var, features.var(dim=0))
    assert model.norm.num_batches_tracked == 20


def test_batch_norm_cannot_be_reestimated_where_there_is_none(points):
    model = TinyNet(batch_norm=False)
    task = infer_task(model)
    domain = build_domain(points, task.inputs(model))
    with pytest.raises(NotApplicableError, match="TinyNet has no batch norm"):
        reestimate_batch_norm(model, task, domain)


# Shrink and perturb.


def test_shrink_and_perturb(model):
    layer = nn.Linear(200, 300)
    model.body, before = layer, layer.weight.detach().clone()
    bias, norm = layer.bias.clone(), copy.deepcopy(model.norm)
    model.single = nn.Linear(1, 1)
    other = copy.deepcopy(model)
    shrink_and_perturb(model, seed=1)
    noise = layer.weight - 0.5 * before
    assert noise.std().item() == pytest.approx(0.1 * before.std().item(), rel=0.02)
    assert abs(noise.mean().item()) < 1e-3
    assert torch.corrcoef(torch.stack([noise.flatten(), before.flatten()]))[0, 1].abs() < 0.02
    assert torch.equal(layer.bias, bias) and torch.equal(model.norm.weight, norm.weight)
    assert model.single.weight.isfinite().all()
    shrink_and_perturb(other, seed=2)
    assert not torch.equal(other.body.weight, layer.weight)


# Warm-up.


def test_a_warm_up_needs_original_data_and_learns_them(model, domain):
    task = infer_task(model)
    strategy = FineTuningStrategy(preparation="warm_up", learning_rate=0.01)
    with pytest.raises(NotApplicableError, match="needs data of the original domain"):
        prepare_model(model, task, strategy, domain, None, 0)
    original = build_domain(make_points(7), task.inputs(model))
    batch = original.rows(torch.arange(120))
    before = (task.predict(model.eval(), batch).argmax(dim=1) == batch["labels"]).float().mean()
    prepare_model(model, task, strategy, domain, original, 0)
    after = (task.predict(model.eval(), batch).argmax(dim=1) == batch["labels"]).float().mean()
    assert after > 0.9 > 0.6 > before


def test_no_preparation_changes_nothing(model, domain):
    before = copy.deepcopy(model.state_dict())
    prepare_model(model, infer_task(model), FineTuningStrategy(), domain, None, 0)
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)


# Adapters.

# peft's OFT does not start as the identity on convolutions, so it goes to linear layers only.
NOT_APPLICABLE = {("oft", "conv")}


def make_adapted(name: str, adapter: str, steps: int = 12):
    """A fine-tuning with an adapter and a new head, its batch, and the head's name."""
    model, task, domain = make(name)
    batch = task.collate(domain.rows(torch.arange(24)), list(range(24)))
    strategy = FineTuningStrategy("new_head", adapter=adapter, rank=4, learning_rate=0.02)
    structure = task.structure(model, batch)
    torch.manual_seed(1)
    tuning = FineTuning(model, task, strategy, [batch] * steps, steps, structure=structure)
    return tuning, batch, structure.head


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("name", MODELS)
def test_adapters(name, adapter):
    """The same function at the start, apart from the new head; only adapter and head move; it learns."""
    if (adapter, name) in NOT_APPLICABLE:
        with pytest.raises(NotApplicableError, match="finds no layer of ConvNet that it could go to"):
            make_adapted(name, adapter)
        return
    plain, task, domain = make(name)
    tuning, batch, head = make_adapted(name, adapter)
    model = tuning.model
    plain.set_submodule(head, copy.deepcopy(model.get_submodule(head)))
    torch.testing.assert_close(predict(model, task, domain), predict(plain, task, domain), rtol=1e-4, atol=1e-5)

    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    allowed = {id(p) for p in tuning.parameters}
    losses = [float(update.loss) for update in tuning]
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert all(id(p) in allowed for n, p in model.named_parameters() if n in moved)
    old = {n.replace(".base_layer", "") for n in before} & dict(plain.named_parameters()).keys()
    assert len(old) == len(dict(plain.named_parameters())), "the layers themselves are still there"
    assert {n for n in moved if n.replace(".base_layer", "") in old} == {n for n in before if n.startswith(f"{head}.")}
    assert len(moved) > len([n for n in before if n.startswith(f"{head}.")]), "the adapter moved"
    assert losses[-1] < 0.97 * losses[0]


def test_adapters_leave_grouped_convolutions_alone():
    model, task, domain = make()
    model.conv2 = nn.Conv2d(8, 16, 3, padding=1, stride=2, groups=8)
    batch = domain.rows(torch.arange(10))
    strategy = FineTuningStrategy("new_head", adapter="lora", rank=2)
    FineTuning(model, task, strategy, [batch], 1, structure=task.structure(model, batch))
    assert type(model.conv1) is not nn.Conv2d
    assert type(model.conv2) is nn.Conv2d


def test_an_adapter_with_a_pattern_goes_to_the_layers_that_it_names():
    model, task, domain = make("unet")
    batch = task.collate(domain.rows(torch.arange(4)), list(range(4)))
    strategy = FineTuningStrategy(adapter="lora", pattern="attn|attention")
    tuning = FineTuning(model, task, strategy, [batch], 1, structure=task.structure(model, batch))
    adapted = {name.split(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
    assert adapted and all("attentions" in name for name in adapted)
    assert {name.rsplit(".", 1)[1] for name in adapted} == {"to_q", "to_k", "to_v", "0"}
    assert len(list(tuning)) == 1
    with pytest.raises(NotApplicableError, match="lora finds no layer of ConvNet"):
        model, task, domain = make()
        FineTuning(model, task, strategy, [], 1, structure=task.structure(model, domain.rows(torch.arange(4))))


class CrossAttentionNet(nn.Module):
    """Each image asks a vector of another width, which peft's adapters of attention do not support."""

    def __init__(self):
        super().__init__()
        self.context = nn.Parameter(torch.randn(5, 16))
        self.attention = nn.MultiheadAttention(64, 2, kdim=16, vdim=16, batch_first=True)
        self.head = nn.Linear(64, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        context = self.context.expand(len(x), -1, -1)
        return self.head(self.attention(x.flatten(1).unsqueeze(1), context, context)[0][:, 0])


@pytest.mark.parametrize("adapter", ["lora", "rslora"])
def test_a_layer_that_peft_refuses_makes_the_adapter_not_applicable(adapter):
    model = CrossAttentionNet()
    task = infer_task(model)
    batch = build_domain(make_images("x"), task.inputs(model)).rows(torch.arange(10))
    strategy = FineTuningStrategy("new_head", adapter=adapter)
    with pytest.raises(NotApplicableError, match=f"peft cannot put {adapter} on CrossAttentionNet: .* is supported"):
        FineTuning(model, task, strategy, [batch], 1, structure=task.structure(model, batch))


def test_an_error_inside_peft_is_not_taken_for_a_refusal(model, domain):
    # A computed weight, which AdaLoRA tries to freeze.
    model.body = nn.utils.parametrizations.weight_norm(model.body)
    task, batch = infer_task(model), domain.rows(torch.arange(10))
    strategy = FineTuningStrategy("new_head", adapter="adalora")
    with pytest.raises(RuntimeError, match="leaf variables"):
        FineTuning(model, task, strategy, [batch], 1, structure=task.structure(model, batch))


def test_a_defect_of_ours_is_not_taken_for_a_refusal(monkeypatch):
    def broken(*args, **settings):
        raise TypeError("this layer is not supported")

    monkeypatch.setitem(peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING, peft.PeftType.LORA, broken)
    with pytest.raises(TypeError, match="this layer is not supported"):
        make_adapted("conv", "lora")


# A preparation that does not do what it says would pass for resistance.


class Scales(nn.Module):
    """No matrix to shrink."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))


def test_a_preparation_that_changes_nothing_is_refused():
    strategy = FineTuningStrategy(preparation="shrink_and_perturb")
    with pytest.raises(RuntimeError, match="'shrink_and_perturb' changed nothing of Scales"):
        prepare_model(Scales(), None, strategy, None, None, 0)


class Watchful(ConvNet):
    """Knows whether its first weights are inflated, and answers otherwise where they are not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (1 if self.conv1.weight.norm() > 100 else -1)


def test_a_re_scaling_that_changes_the_function_is_refused():
    _, task, domain = make()
    torch.manual_seed(0)
    model = Watchful()
    with torch.no_grad():
        model.conv1.weight *= 1e4
    with pytest.raises(RuntimeError, match="Re-scaling changed what Watchful predicts by 1"):
        rescale_weights(model, task, domain)


def test_a_model_with_the_norms_of_an_initialisation_has_nothing_to_re_scale():
    model, task, domain = make()
    model.conv1.weight.data *= 3
    assert rescale_weights(model, task, domain) > 0
    with pytest.raises(NotApplicableError, match="the layers of ConvNet have the norm of an initialisation already"):
        rescale_weights(model, task, domain)


def test_an_adapter_that_gets_no_gradient_is_refused():
    model, task, domain = make()
    nn.init.zeros_(model.head.weight)
    data = AdversaryDomains(domain, domain, domain)
    with pytest.raises(ValueError, match="Every gradient of lora is zero at its first step"):
        run_attack(model, task, FineTuningStrategy(adapter="lora", epochs=1), data)


class Stubborn(nn.Linear):
    """Keeps its weights, whatever it is told."""

    def reset_parameters(self) -> None:
        if not hasattr(self, "made"):
            super().reset_parameters()
        self.made = True


@pytest.mark.parametrize("initialization, adapter", [("new_head", None), ("new_head", "lora"), ("scratch", None)])
def test_a_head_that_was_not_replaced_is_refused(initialization, adapter):
    model, task, domain = make()
    model.head = Stubborn(16, 3)
    strategy = FineTuningStrategy(initialization, adapter=adapter, epochs=1)
    with pytest.raises(RuntimeError, match="'head' was to be re-initialised, and has the weights that it had"):
        run_attack(model, task, strategy, AdversaryDomains(domain, domain, domain))

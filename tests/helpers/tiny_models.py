"""A tiny model of every kind, and what fine-tuning one changes."""

import torch
from diffusers import UNet2DModel
from points import TinyNet
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

from sophon_hf import FineTuningStrategy
from sophon_hf.finetuning.loop import FineTuning
from sophon_hf.tasks.base import infer_task

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
    structure = task.structure(model, batch)
    return FineTuning(model, task, strategy, [batch] * steps, steps, structure=structure, num_classes=num_classes)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in tensors}


def changed(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    after = state(model)
    assert after.keys() == before.keys()
    return {name for name in after if not torch.equal(after[name], before[name])}


def named(model: nn.Module, prefixes: tuple[str, ...]) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.startswith(prefixes)}


HEADS = {
    "plain": "classifier.1",
    "resnet": "classifier.1",
    "vit": "classifier",
    "convnext": "classifier",
    "bert": "classifier",
    "unet": "conv_out",
}


def small_resnet(blocks: int = 2) -> nn.Module:
    config = ResNetConfig(
        num_channels=3,
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[blocks, blocks],
        layer_type="basic",
        num_labels=3,
    )
    return ResNetForImageClassification(config)


def small_vit() -> nn.Module:
    config = ViTConfig(
        hidden_size=12,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=16,
        patch_size=8,
        num_labels=3,
    )
    return ViTForImageClassification(config)

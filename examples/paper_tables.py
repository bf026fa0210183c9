"""Tables 1 to 7 of the paper as data: models, domains, attacks, published figures, and their small counterparts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
)

from sophon_hf import FineTuningStrategy
from sophon_hf.attacks.sweeps import load_sweep

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
from pairs import DEVIATION, MEAN, ResNet20

PAPER = load_sweep("paper")[0]


@dataclass(frozen=True)
class Experiment:
    """One protected model and the attacks on it, by the name of their rows."""

    restricted: str
    attacks: dict[str, FineTuningStrategy]
    model: str = "CAFormer"
    original: str = "ImageNette"


@dataclass(frozen=True)
class Table:
    """A table: its experiments, and the paper's figures, one line a row.

    A line is `attack | method | original domain, epochs 0, 1, 5, 10, 15 and 20 of the restricted one`.
    """

    title: str
    experiments: list[Experiment]
    published: str
    with_ntl: bool = False

    def figures(self) -> dict[tuple[str, str], list[str]]:
        """(attack, method) -> the seven published figures of its row."""
        rows = [line.split("|") for line in self.published.strip().splitlines()]
        return {(attack.strip(), method.strip()): values.split() for attack, method, values in rows}


@dataclass(frozen=True)
class Scale:
    """How large everything is.

    Attributes:
        domains: The paper's name of a domain -> (Hub id or folder, training split, test split or None).
        models: The paper's name of a model -> builds one, given the number of labels.
        image_size: Pixels a side; of the diffusion model's images: `diffusion_size`.
        examples: How many the adversary has, and how many measure a result; all where None.
        validation_share: Share of the adversary's half that chooses attacks.
        seeds: Of the attacks.
        pretraining: Steps of the classifiers and of the diffusion model, and their Adam's rate.
        weights: The paper's name of a model -> a file beside the data's folder, in place of pre-training.
        ntl_steps: Updates of NTL.
        config: Fields of `SophonConfig`; the paper's where left out.
        adapt: What becomes of an attack of the paper.
    """

    domains: dict[str, tuple[str, str, str | None]]
    models: dict[str, Callable[[int], nn.Module]]
    image_size: int
    diffusion_size: int
    examples: tuple[int | None, int | None]
    validation_share: float
    seeds: list[int]
    pretraining: tuple[int, int, float]
    ntl_steps: int
    weights: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    adapt: Callable[[FineTuningStrategy], FineTuningStrategy] = lambda strategy: strategy


class Vgg(nn.Module):
    """VGG-13 with batch norm and one linear layer in place of three: 9.4 M parameters (9.6 in the paper)."""

    def __init__(self, num_labels: int, width: int = 64):
        super().__init__()
        stages = [width * factor for factor in (1, 2, 4, 8, 8)]
        channels = [3] + [c for c in stages for _ in range(2)]
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(pairwise(channels)):
            layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if i % 2 else []
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(stages[-1], num_labels)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits."""
        return self.classifier(self.features(pixel_values))


def _timm(architecture: str) -> Callable[[int], nn.Module]:
    """From weights of ImageNet: the paper does not say, but its accuracies in ImageNette (98.6 and more) suggest it."""

    def build(num_labels: int) -> nn.Module:
        config = TimmWrapperConfig.from_pretrained(f"timm/{architecture}", num_labels=num_labels)
        return TimmWrapperForImageClassification.from_pretrained(
            f"timm/{architecture}", config=config, ignore_mismatched_sizes=True
        )

    return build


def _small_resnet(depths: list[int], layer_type: str = "basic", factor: int = 1) -> Callable[[int], nn.Module]:
    widths = [16 * factor, 32 * factor, 64 * factor]
    return lambda num_labels: ResNetForImageClassification(
        ResNetConfig(
            embedding_size=16, hidden_sizes=widths, depths=depths, layer_type=layer_type, num_labels=num_labels
        )
    )


class SmallResNet20(ResNet20):
    """ResNet-20 on images in [0, 1]: it normalises them as its weights expect."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits."""
        mean, deviation = (
            torch.tensor(values, device=pixel_values.device)[:, None, None] for values in (MEAN, DEVIATION)
        )
        return super().forward((pixel_values - mean) / deviation)


def _unet(size: int, widths: tuple[int, ...], layers: int, groups: int) -> Callable[[int], nn.Module]:
    return lambda _: UNet2DModel(
        sample_size=size,
        block_out_channels=widths,
        layers_per_block=layers,
        norm_num_groups=groups,
        down_block_types=("DownBlock2D",) * (len(widths) - 1) + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * (len(widths) - 1),
    )


def _small_attack(attack: FineTuningStrategy) -> FineTuningStrategy:
    """500 images give few steps, so batches are a tenth as large, and rates three times (Adadelta's is relative)."""
    factor = 1 if attack.optimizer == "adadelta" else 3
    return attack.with_changes(learning_rate=factor * attack.learning_rate, batch_size=attack.batch_size // 10)


SCALES = {
    "paper": Scale(
        domains={
            "ImageNette": ("frgfm/imagenette:160px", "train", "validation"),
            "CIFAR-10": ("uoft-cs/cifar10", "train", "test"),
            "CINIC": ("flwrlabs/cinic10", "train", "test"),
            "STL": ("tanganke/stl10", "train", "test"),
            "MNIST": ("ylecun/mnist", "train", "test"),
            "SVHN": ("ufldl-stanford/svhn:cropped_digits", "train", "test"),
            "CIFAR-100": ("uoft-cs/cifar100", "train", "test"),
            "CelebA": ("nielsr/CelebA-faces", "train", None),
            "FFHQ": ("merkol/ffhq-256", "train", None),
        },
        models={
            "CAFormer": _timm("caformer_m36.sail_in1k"),
            "ResNet-50": _timm("resnet50.a1_in1k"),
            "ResNet-34": _timm("resnet34.a1_in1k"),
            "ResNet-18": _timm("resnet18.a1_in1k"),
            "VGG": Vgg,
            "UNet": _unet(32, (128, 256, 256), 2, 32),
        },
        image_size=64,
        diffusion_size=32,
        examples=(None, None),
        validation_share=0.1,
        seeds=[0, 1, 2, 3, 4],
        pretraining=(4000, 100_000, 1e-4),
        ntl_steps=4000,
    ),
    "small": Scale(
        domains={
            "ImageNette": ("cifar10", "train", "test"),
            "CIFAR-10": ("mnist", "train", "test"),
            "CINIC": ("tiny_imagenet_20", "train", "test"),
            "STL": ("face_ages", "train", "test"),
            "SVHN": ("fashion_mnist", "train", "test"),
            "CIFAR-100": ("cifar100_20", "train", "test"),
            "CelebA": ("celeba_faces", "train", "test"),
        },
        models={
            "CAFormer": SmallResNet20,
            "ResNet-50": _small_resnet([1, 1, 1], "bottleneck", factor=4),
            "ResNet-34": _small_resnet([2, 2, 2]),
            "ResNet-18": _small_resnet([1, 1, 1]),
            "VGG": lambda num_labels: Vgg(num_labels, width=16),
            "UNet": _unet(16, (16, 32), 1, 8),
        },
        image_size=32,
        diffusion_size=16,
        examples=(500, 1000),
        validation_share=0.03,
        seeds=[0, 1, 2],
        pretraining=(3000, 500, 3e-3),
        ntl_steps=400,
        weights={"CAFormer": "weights/resnet20_cifar10.safetensors"},
        config={
            "K": 20,
            "max_steps": 200,
            "alpha": 1e-3,
            "beta": 5e-4,
            "l_NTR": 4,
            "eval_steps": 20,
            "per_device_train_batch_size": 64,
            "simulated_examples": 100,
            "strategy_space": {"learning_rates": [1e-4, 1e-3, 1e-2], "batch_sizes": [20]},
            "bf16": True,
        },
        adapt=_small_attack,
    ),
}

TABLES = {
    1: Table(
        "Overall effectiveness, classification",
        [
            Experiment(
                "CIFAR-10", dict(zip(("direct+all", "initFC+FC", "initFC+all"), load_sweep("paper"), strict=True))
            )
        ],
        """
        direct+all | Scratch  | - - 49.1±1.2 59.5±0.7 60.6±0.5 62.0±0.5 62.7±0.5
        direct+all | Original | 99.6 9.3 42.8±4.0 78.5±0.4 82.4±0.3 84.2±0.2 84.8±0.2
        direct+all | NTL      | 90.2 10.3 11.7±0.9 72.5±1.6 81.4±0.5 83.6±0.3 84.4±0.4
        direct+all | SOPHON   | 96.2 10.0 10.0±0.0 10.5±0.8 13.0±1.7 15.0±1.1 15.2±0.6
        initFC+FC  | Original | 99.6 9.3 13.5±0.8 28.5±0.3 37.3±0.2 41.8±0.2 44.5±0.2
        initFC+FC  | NTL      | 90.2 10.3 19.7±0.4 42.6±0.5 50.9±0.3 54.3±0.2 56.2±0.1
        initFC+FC  | SOPHON   | 96.2 10.0 10.0±0.0 10.0±0.0 10.0±0.0 10.1±1.1 10.4±1.4
        initFC+all | Original | 99.6 9.3 43.1±6.7 79.1±1.1 83.4±0.4 84.4±0.5 85.1±0.2
        initFC+all | NTL      | 90.2 10.3 38.1±7.5 78.5±1.8 84.1±0.9 86.1±0.6 86.7±0.6
        initFC+all | SOPHON   | 96.2 10.0 10.0±0.0 10.4±1.2 11.1±3.6 10.9±1.4 13.3±3.1
        """,
        with_ntl=True,
    ),
    2: Table(
        "Overall effectiveness, generation (FFHQ is in the paper's Fig. 12 only)",
        [Experiment(domain, {domain: PAPER}, "UNet", "CIFAR-100") for domain in ("CelebA", "FFHQ")],
        """
        CelebA | Scratch  | - - 0.614±4.6e-3 0.511±2.4e-3 0.490±1.5e-3 0.483±1.3e-3 0.479±1.1e-4
        CelebA | Original | 0.478 0.477 0.457±0.3e-4 0.449±0.3e-4 0.447±0.1e-4 0.445±0.5e-4 0.445±0.5e-4
        CelebA | SOPHON   | 0.500 0.990 0.913±0.9e-4 0.892±1.8e-4 0.842±1.1e-4 0.750±0.2e-4 0.705±0.7e-4
        """,
    ),
    3: Table(
        "Restricted domains",
        [Experiment(domain, {domain: PAPER}) for domain in ("CIFAR-10", "CINIC", "STL", "MNIST", "SVHN")],
        """
        CIFAR-10 | Scratch  | - - 49.1±1.2 59.5±0.7 60.6±0.5 62.0±0.5 62.7±0.5
        CIFAR-10 | Original | 99.6 9.3 52.4±3.8 80.0±0.4 83.6±0.3 84.6±0.2 84.9±0.2
        CIFAR-10 | SOPHON   | 96.2 10.0 10.0±0.0 10.3±0.4 12.8±1.5 15.2±0.5 14.3±1.9
        CINIC | Scratch  | - - 42.4±1.1 50.9±0.1 50.2±0.7 50.6±0.4 51.3±0.3
        CINIC | Original | 99.6 9.2 48.9±2.8 69.7±0.5 72.9±0.2 74.2±0.2 74.4±0.2
        CINIC | SOPHON   | 97.6 10.0 10.0±0.0 9.6±0.5 10.1±0.3 10.0±0.0 8.8±1.9
        STL | Scratch  | - - 23.5±4.0 38.9±2.5 42.8±1.5 45.7±0.8 46.3±0.3
        STL | Original | 99.6 6.9 10.0±0.3 19.9±2.1 41.6±2.6 61.1±3.7 71.7±5.1
        STL | SOPHON   | 97.4 10.0 10.0±0.0 10.0±0.0 10.6±0.3 11.6±0.3 11.0±0.2
        MNIST | Scratch  | - - 87.5±16.0 97.9±0.6 98.3±0.4 98.5±0.4 98.4±0.3
        MNIST | Original | 99.6 12.3 96.8±0.3 98.5±0.3 98.9±0.1 99.0±0.1 99.0±0.1
        MNIST | SOPHON   | 97.6 8.9 11.3±0.0 11.3±0.0 11.3±0.0 11.3±0.0 11.8±1.0
        SVHN | Scratch  | - - 44.3±4.9 77.7±0.4 82.3±0.5 84.1±0.2 84.8±0.2
        SVHN | Original | 99.6 7.4 60.3±5.5 90.7±0.4 92.6±0.3 93.1±0.2 93.2±0.3
        SVHN | SOPHON   | 97.8 7.8 19.6±0.0 19.6±0.0 19.6±0.0 19.6±0.0 19.6±0.0
        """,
    ),
    4: Table(
        "Model architectures",
        [
            Experiment("CIFAR-10", {model: PAPER}, model)
            for model in ("CAFormer", "ResNet-50", "ResNet-34", "ResNet-18", "VGG")
        ],
        """
        CAFormer | Scratch  | - - 49.1±1.2 59.5±0.7 60.6±0.5 62.0±0.5 62.7±0.5
        CAFormer | Original | 99.6 9.3 52.9±3.3 80.0±0.5 83.6±0.3 84.6±0.2 84.9±0.2
        CAFormer | SOPHON   | 96.2 10.0 10.9±0.6 11.7±0.8 11.5±1.0 ? 12.0±0.7
        ResNet-50 | Scratch  | - - 37.5±4.1 50.4±2.6 57.0±1.3 60.4±0.8 61.5±1.1
        ResNet-50 | Original | 99.2 5.2 47.0±0.4 66.9±0.2 69.9±0.2 70.6±0.2 70.9±0.3
        ResNet-50 | SOPHON   | 95.6 11.0 11.0±0.1 12.6±0.3 13.9±0.4 15.7±0.1 16.7±0.1
        ResNet-34 | Scratch  | - - 29.1±4.2 57.4±3.2 67.5±0.9 69.6±1.1 70.0±0.9
        ResNet-34 | Original | 99.0 5.3 39.9±0.1 64.0±0.1 70.0±0.2 72.4±0.3 73.4±0.2
        ResNet-34 | SOPHON   | 94.8 10.0 10.6±0.1 11.1±0.3 11.1±0.4 11.4±0.3 11.9±0.5
        ResNet-18 | Scratch  | - - 44.8±1.7 67.4±1.0 71.3±0.6 72.5±0.5 72.1±0.8
        ResNet-18 | Original | 98.6 9.3 41.4±0.2 62.4±0.2 68.1±0.1 70.7±0.1 71.5±0.3
        ResNet-18 | SOPHON   | 95.0 8.4 10.7±0.1 11.3±0.1 11.6±0.5 11.6±0.2 12.0±0.1
        VGG | Scratch  | - - 13.7±4.6 58.0±1.0 75.0±1.1 78.0±0.6 78.8±0.3
        VGG | Original | 95.4 2.8 33.9±0.2 72.4±0.2 79.9±0.3 82.9±0.2 84.6±0.2
        VGG | SOPHON   | 91.2 10.5 10.4±0.1 10.9±0.3 10.8±0.8 17.4±4.2 18.0
        """,
    ),
    5: Table(
        "Optimizers",
        [
            Experiment(
                "CIFAR-10",
                dict(
                    zip(
                        ("Momentum", "Nesterov", "Adagrad", "Adadelta", "Adam"),
                        load_sweep("paper-optimizers"),
                        strict=True,
                    )
                ),
            )
        ],
        """
        Momentum | Scratch  | - - 49.3±1.0 59.4±0.7 60.3±0.2 61.7±0.6 62.2±0.7
        Momentum | Original | 99.6 9.3 51.5±4.5 79.7±1.1 83.4±0.6 84.8±0.2 85.0±0.4
        Momentum | SOPHON   | 96.2 10.0 10.0±0.0 10.0±0.0 10.2±0.7 10.9±0.7 10.6±0.8
        Nesterov | Scratch  | - - 51.1±0.8 59.8±0.6 61.1±0.6 61.9±0.2 62.6±0.7
        Nesterov | Original | 99.6 9.3 50.1±3.8 79.8±0.3 83.4±0.2 84.7±0.2 84.9±0.2
        Nesterov | SOPHON   | 96.2 10.0 10.0±0.0 10.0±0.0 10.1±0.7 10.9±0.7 10.4±0.9
        Adagrad | Scratch  | - - 47.8±1.2 62.6±0.4 64.3±0.3 64.3±0.3 64.2±0.4
        Adagrad | Original | 99.6 9.3 80.1±1.1 84.8±0.5 84.9±0.2 84.7±0.4 84.6±0.4
        Adagrad | SOPHON   | 96.2 10.0 10.0±0.0 10.0±0.0 9.9±0.1 12.0±2.4 22.2±12.7
        Adadelta | Scratch  | - - 49.5±0.8 59.7±0.5 60.8±0.7 63.6±1.0 64.4±0.4
        Adadelta | Original | 99.6 9.3 80.1±0.6 86.6±0.4 87.1±0.2 87.3±0.3 87.3±0.3
        Adadelta | SOPHON   | 96.2 10.0 9.8±0.5 12.3±2.5 17.6±1.0 31.4±4.1 56.4±2.1
        Adam | Scratch  | - - 53.7±0.2 62.7±0.4 63.4±0.6 63.8±0.2 63.5±0.5
        Adam | Original | 99.6 9.3 87.4±0.9 89.8±0.3 90.1±0.3 90.0±0.4 89.9±0.3
        Adam | SOPHON   | 96.2 10.0 10.0±0.0 9.8±0.4 10.0±0.0 23.2±10.8 50.2±4.0
        """,
    ),
    6: Table(
        "Learning rates",
        [
            Experiment(
                "CIFAR-10", dict(zip(("5e-6", "1e-5", "1e-4", "1e-3", "1e-2"), load_sweep("paper-rates"), strict=True))
            )
        ],
        """
        5e-6 | Scratch  | - - 20.3±1.2 31.7±0.2 35.9±0.0 38.0±0.1 39.7±0.1
        5e-6 | Original | 99.6 9.3 11.1±0.3 20.9±0.4 37.8±0.4 55.3±0.2 63.0±0.1
        5e-6 | SOPHON   | 96.2 10.0 1.4±0.0 1.3±0.0 1.2±0.0 1.1±0.0 1.0±0.0
        1e-5 | Scratch  | - - 25.0±0.9 35.8±0.1 39.6±0.1 41.9±0.3 43.5±0.2
        1e-5 | Original | 99.6 9.3 13.1±0.3 37.1±0.6 62.6±0.4 70.3±0.4 74.0±0.3
        1e-5 | SOPHON   | 96.2 10.0 1.4±0.0 1.2±0.0 1.0±0.0 0.9±0.0 0.9±0.0
        1e-4 | Scratch  | - - 39.2±0.4 48.2±0.2 52.3±0.2 54.0±0.3 54.9±0.3
        1e-4 | Original | 99.6 9.3 53.0±1.0 79.8±0.2 83.7±0.1 84.6±0.1 84.8±0.2
        1e-4 | SOPHON   | 96.2 10.0 1.0±0.0 1.4±0.0 8.5±0.4 9.8±0.1 8.9±1.1
        1e-3 | Scratch  | - - 48.8±0.3 56.5±0.3 58.4±0.1 58.8±0.0 58.7±0.0
        1e-3 | Original | 99.6 9.3 74.1±0.6 86.0±0.7 86.8±0.7 87.2±0.5 87.2±1.0
        1e-3 | SOPHON   | 96.2 10.0 8.0±2.5 10.0±0.0 10.0±0.0 10.0±0.0 10.0±0.0
        1e-2 | Scratch  | - - 50.2±1.2 59.7±0.6 60.5±0.4 62.1±0.6 62.8±0.4
        1e-2 | Original | 99.6 9.3 10.0±0.0 10.0±0.0 10.0±0.0 23.5±13.5 41.9±31.9
        1e-2 | SOPHON   | 96.2 10.0 10.0±0.0 10.0±0.0 10.0±0.0 10.0±0.0 39.2±34.8
        """,
    ),
    7: Table(
        "Batch sizes",
        [
            Experiment(
                "CIFAR-10", dict(zip(("50", "100", "150", "200", "250"), load_sweep("paper-batches"), strict=True))
            )
        ],
        """
        50 | Scratch  | - - 46.2±0.3 54.6±0.4 55.9±0.2 56.4±0.2 57.0±0.3
        50 | Original | 99.6 9.3 72.9±2.9 84.7±0.2 86.1±0.5 86.5±0.1 86.6±0.5
        50 | SOPHON   | 96.2 10.0 1.1±0.1 8.2±1.2 10.0±0.0 9.2±1.4 9.9±0.0
        100 | Scratch  | - - 42.8±0.4 51.8±0.3 54.9±0.1 55.2±0.1 55.3±0.4
        100 | Original | 99.6 9.3 63.0±3.9 83.1±0.3 85.4±0.1 85.7±0.2 85.7±0.2
        100 | SOPHON   | 96.2 10.0 0.9±0.0 8.2±1.0 9.4±0.8 7.7±2.1 9.2±1.2
        150 | Scratch  | - - 40.5±0.3 49.7±0.1 53.6±0.2 54.9±0.1 55.2±0.5
        150 | Original | 99.6 9.3 59.4±1.9 81.3±0.1 84.6±0.2 85.2±0.2 85.2±0.2
        150 | SOPHON   | 96.2 10.0 0.9±0.0 1.6±0.1 9.8±0.0 8.4±1.1 8.2±1.6
        200 | Scratch  | - - 39.2±0.4 48.2±0.2 52.3±0.2 54.0±0.3 54.9±0.3
        200 | Original | 99.6 9.3 53.0±1.0 79.8±0.2 83.7±0.1 84.6±0.1 84.8±0.2
        200 | SOPHON   | 96.2 10.0 1.0±0.0 1.4±0.0 8.3±0.4 9.8±0.1 8.1±1.3
        250 | Scratch  | - - 38.0±0.3 46.9±0.2 51.1±0.1 53.1±0.3 54.0±0.2
        250 | Original | 99.6 9.3 41.2±2.7 78.4±0.3 82.9±0.3 84.1±0.1 84.8±0.1
        250 | SOPHON   | 96.2 10.0 1.0±0.0 1.2±0.0 3.6±0.2 9.8±0.0 9.9±0.0
        """,
    ),
}

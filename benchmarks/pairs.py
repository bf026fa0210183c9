"""The domain pairs that protection is measured on: model, original domain, restricted domain, all seeded."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import torch
from PIL import ImageOps
from safetensors.torch import load_model
from torch import nn
from torch.nn import functional as F

from sophon_hf.data.batches import Stream
from sophon_hf.data.domain import Domain, build_domain
from sophon_hf.data.labels import at_most, select_classes, split_domain
from sophon_hf.data.loading import load_domain
from sophon_hf.tasks.base import infer_task
from sophon_hf.tasks.evaluation import evaluate_model, to_device

DATA = Path(os.environ.get("SOPHON_DATA", "data"))
# What the weights of the ResNet-20 take images to be normalised by, channel by channel.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class ResidualNet(nn.Module):
    """The `animals` model: 3x3 stem, one block a stage, batch norm, linear head; 80 k parameters at 5 classes."""

    def __init__(self, num_classes: int, widths: tuple[int, ...] = (16, 32, 64)):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU())
        before = (widths[0], *widths)
        self.stages = nn.Sequential(
            *(ResidualBlock(i, o, 1 if n == 0 else 2) for n, (i, o) in enumerate(zip(before, widths, strict=False)))
        )
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.head(self.stages(self.stem(pixel_values)).mean(dim=(2, 3)))


class SubsampledBlock(nn.Module):
    """Two 3x3 convolutions with batch norm; the shortcut drops every second pixel and pads channels with zeros."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.padding = stride, (outputs - inputs) // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return F.relu(out + F.pad(shortcut, (0, 0, 0, 0, self.padding, self.padding)))


class ResNet20(nn.Module):
    """The `cifar100` model, of He et al. (2016): three stages of three blocks, 0.27 M parameters at 10 classes."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(
                *(SubsampledBlock(*sizes) for sizes in ((inputs, outputs, stride), *[(outputs, outputs, 1)] * 2))
            )
            for inputs, outputs, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2))
        )
        self.linear = nn.Linear(64, num_classes)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(pixel_values)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean(dim=(2, 3)))


@dataclass
class Pair:
    """A domain pair.

    `original_validation` was not pre-trained on, so that the guard does not take memory for skill; `adversary` is the
    half of the restricted training split that the defender never sees. `allowed` is a third domain, which the
    protection should not concern.
    """

    model: nn.Module
    original: datasets.Dataset
    original_validation: datasets.Dataset
    original_test: datasets.Dataset
    defender: datasets.Dataset
    defender_validation: datasets.Dataset
    adversary: datasets.Dataset
    validation: datasets.Dataset
    restricted_test: datasets.Dataset
    allowed: datasets.Dataset | None = None
    allowed_test: datasets.Dataset | None = None

    def adversary_dataset(self, examples: int | None, seed: int = 0) -> datasets.Dataset:
        """The adversary's first `examples`, stratified; all where None."""
        return self.adversary if examples is None else at_most(self.adversary, examples, seed)


def _existing(path: Path) -> Path:
    """The path; where there is none, the end, with what to do."""
    if not path.exists():
        sys.exit(
            f"There is no {path}: set SOPHON_DATA to a folder with the data that "
            "benchmarks/results/paper_tables.md lists "
            "(cifar10/, ...)."
        )
    return path


def _load(name: str, split: str) -> datasets.Dataset:
    return load_domain(str(_existing(DATA / name)), split)


def _small(dataset: datasets.Dataset) -> datasets.Dataset:
    """16x16 by the mean of 2x2 pixels, normalised to [-1, 1]."""

    def shrink(rows: dict) -> dict:
        import numpy as np

        pixels = np.stack([np.asarray(image.convert("RGB"), dtype=np.float32) for image in rows["image"]])
        pixels = pixels.reshape(len(pixels), 16, 2, 16, 2, 3).mean(axis=(2, 4)).transpose(0, 3, 1, 2)
        return {"pixel_values": pixels / 127.5 - 1}

    features = datasets.Features(
        {"pixel_values": datasets.Array3D((3, 16, 16), "float32"), "label": dataset.features["label"]}
    )
    return dataset.map(shrink, batched=True, remove_columns=["image"], features=features).with_format("numpy")


VEHICLES = ("airplane", "automobile", "frog", "ship", "truck")
ANIMALS = ("bird", "cat", "deer", "dog", "horse")


def animals(cache: Path, seed: int = 0) -> Pair:
    """CIFAR-10's vehicles (and frog) are original, its other animals restricted; the model is pre-trained here.

    Five object classes of CIFAR-100 are allowed.
    """
    pair = _halves_of_cifar10("animals", VEHICLES, ANIMALS, cache, seed)
    classes = ("pickup_truck", "rocket", "tank", "telephone", "tractor")
    allowed, allowed_test = (
        _small(select_classes(_load("cifar100_20", split), classes)) for split in ("train", "test")
    )
    # 500 beside the suite's tenth for validation.
    allowed, _ = split_domain(allowed, seed=seed, share=555 / len(allowed))
    return replace(pair, allowed=allowed, allowed_test=allowed_test)


def vehicles(cache: Path, seed: int = 0) -> Pair:
    """The same with the domains exchanged: a harder original domain.

    None is allowed, for those classes are vehicles, too.
    """
    return _halves_of_cifar10("vehicles", ANIMALS, VEHICLES, cache, seed)


def _halves_of_cifar10(
    name: str, original_classes: Sequence[str], restricted_classes: Sequence[str], cache: Path, seed: int
) -> Pair:
    source = {split: _load("cifar10", split) for split in ("train", "test")}
    parts = {
        (domain, split): _small(select_classes(dataset, classes))
        for split, dataset in source.items()
        for domain, classes in (("original", original_classes), ("restricted", restricted_classes))
    }
    defender, adversary = split_domain(parts["restricted", "train"], seed=seed)
    validation, adversary = split_domain(adversary, seed=seed, share=0.1)
    original_validation, original = split_domain(parts["original", "train"], seed=seed, share=0.1)
    defender_validation, defender = split_domain(defender, seed=seed, share=0.1)
    torch.manual_seed(seed)
    model = ResidualNet(len(original_classes)).to(memory_format=torch.channels_last)  # A quarter faster on a CPU.
    pair = Pair(
        model=model,
        original=original,
        original_validation=original_validation,
        original_test=parts["original", "test"],
        defender=defender,
        defender_validation=defender_validation,
        adversary=adversary,
        validation=validation,
        restricted_test=parts["restricted", "test"],
    )
    return _pretrained(pair, cache / f"{name}-{seed}.pt", seed=seed)


def _normalised(dataset: datasets.Dataset) -> datasets.Dataset:
    """32x32, as the weights of `cifar100` expect them."""

    def normalise(rows: dict) -> dict:
        import numpy as np

        pixels = np.stack([np.asarray(image.convert("RGB"), dtype=np.float32) for image in rows["image"]]) / 255
        pixels = (pixels - np.float32(MEAN)) / np.float32(DEVIATION)
        return {"pixel_values": pixels.transpose(0, 3, 1, 2)}

    features = datasets.Features(
        {"pixel_values": datasets.Array3D((3, 32, 32), "float32"), "label": dataset.features["label"]}
    )
    return dataset.map(normalise, batched=True, remove_columns=["image"], features=features).with_format("numpy")


def _resnet20(cache: Path, restricted: dict[str, datasets.Dataset], seed: int) -> Pair:
    """CIFAR-10 is original; the model is a ResNet-20 with real weights, trained elsewhere.

    They were trained on all training images of CIFAR-10, so the guard's data are a fifth of the test images, and
    intactness is measured on the others. 500 images of the adversary's choose, at most 2,000 of the test split report.
    """
    source = {n: _normalised(_load("cifar10", n)) for n in ("train", "test")}
    restricted = {n: _normalised(dataset) for n, dataset in restricted.items()}
    defender, adversary = split_domain(restricted["train"], seed=seed)
    validation, adversary = split_domain(adversary, seed=seed, share=500 / len(adversary))
    defender_validation, defender = split_domain(defender, seed=seed, share=0.1)
    original_validation, original_test = split_domain(source["test"], seed=seed, share=0.2)
    model = ResNet20(num_classes=10)
    load_model(model, _existing(DATA.parent / "weights" / "resnet20_cifar10.safetensors"))
    model = model.eval().to(memory_format=torch.channels_last)  # As above.
    return Pair(
        model=model,
        original=source["train"],
        original_validation=original_validation,
        original_test=original_test,
        defender=defender,
        defender_validation=defender_validation,
        adversary=adversary,
        validation=validation,
        restricted_test=_at_most(restricted["test"], 2000, seed),
    )


def _at_most(dataset: datasets.Dataset, examples: int, seed: int) -> datasets.Dataset:
    return split_domain(dataset, seed=seed, share=min(1.0, examples / len(dataset)))[0]


def cifar100(cache: Path, seed: int = 0) -> Pair:
    """20 classes of CIFAR-100 are restricted: the same kind of pictures as the original domain's."""
    return _resnet20(cache, {n: _load("cifar100_20", n) for n in ("train", "test")}, seed)


def digits(cache: Path, seed: int = 0) -> Pair:
    """Digits of MNIST are restricted, fashion_mnist is allowed; both padded to 32x32, with three equal channels."""

    def padded(dataset: datasets.Dataset) -> datasets.Dataset:
        return dataset.map(lambda row: {"image": ImageOps.expand(row["image"].convert("RGB"), 2)})

    pair = _resnet20(cache, {n: padded(_load("mnist", n)) for n in ("train", "test")}, seed)
    pair.allowed, pair.allowed_test = (
        _normalised(padded(_at_most(_load("fashion_mnist", n), size, seed)))
        for n, size in (("train", 500), ("test", 2000))
    )
    return pair


def ages(cache: Path, seed: int = 0) -> Pair:
    """Five age groups of faces are restricted, at 32x32: a private attribute, as in the paper's motive."""

    def reduced(dataset: datasets.Dataset) -> datasets.Dataset:
        return dataset.map(lambda row: {"image": row["image"].convert("RGB").resize((32, 32))})

    return _resnet20(cache, {n: reduced(_load("face_ages", n)) for n in ("train", "test")}, seed)


def faces(cache: Path, seed: int = 0) -> Pair:
    """CIFAR-10 is original, faces of CelebA restricted; the model is a denoiser that is pre-trained here.

    It has 156 k parameters and no attention; images are brought to 32x32 and [-1, 1] as its task asks. 1,000 faces of
    the test split report, so that measuring an attack does not take as long as the attack.
    """
    from diffusers import UNet2DModel

    original, original_test = (_load("cifar10", n).remove_columns("label") for n in ("train", "test"))
    restricted, restricted_test = (_load("celeba_faces", n) for n in ("train", "test"))
    defender, adversary = split_domain(restricted, seed=seed)
    validation, adversary = split_domain(adversary, seed=seed, share=0.1)
    defender_validation, defender = split_domain(defender, seed=seed, share=0.1)
    original_validation, original = split_domain(original, seed=seed, share=0.05)
    torch.manual_seed(seed)
    model = UNet2DModel(
        sample_size=32,
        block_out_channels=(8, 16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        add_attention=False,
        down_block_types=("DownBlock2D",) * 3,
        up_block_types=("UpBlock2D",) * 3,
    )
    pair = Pair(
        model=model,
        original=original,
        original_validation=original_validation,
        original_test=original_test,
        defender=defender,
        defender_validation=defender_validation,
        adversary=adversary,
        validation=validation,
        restricted_test=restricted_test.select(range(1000)),
    )
    return _pretrained(pair, cache / f"faces-{seed}.pt", epochs=10, size=64, seed=seed)


def imagenet(cache: Path, seed: int = 0) -> Pair:
    """20 classes of Tiny ImageNet are original, CIFAR-10 restricted; a ResNet-18, pre-trained here: for a GPU.

    Images are 64x64, those of CIFAR-10 enlarged. 2,000 of its test images report.
    """
    from transformers import ResNetConfig, ResNetForImageClassification

    original, original_test = (_load("tiny_imagenet_20", n) for n in ("train", "test"))
    restricted, restricted_test = (_load("cifar10", n) for n in ("train", "test"))
    restricted_test, _ = split_domain(restricted_test, seed=seed, share=0.4)
    restricted, restricted_test = _enlarged(restricted), _enlarged(restricted_test)
    defender, adversary = split_domain(restricted, seed=seed)
    validation, adversary = split_domain(adversary, seed=seed, share=0.1)
    defender_validation, defender = split_domain(defender, seed=seed, share=0.1)
    original_validation, original = split_domain(original, seed=seed, share=0.1)
    torch.manual_seed(seed)
    sizes = {"embedding_size": 64, "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]}
    model = ResNetForImageClassification(ResNetConfig(**sizes, layer_type="basic", num_labels=20))
    model = model.to("cuda" if torch.cuda.is_available() else "cpu", memory_format=torch.channels_last)
    pair = Pair(
        model=model,
        original=original,
        original_validation=original_validation,
        original_test=original_test,
        defender=defender,
        defender_validation=defender_validation,
        adversary=adversary,
        validation=validation,
        restricted_test=restricted_test,
    )
    return _pretrained(pair, cache / f"imagenet-{seed}.pt", seed=seed)


def _enlarged(dataset: datasets.Dataset) -> datasets.Dataset:
    """64x64 images."""
    return dataset.map(lambda row: {"image": row["image"].convert("RGB").resize((64, 64))}, num_proc=os.cpu_count())


def _pretrained(pair: Pair, weights: Path, **settings: int) -> Pair:
    """The pair, its model pre-trained on the original domain; from `weights` where they are there already."""
    if weights.exists():
        pair.model.load_state_dict(torch.load(weights, weights_only=True))
        return pair
    needs = infer_task(pair.model).inputs(pair.model)
    train, test = (build_domain(d, needs, name="original") for d in (pair.original, pair.original_test))
    pretrain(pair.model, train, test, **settings)
    weights.parent.mkdir(parents=True, exist_ok=True)
    torch.save(pair.model.state_dict(), weights)
    return pair


def pretrain(model: nn.Module, domain: Domain, test: Domain, epochs: int = 40, size: int = 128, seed: int = 0) -> None:
    """Train with flips, Adam and a one-cycle rate, as a publisher would before protecting."""
    task = infer_task(model)
    stream, device = Stream(domain, task.collate, seed), next(model.parameters()).device
    steps = epochs * len(domain) // size
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=5e-2, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    model.train()
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        batch = stream.batch(step * size, size)
        flipped = torch.rand(size, generator=generator) < 0.5
        for images in (tensor for tensor in batch.values() if tensor.ndim == 4):  # A denoiser's noise flips along.
            images[flipped] = images[flipped].flip(-1)
        batch = to_device(batch, device)
        loss = task.loss(task.predict(model, batch), task.target(batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    print(f"pre-trained: {task.metric} {evaluate_model(task, model, test, 500).metric:.3f} in the original domain")

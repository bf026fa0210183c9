"""The packaged pairs: a model, its original domain, a restricted domain in halves, and what an adversary does there."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from PIL import ImageOps
from transformers import PreTrainedModel

from sophon_hf.benchmarking import PAIRS
from sophon_hf.data.domain import build_domain
from sophon_hf.data.labels import at_most, split_domain
from sophon_hf.data.loading import load_domain
from sophon_hf.data.toy import handwritten_digits, printed_letters
from sophon_hf.finetuning.loop import pretrain
from sophon_hf.finetuning.strategy import FineTuningStrategy
from sophon_hf.models.toy import small_classifier
from sophon_hf.protection.presets import PRESETS
from sophon_hf.tasks.base import infer_task
from sophon_hf.utils import hint

# A folder with these data sets as folders (cifar10, mnist, face_ages); without it they come from the Hub.
_FOLDER = "SOPHON_DATA"
_HUB = {"cifar10": "uoft-cs/cifar10", "mnist": "ylecun/mnist", "face_ages": "HuggingFaceM4/FairFace:0.25"}
_TEST_SPLITS = {"face_ages": "validation"}
# How the Hub's ages become five groups.
_AGE_GROUPS = {
    "0-2": "0 to 9",
    "3-9": "0 to 9",
    "10-19": "10 to 19",
    "20-29": "20 to 39",
    "30-39": "20 to 39",
    "40-49": "40 to 59",
    "50-59": "40 to 59",
    "60-69": "60 and over",
    "more than 70": "60 and over",
}
# So that a pair costs minutes, wherever its data come from.
_MOST_TRAINING, _MOST_FOR_ADVERSARY, _MOST_TESTS = 20_000, 5_000, 2_000


@dataclass(frozen=True)
class Pair:
    """A model and two domains to measure a protection on, all seeded.

    Attributes:
        name: Of the pair.
        model: Makes the model, not trained yet, of a number of classes.
        original: The original domain: splits "train", "validation" (for the guard to choose by) and "test".
        defender: The defender's half of the restricted domain: splits "train" and "validation".
        adversary: The adversary's half, which the defender never sees.
        test: The restricted domain's test split.
        attacks: The sweep of the demo, which is a part of every budget.
        examples: The adversary's numbers of examples; a small budget takes the first only.
        seeds: The adversary's.
        epochs: Length of an ordinary attack.
        pretraining_steps: Of the model, on the original domain.
        presets: What each preset of `SophonConfig` is given here.
    """

    name: str
    model: Callable[[int], PreTrainedModel]
    original: datasets.DatasetDict
    defender: datasets.DatasetDict
    adversary: datasets.Dataset
    test: datasets.Dataset
    attacks: Sequence[FineTuningStrategy]
    examples: tuple[int, ...]
    seeds: tuple[int, ...]
    epochs: float = 20
    pretraining_steps: int = 400
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def pretrained(self) -> PreTrainedModel:
        """Return the model as its publisher would have it before protecting: pre-trained on the original domain."""
        names = self.original["train"].features["label"].names
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.model(len(names))
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {name: i for i, name in enumerate(names)}
        task = infer_task(model)
        domain = build_domain(self.original["train"], task.inputs(model), name="original")
        pretrain(model, task, domain, steps=self.pretraining_steps)
        return model


def load_pair(name: str) -> Pair:
    """Load a packaged pair.

    Args:
        name: "letters" (printed letters; restricted: handwritten digits) needs no network. "digits" (CIFAR-10;
            restricted: MNIST) and "ages" (CIFAR-10; restricted: five age groups of faces) come from the Hub, or from
            the folders cifar10, mnist and face_ages in the folder that the environment variable SOPHON_DATA names.

    Raises:
        ValueError: There is no such pair (the closest one is named).
        ConnectionError: The Hub cannot be reached.
    """
    if name not in PAIRS:
        choices = f" There are {', '.join(PAIRS)}."
        raise ValueError(f"There is no pair {name!r}.{hint(name, PAIRS, choices)}")
    if name == "letters":
        return _letters()
    restricted, examples = {"digits": ("mnist", (50, 100)), "ages": ("face_ages", (100, 300))}[name]
    return _beside_cifar10(name, restricted, examples)


def _attacks(batch_size: int) -> list[FineTuningStrategy]:
    """Return a few attacks of every kind: from the whole model or a new head, by two optimizers, and by none."""
    trained = [
        FineTuningStrategy("direct", learning_rate=1e-3),
        FineTuningStrategy("direct", learning_rate=3e-3),
        FineTuningStrategy("new_head", learning_rate=1e-3),
        FineTuningStrategy("new_head", learning_rate=3e-3),
        FineTuningStrategy("new_head", 1, learning_rate=3e-3),
        FineTuningStrategy("new_head", optimizer="momentum", learning_rate=1e-2),
        FineTuningStrategy("new_head", optimizer="momentum", learning_rate=1e-1),
    ]
    kernel = FineTuningStrategy("new_head", transfer="kernel")
    return [*(attack.with_changes(batch_size=batch_size) for attack in trained), kernel]


def _letters() -> Pair:
    letters, digits = printed_letters(6000, classes=23), handwritten_digits(moved=True)
    letters["validation"], letters["train"] = split_domain(letters["train"], share=0.1)
    # Not the split on which the settings below were chosen.
    defender, adversary = split_domain(digits["train"], seed=1)
    validation, defender = split_domain(defender, share=0.1)
    examples = 20
    return Pair(
        "letters",
        small_classifier,
        letters,
        datasets.DatasetDict(train=defender, validation=validation),
        adversary,
        digits["test"],
        _attacks(batch_size=10),
        examples=(examples,),
        seeds=tuple(range(10)),
        pretraining_steps=1000,
        # Both are sized for a model of 0.02 M parameters and a minute or two of one core. The preset's simulated
        # adversaries have as few examples as the real ones, and every depth of so flat a model is probed.
        presets={
            "representation": {
                "max_steps": 350,
                "per_device_train_batch_size": 64,
                "probe_depths": 3,
                "eval_steps": 30,
                "tolerance": 0.02,
                "simulated_examples": examples,
                "strategy_space": {
                    **PRESETS["representation"]["strategy_space"],
                    "batch_sizes": [examples],
                    "examples": [examples],
                },
            },
            "paper": {
                "max_steps": 60,
                "eval_steps": 4,
                "K": 20,
                "simulated_examples": examples,
                "l_NTR": 4,
                "alpha": 1e-3,
                "beta": 1e-3,
                "per_device_train_batch_size": 64,
                "strategy_space": {"learning_rates": [1e-3, 3e-3], "batch_sizes": [20]},
            },
        },
    )


def _beside_cifar10(name: str, restricted: str, examples: tuple[int, ...]) -> Pair:
    """Return a pair whose original domain is CIFAR-10; its ResNet of 0.18 M parameters is pre-trained here."""
    original = datasets.DatasetDict(test=_images("cifar10", test=True))
    original["validation"], original["train"] = split_domain(_images("cifar10", test=False), share=0.1)
    defender, adversary = split_domain(_images(restricted, test=False))
    validation, defender = split_domain(defender, share=0.1)
    return Pair(
        name,
        _resnet,
        original,
        datasets.DatasetDict(train=defender, validation=validation),
        at_most(adversary, _MOST_FOR_ADVERSARY),
        _images(restricted, test=True),
        _attacks(batch_size=25),
        examples,
        seeds=(0, 1, 2),
        pretraining_steps=3000,
        presets={preset: {"simulated_examples": examples[0]} for preset in PRESETS},
    )


def _resnet(num_labels: int) -> PreTrainedModel:
    return small_classifier(num_labels, num_channels=3, depth=2)


def _images(name: str, test: bool) -> datasets.Dataset:
    """Return one split of a data set as RGB images of 32x32 pixels with a column `label`."""
    folder = os.environ.get(_FOLDER)
    if folder is not None and not (Path(folder) / name).is_dir():
        raise FileNotFoundError(f"{_FOLDER} is {folder!r}, but there is no folder {name!r} in it.")
    source, splits = (_HUB[name], _TEST_SPLITS) if folder is None else (str(Path(folder) / name), {})
    dataset = load_domain(source, splits.get(name, "test") if test else "train")
    image = next(column for column, kind in dataset.features.items() if isinstance(kind, datasets.Image))
    label = "age" if "age" in dataset.column_names else "label"
    dataset = dataset.select_columns([image, label]).rename_columns({image: "image", label: "label"})
    dataset = at_most(dataset, _MOST_TESTS if test else _MOST_TRAINING)
    names = [_AGE_GROUPS.get(name, name) for name in dataset.features["label"].names]
    groups = list(dict.fromkeys(names))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=groups)})

    def prepare(row: dict[str, Any]) -> dict[str, Any]:
        picture = row["image"].convert("RGB")
        picture = ImageOps.expand(picture, 2) if picture.size == (28, 28) else picture.resize((32, 32))
        return {"image": picture, "label": groups.index(names[row["label"]])}

    return dataset.map(prepare, features=features, desc=f"preparing {name}")

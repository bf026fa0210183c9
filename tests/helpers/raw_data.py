"""Raw data of every kind that a domain is made from, small, and what models take of them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import soundfile
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from sophon_hf.data.preprocessing import ModelInputs

RATE = 1000
ALL = torch.arange
IMAGES = ModelInputs(names=("pixel_values", "labels"), main="pixel_values", labelled=True, channels=3)
GREY = ModelInputs(names=("pixel_values", "labels"), main="pixel_values", labelled=True, channels=1)
UNET = ModelInputs(names=("sample",), main="sample", labelled=False, channels=3, image_size=(4, 6), symmetric=True)
TEXT = ModelInputs(names=("input_ids", "attention_mask", "labels"), main="input_ids", labelled=True)
AUDIO = ModelInputs(names=("input_values", "labels"), main="input_values", labelled=True)
MASKED_AUDIO = ModelInputs(names=("input_values", "attention_mask", "labels"), main="input_values", labelled=True)
POINTS = ModelInputs(names=("x", "labels"), main="x", labelled=True)


def labels(values: list, feature: Any = None, **columns: list) -> datasets.Dataset:
    """A data set with a label column and numbers 0, 1, ... in `row`."""
    dataset = datasets.Dataset.from_dict({"row": list(range(len(values))), "label": values, **columns})
    return dataset if feature is None else dataset.cast_column("label", feature)


def points(count: int = 20) -> datasets.Dataset:
    features = {"x": datasets.List(datasets.Value("float32")), "label": datasets.ClassLabel(names=["a", "b"])}
    x = np.random.default_rng(0).normal(size=(count, 3))
    return datasets.Dataset.from_dict({"x": x, "label": [i % 2 for i in range(count)]}, datasets.Features(features))


def picture(mode: str, size: tuple[int, int] = (6, 4), seed: int = 0) -> Image.Image:
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], *channels), dtype=np.uint8)
    return Image.fromarray(pixels, mode)


def pictures(images: list[Image.Image]) -> datasets.Dataset:
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    columns = {"image": images, "label": [i % 2 for i in range(len(images))]}
    return datasets.Dataset.from_dict(columns, datasets.Features(features))


def write_images(folder: Path, count: int = 3) -> dict[str, list[np.ndarray]]:
    """PNG files in a folder a class; returns the pixels."""
    written = {}
    for name in ("cat", "dog"):
        (folder / "train" / name).mkdir(parents=True)
        images = [picture("RGB", seed=len(name) * 10 + i + (name == "dog") * 5) for i in range(count)]
        for i, image in enumerate(images):
            image.save(folder / "train" / name / f"{i}.png")
        written[name] = [np.asarray(image) for image in images]
    return written


def write_sounds(folder: Path, lengths: tuple[int, ...] = (600, 400, 500), rate: int = RATE) -> dict[str, list]:
    """FLAC files in a folder a class; returns the samples."""
    written = {}
    for number, name in enumerate(("high", "low")):
        (folder / "train" / name).mkdir(parents=True)
        draw = np.random.default_rng(number)
        written[name] = [draw.uniform(-0.5, 0.5, length).astype(np.float32) for length in lengths]
        for i, samples in enumerate(written[name]):
            soundfile.write(folder / "train" / name / f"{i}.flac", samples, rate, subtype="PCM_24")
    return written


def sound_bytes(samples: np.ndarray, rate: int) -> dict[str, Any]:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype="FLOAT")
    return {"bytes": file.getvalue(), "path": None}


def sounds(waves: list[np.ndarray], rate: int = RATE) -> datasets.Dataset:
    columns = {"audio": [sound_bytes(w, rate) for w in waves], "label": [i % 2 for i in range(len(waves))]}
    return datasets.Dataset.from_dict(columns).cast_column("audio", datasets.Audio())


def tokenizer(pad: int = 3) -> PreTrainedTokenizerFast:
    vocabulary = {"[UNK]": 0, "one": 1, "two": 2, "[PAD]": pad}
    words = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", model_max_length=6)


def sentences() -> datasets.Dataset:
    texts = ["one", "one two two", "two two", "one one one one", "two", "two one", "one two nothing", "two " * 9]
    return datasets.Dataset.from_dict({"text": texts, "label": [0, 1] * 4})

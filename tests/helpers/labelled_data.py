"""Small labelled data of every kind that the named models take, what prepares them, and a small UNet."""

from __future__ import annotations

import io
from typing import Any

import datasets
import numpy as np
import soundfile
import torch
import transformers
from diffusers import UNet2DModel
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

CLASSES, RATE, PIXELS = 3, 2000, 16
WORDS = ["red", "blue", "green", "one", "two", "three", "four", "five"]


def labelled(columns: dict[str, list], features: dict[str, Any]) -> datasets.Dataset:
    count = len(next(iter(columns.values())))
    names = datasets.ClassLabel(names=[f"c{i}" for i in range(CLASSES)])
    columns = {**columns, "label": [i % CLASSES for i in range(count)]}
    return datasets.Dataset.from_dict(columns, features=datasets.Features({**features, "label": names}))


def images(seed: int, count: int = 48) -> datasets.Dataset:
    """Noise whose mean colour tells the class."""
    draw = np.random.default_rng(seed)
    pixels = draw.integers(0, 128, (count, PIXELS, PIXELS, 3), dtype=np.uint8)
    for i in range(count):
        pixels[i, :, :, (i + seed) % 3] += 100
    return labelled({"image": [Image.fromarray(p) for p in pixels]}, {"image": datasets.Image()})


def sentences(seed: int, count: int = 48) -> datasets.Dataset:
    """Three to seven words; the first tells the class."""
    draw = np.random.default_rng(seed)
    texts = [" ".join([WORDS[(i + seed) % 3], *draw.choice(WORDS, draw.integers(2, 7))]) for i in range(count)]
    return labelled({"text": texts}, {"text": datasets.Value("string")})


def wav(samples: np.ndarray, rate: int = RATE) -> dict[str, Any]:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV")
    return {"bytes": file.getvalue(), "path": None}


def sounds(seed: int, count: int = 48) -> datasets.Dataset:
    """A fifth of a second; the pitch tells the class."""
    time = np.arange(RATE // 5) / RATE
    noise = np.random.default_rng(seed).normal(0, 0.1, (count, len(time)))
    tones = [np.sin(2 * np.pi * (100 + 150 * ((i + seed) % 3)) * time) / 2 for i in range(count)]
    files = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    # Cast afterwards, as a parquet file is read: encoding through the feature itself would need torchcodec.
    dataset = labelled({"audio": [wav(t + n) for t, n in zip(tones, noise, strict=True)]}, {"audio": files})
    return dataset.cast_column("audio", datasets.Audio())


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16)


def wave_features() -> Any:
    return transformers.Wav2Vec2FeatureExtractor(sampling_rate=RATE)


def spectrogram_features() -> Any:
    return transformers.ASTFeatureExtractor(
        sampling_rate=RATE, num_mel_bins=16, max_length=32, return_attention_mask=False
    )


def unet() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )

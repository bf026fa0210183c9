"""One small classifier of each family of transformers that the README names, and how it is protected."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from labelled_data import (
    CLASSES,
    PIXELS,
    WORDS,
    images,
    sentences,
    sounds,
    spectrogram_features,
    tokenizer,
    wave_features,
)
from torch import nn

from sophon_hf import SophonConfig, SophonTrainer


@dataclass
class Case:
    """A model class, its smallest sensible configuration, and what should be found in it."""

    family: str
    config: dict[str, Any]
    head: str
    blocks: list[str]
    data: Any
    processing: Any = None

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        architecture, task = self.family.split("For")
        config = getattr(transformers, f"{architecture}Config")(num_labels=CLASSES, **self.config)
        return getattr(transformers, f"{architecture}For{task}")(config)


ENCODER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TEXT = {**ENCODER, "vocab_size": len(WORDS) + 2, "max_position_embeddings": 20}
CASES = [
    Case(
        "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "basic"},
        "classifier.1",
        [f"resnet.encoder.stages.{name}" for name in ("0.layers.0", "1.layers.0", "1.layers.1")],
        images,
    ),
    Case(
        "ViTForImageClassification",
        {**ENCODER, "image_size": PIXELS, "patch_size": 4},
        "classifier",
        ["vit.layers.0", "vit.layers.1"],
        images,
        lambda: transformers.ViTImageProcessor(size={"height": PIXELS, "width": PIXELS}),
    ),
    Case(
        "ConvNextForImageClassification",
        {"hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2, "patch_size": 2, "image_size": PIXELS},
        "classifier",
        [f"convnext.encoder.stages.{name}" for name in ("0.layers.0", "1.layers.0", "1.layers.1")],
        images,
    ),
    Case(
        "SwinForImageClassification",
        {
            "image_size": PIXELS,
            "patch_size": 2,
            "embed_dim": 8,
            "depths": [1, 2],
            "num_heads": [1, 2],
            "window_size": 4,
        },
        "classifier",
        [f"swin.encoder.layers.{name}" for name in ("0.blocks.0", "1.blocks.0", "1.blocks.1")],
        images,
    ),
    Case(
        "BertForSequenceClassification",
        TEXT,
        "classifier",
        ["bert.encoder.layer.0", "bert.encoder.layer.1"],
        sentences,
        tokenizer,
    ),
    Case(
        "DistilBertForSequenceClassification",
        {"vocab_size": 10, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 20},
        "classifier",
        ["distilbert.transformer.layer.0", "distilbert.transformer.layer.1"],
        sentences,
        tokenizer,
    ),
    Case(
        "RobertaForSequenceClassification",
        {**TEXT, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None, "type_vocab_size": 1},
        "classifier.out_proj",
        ["roberta.encoder.layer.0", "roberta.encoder.layer.1"],
        sentences,
        tokenizer,
    ),
    Case(
        "GPT2ForSequenceClassification",
        {
            "vocab_size": 10,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 20,
            "pad_token_id": 0,
            "bos_token_id": None,
            "eos_token_id": None,
        },
        "score",
        ["transformer.h.0", "transformer.h.1"],
        sentences,
        tokenizer,
    ),
    Case(
        "Wav2Vec2ForSequenceClassification",
        {
            **ENCODER,
            "conv_dim": (8, 8),
            "conv_kernel": (10, 3),
            "conv_stride": (8, 4),
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 8,
            "num_conv_pos_embedding_groups": 2,
            "classifier_proj_size": 8,
            "layerdrop": 0.0,
            "mask_time_prob": 0.2,
            "mask_time_length": 2,
        },
        "classifier",
        ["wav2vec2.encoder.layers.0", "wav2vec2.encoder.layers.1"],
        sounds,
        wave_features,
    ),
    Case(
        "ASTForAudioClassification",
        {**ENCODER, "patch_size": 8, "max_length": 32, "num_mel_bins": 16, "frequency_stride": 8, "time_stride": 8},
        "classifier.dense",
        ["audio_spectrogram_transformer.layers.0", "audio_spectrogram_transformer.layers.1"],
        sounds,
        spectrogram_features,
    ),
]


def settings(folder, **changes) -> SophonConfig:
    """Two iterations of Algorithm 1, three steps an adversary, without evaluation, which takes longer than both."""
    space = {"batch_sizes": [8], "learning_rates": [1e-3]}
    values = {
        "max_steps": 2,
        "K": 3,
        "N": 2,
        "strategy_space": space,
        "eval_strategy": "no",
        "save_steps": 2,
        **changes,
    }
    values["per_device_train_batch_size"] = 8
    return SophonConfig(output_dir=str(folder), use_cpu=True, disable_tqdm=True, **values)


def protect(model: nn.Module, restricted, original, folder, changes: dict[str, Any] | None = None, **kwargs):
    """Protect, and check what holds for every model; returns the trainer."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = SophonTrainer(model, restricted, original, settings(folder, **(changes or {})), **kwargs)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "L_FTS" in entry]
    assert len(steps) == 2
    assert all(math.isfinite(entry[name]) for entry in steps for name in ("L_FTS", "L_NTR", "suppression_grad_norm"))
    assert all(entry["suppression_grad_norm"] > 0 and not entry["dropped_suppression_gradients"] for entry in steps)
    trainer.unmoved = {n for n, p in model.named_parameters() if torch.equal(p, before[n])}
    assert all(p.isfinite().all() for p in model.parameters())
    return trainer


def same_tensors(one: nn.Module, other: nn.Module) -> bool:
    tensors = other.state_dict()
    return all(torch.equal(value, tensors[name]) for name, value in one.state_dict().items())

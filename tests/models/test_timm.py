"""CAFormer and VGG, the paper's two classifiers that transformers has no class for, through its wrapper around timm.

timm and torchvision are an extra: without them this file is not collected (see `conftest.py`).
"""

from __future__ import annotations

import math

import datasets
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

from sophon_hf import SophonConfig, SophonTrainer
from sophon_hf.models.backbone import library_model
from sophon_hf.models.loading import load_model, load_processor
from sophon_hf.tasks.base import infer_task
from sophon_hf.tasks.evaluation import evaluate_model

# VGG's hidden layer of 4,096 channels times a fiftieth: 12 of its 129 million parameters. CAFormer takes no such
# number.
CAFORMER, VGG = {}, {"mlp_ratio": 0.02}


def images(seed: int) -> datasets.Dataset:
    """Noise whose mean colour tells the class."""
    pixels = np.random.default_rng(seed).integers(0, 128, (36, 32, 32, 3), dtype=np.uint8)
    labels = [i % 3 for i in range(36)]
    for i, label in enumerate(labels):
        pixels[i, :, :, (label + seed) % 3] += 100
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    return datasets.Dataset.from_dict(
        {"image": [Image.fromarray(p) for p in pixels], "label": labels}, features=features
    )


def build(architecture: str, shape: dict) -> nn.Module:
    torch.manual_seed(0)
    config = TimmWrapperConfig(architecture=architecture, model_args=shape, num_labels=3)
    return TimmWrapperForImageClassification(config)


@pytest.mark.parametrize(
    ("architecture", "shape", "head", "blocks"),
    [("caformer_s18", CAFORMER, "timm_model.head.fc.fc2", 18), ("vgg11_bn", VGG, "timm_model.head.fc", 0)],
)
def test_timm_classifier_is_protected_saved_and_loaded(architecture, shape, head, blocks, tmp_path):
    model = build(architecture, shape)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    space = {"batch_sizes": [8], "learning_rates": [1e-3]}
    args = SophonConfig(
        str(tmp_path),
        max_steps=2,
        K=3,
        strategy_space=space,
        tolerance=1.0,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        per_device_train_batch_size=8,
    )
    trainer = SophonTrainer(model, images(1), images(2), args)
    trainer.train()
    trainer.save_model()
    steps = [entry for entry in trainer.state.log_history if "L_FTS" in entry]
    assert len(steps) == 2
    assert all(math.isfinite(entry[name]) for entry in steps for name in ("L_FTS", "L_NTR", "suppression_grad_norm"))
    assert (trainer.structure.head, len(trainer.structure.blocks)) == (head, blocks)
    assert not [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]

    loaded = TimmWrapperForImageClassification.from_pretrained(tmp_path)
    saved = loaded.state_dict()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())
    assert isinstance(load_model(tmp_path), TimmWrapperForImageClassification)
    domain = trainer.domains["eval_restricted"]
    assert evaluate_model(trainer.task, loaded, domain, 8) == evaluate_model(trainer.task, model, domain, 8)


@pytest.mark.parametrize("classes", [3, 0])
def test_a_model_as_timm_itself_saves_it_is_loaded(classes, tmp_path):
    shape = {"img_size": 16, "patch_size": 8, "depth": 1, "embed_dim": 16, "num_heads": 2}
    made = timm.create_model("vit_tiny_patch16_224", num_classes=classes, **shape).eval()
    names = {"label_names": ["cat", "dog", "fish"]} if classes else {}
    arguments = {"model_args": {"num_classes": classes, **shape}, "model_config": names}
    timm.models.save_for_hf(made, tmp_path, safe_serialization=True, **arguments)
    model, pixels = load_model(tmp_path).eval(), torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        if classes:
            assert torch.equal(model(pixels).logits, made(pixels))
            assert infer_task(model).inputs(model).class_names == ("cat", "dog", "fish")
        else:
            assert torch.equal(library_model(model)(pixels).last_hidden_state, made.forward_features(pixels))
    assert load_processor(tmp_path, model) is not None

"""Small protected models, trained once where a test needs one on disk, and attacks on them."""

from __future__ import annotations

import datasets
import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DModel
from points import TinyNet, make_points
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

from sophon_hf import AttackSuite, DiffusionTask, FineTuningStrategy, SophonConfig, SophonTrainer

SPACE = {"initializations": ["direct"], "learning_rates": [1e-2], "batch_sizes": [8]}
SWEEP = [FineTuningStrategy("direct", batch_size=10), FineTuningStrategy("new_head", batch_size=10)]


def pixels(seed: int, column: str = "pixel_values", examples: int = 40) -> datasets.Dataset:
    """Random 8x8 images as tensors, three classes, told apart by their mean."""
    generator = np.random.default_rng(seed)
    label = np.arange(examples) % 3
    images = generator.normal(size=(examples, 3, 8, 8)) + label[:, None, None, None]
    columns = {column: images.astype(np.float32).tolist()}
    return datasets.Dataset.from_dict({**columns, **({"label": label.tolist()} if column == "pixel_values" else {})})


def classifier(labels: int = 3) -> ResNetForImageClassification:
    torch.manual_seed(0)
    return ResNetForImageClassification(
        ResNetConfig(
            num_channels=3, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=labels
        )
    )


def unet() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )


def make_trainer(kind: str, output_dir, model=None, **settings) -> SophonTrainer:
    """A trainer of a "classifier", a "unet" or a "module" that takes three iterations."""
    args = SophonConfig(
        str(output_dir),
        **{
            "max_steps": 2,
            "K": 2,
            "simulated_examples": 3,
            "strategy_space": SPACE,
            "per_device_train_batch_size": 8,
            "eval_steps": 2,
            "tolerance": 1.0,
            "save_steps": 1,
            "disable_tqdm": True,
            "use_cpu": True,
            **settings,
        },
    )
    if kind == "module":
        return SophonTrainer(model or TinyNet(), make_points(1), make_points(2), args)
    if kind == "unet":
        task = DiffusionTask(DDPMScheduler(num_train_timesteps=20))
        return SophonTrainer(model or unet(), pixels(1, "sample"), pixels(2, "sample"), args, task=task)
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    return SophonTrainer(model or classifier(), pixels(1), pixels(2), args, processing_class=processor)


def protect(kind: str, output_dir, model=None, **settings) -> SophonTrainer:
    trainer = make_trainer(kind, output_dir, model, **settings)
    trainer.train()
    return trainer


def save_untrained(kind: str, output_dir, model=None) -> SophonTrainer:
    """A trainer that has saved its model before any iteration, where what it has learned does not matter."""
    trainer = make_trainer(kind, output_dir, model)
    trainer.save_model()
    return trainer


def attack(protected: torch.nn.Module, folder, original: torch.nn.Module | None = None, sweep=SWEEP):
    """What a small sweep finds on a classifier, in `folder`."""
    suite = AttackSuite(sweep, folder, seeds=[0, 1, 2], epochs=2, measured_epochs=[0, 1, 2])
    return suite.run(
        protected=protected,
        original=original or classifier(),
        restricted_dataset=pixels(3, examples=60),
        eval_dataset=pixels(4),
        original_dataset=pixels(5),
        original_eval_dataset=pixels(6),
    )

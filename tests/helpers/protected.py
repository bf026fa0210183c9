"""A trainer that protects a tiny model in a few iterations."""

from __future__ import annotations

from pathlib import Path

import torch
from points import TinyNet, make_points
from torch import nn

from sophon_hf import SophonConfig, SophonTrainer
from sophon_hf.models.structure import ModelStructure

HEAD_ONLY = ModelStructure("head", ("body",), 3)


def build(output: Path, model: nn.Module | None = None, **changes) -> SophonTrainer:
    torch.manual_seed(0)
    settings = {
        "max_steps": 6,
        "K": 2,
        "simulated_examples": 3,
        "per_device_train_batch_size": 8,
        "eval_steps": 2,
        "save_steps": 3,
        "disable_tqdm": True,
        "tolerance": 1.0,
        "use_cpu": True,
        "strategy_space": {"learning_rates": [1e-2, 1e-3], "batch_sizes": [8]},
    }
    config = SophonConfig(str(output), **{**settings, **changes})
    return SophonTrainer(TinyNet() if model is None else model, make_points(1), make_points(2), config)

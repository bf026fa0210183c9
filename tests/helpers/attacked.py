"""What attacks are tried on: two small models, one rule to learn, and a suite of two attacks."""

from __future__ import annotations

import torch
from points import TinyNet, make_points

from sophon_hf import AttackSuite, FineTuningStrategy

DIRECT = FineTuningStrategy(epochs=2, learning_rate=0.01, batch_size=20)
NEW_HEAD = DIRECT.with_changes(initialization="new_head")
STEADY = NEW_HEAD.with_changes(optimizer="momentum")


def make_model(seed: int = 0, num_classes: int = 3) -> TinyNet:
    torch.manual_seed(seed)
    return TinyNet(num_classes)


def make_suite(folder, sweep=(DIRECT, NEW_HEAD), **settings) -> AttackSuite:
    return AttackSuite(sweep, folder, **{"seeds": [0, 1], "measured_epochs": [0, 1, 2], **settings})


def make_data() -> dict:
    """Arguments of `AttackSuite.run`, models included."""
    points = make_points(1)
    return {
        "protected": make_model(1),
        "original": make_model(0),
        "restricted_dataset": points.select(range(60)),
        "eval_dataset": points.select(range(60, 120)),
    }

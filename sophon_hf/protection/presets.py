"""Hyper-parameters that belong together, under a name."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "representation": {
        "K": 2,
        "l_NTR": 4,
        "alpha": 1.5e-3,
        "beta": 5e-4,
        "preconditioning": 4.0,
        "max_steps": 400,
        "recovery_ratio": 0.15,
        "warmup_steps": 0.05,
        "max_grad_norm": 1.0,
        "lr_scheduler_type": "cosine",
        "per_device_train_batch_size": 96,
        "probe_depths": 2,
        "distillation": 2.0,
        "mixup": True,
        "keep_norms": True,
        "strategy_space": {
            "initializations": ["direct", "new_head", "new_head", "new_head"],
            "reinitialized_blocks": [0, 1, 1],
            "learning_rates": [3e-4, 1e-3, 3e-3, 3e-3],
            "batch_sizes": [20, 50],
            "examples": [20, 50, 100, 500, None],
            "preparations": [None, None, "shrink_and_perturb"],
        },
        "tolerance": 0.03,
        "on_violation": "adapt_alpha",
        "save_steps": 100,
    },
}

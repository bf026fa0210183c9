"""Hyper-parameters that belong together, under a name."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "representation": {
        "K": 2,
        "l_NTR": 5,
        "alpha": 6e-3,
        "beta": 2e-3,
        "max_steps": 1200,
        "max_grad_norm": 1.0,
        "lr_scheduler_type": "cosine",
        "probe_depths": 2,
        "num_persistent": 4,
        "horizon": 64,
        "distillation": 2.0,
        "mixup": True,
        "keep_norms": True,
        "strategy_space": {
            "initializations": ["direct", "new_head", "new_head", "new_head"],
            "reinitialized_blocks": [0, 1, 1],
            "learning_rates": [3e-4, 1e-3, 3e-3, 3e-3],
            "batch_sizes": [50, 128],
            "preparations": [None, "warm_up"],
        },
        "tolerance": 0.02,
        "on_violation": "adapt_alpha",
        "eval_steps": 50,
        "save_steps": 200,
    },
}

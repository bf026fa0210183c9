"""Defences of the field, as far as the same engine carries them: settings of `SophonConfig`, after their papers' ideas.

They are *like* the methods named, not the methods: data, models and budgets are this benchmark's.
"""

from __future__ import annotations

from typing import Any

# IMMA (arXiv 2311.18815): one inner step, one outer step against it, no search over strategies.
IMMA_LIKE: dict[str, Any] = {
    "K": 1,
    "strategy_space": {"initializations": ["direct"], "learning_rates": [1e-3], "batch_sizes": [100]},
}

# TAR (arXiv 2408.00761): 64 inner steps, maximal entropy at their end, outputs held near the original's.
TAR_LIKE: dict[str, Any] = {
    "K": 64,
    "gamma": [0.0] * 63 + [1.0],
    "suppression_loss": "kl_from_uniform",
    "distillation": 1.0,
    "max_steps": 200,
    "strategy_space": {
        "initializations": ["direct"],
        "learning_rates": [1e-4, 3e-4, 1e-3],
        "schedules": ["constant", "cosine"],
        "batch_sizes": [50],
    },
}

# Condition-number immunisation (arXiv 2505.23760): no adversary is simulated; see condition_number.py.
CONDITION_NUMBER_LIKE: dict[str, Any] = {"l_FTS": 0, "beta": 1e-3, "max_steps": 1000, "lr_scheduler_type": "cosine"}

BASELINES = {"imma-like": IMMA_LIKE, "tar-like": TAR_LIKE, "condition-number-like": CONDITION_NUMBER_LIKE}

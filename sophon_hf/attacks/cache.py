"""What a finished cell is named by: all that its result follows from, and nothing that two runs of the same differ in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from sophon_hf.attacks.budget import Budget, shapes
from sophon_hf.attacks.results import UNTRAINED, AttackRun
from sophon_hf.finetuning.strategy import FineTuningStrategy
from sophon_hf.tasks.base import Task

# Where a model comes from, what wrote it, and what its classes are called.
_SAYS_NOTHING = {
    "architectures", "auto_map", "dtype", "id2label", "label2id", "label_names", "name_or_path", "problem_type", "torch_dtype",
    "transformers_version", "use_cache",
}  # fmt: skip


def cell_keys(
    cells: Sequence[AttackRun],
    task: Task,
    models: dict[str, nn.Module],
    weights: dict[str, str],
    budget: Budget,
    measured: Callable[[FineTuningStrategy], Any],
) -> list[str]:
    """One key a cell; cells of equal models share theirs.

    Args:
        cells: The cells.
        task: What is learned.
        models: By name.
        weights: Hash of each model's weights.
        budget: The adversary's data.
        measured: When a strategy is measured, as plain values.
    """
    victims = {name: [weights[name], type(model).__name__, configuration(model)] for name, model in models.items()}
    # These take nothing but the architecture, so their cells serve every protected model of it.
    architecture = [shapes(models["original"]), *victims["original"][1:]]
    victims |= {"scratch": architecture, UNTRAINED: architecture}
    data = [domain.fingerprint for domain in (budget.training, budget.validation, budget.test)]
    how = [type(task).__name__, getattr(task, "head", None), configuration(getattr(task, "noise_scheduler", None))]
    original = [] if budget.original is None else [budget.original.fingerprint]
    return [
        _digest(
            [victims[c.model], data, c.strategy.to_dict(), c.seed, measured(c.strategy), how]
            # Only a warm-up reads original data; one that lacked them is no longer hindered once they are given.
            + (original if c.strategy.preparation == "warm_up" else [])
        )
        for c in cells
    ]


def configuration(part: Any) -> dict[str, Any] | None:
    """What a model of transformers, or a model or scheduler of diffusers, is configured to compute; None of anything else.

    Weights do not tell it: an activation has none.
    """
    # transformers writes the configuration, diffusers what is configured.
    writer = next((p for p in (getattr(part, "config", None), part) if hasattr(p, "to_json_string")), None)
    return None if writer is None else _telling(json.loads(writer.to_json_string()))


def _telling(value: Any) -> Any:
    if isinstance(value, list):
        return [_telling(item) for item in value]
    if not isinstance(value, dict):
        return value
    # Private entries say which values were left to their defaults, in an order that no two processes share.
    return {n: _telling(v) for n, v in value.items() if not n.startswith("_") and n not in _SAYS_NOTHING}


def _digest(parts: Any) -> str:
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=12).hexdigest()

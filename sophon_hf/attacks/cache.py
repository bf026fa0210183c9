"""Keys of finished runs: all that a result follows from, and nothing in which two runs of the same attack differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from torch import nn

from sophon_hf.attacks.adversary import AdversaryDomains, shapes
from sophon_hf.attacks.run import AttackRun, measured_points
from sophon_hf.attacks.score import UNTRAINED
from sophon_hf.finetuning.strategy import FineTuningStrategy
from sophon_hf.tasks.base import Task

# Where a model comes from, what wrote it, and what its classes are called.
_SAYS_NOTHING = {
    *("architectures", "auto_map", "dtype", "id2label", "label2id", "label_names", "name_or_path", "problem_type"),
    *("torch_dtype", "transformers_version", "use_cache"),
}
_YOUNGER = ("original_weight", "head_first", "layer_decay", "augmentation", "ema", "labelled")
_ALWAYS_READ = ("training", "validation", "test")


def run_keys(
    runs: Sequence[AttackRun],
    task: Task,
    models: dict[str, nn.Module],
    weights: dict[str, str],
    data: AdversaryDomains,
    measured: Sequence[float] | int,
    bf16: bool = False,
) -> list[str]:
    """Return one key a run; runs on equal models share theirs.

    Args:
        runs: Those of a suite.
        task: What is learned.
        models: By name.
        weights: Hash of each model's weights.
        data: The adversary's.
        measured: When attacks are measured (`measured_points`).
        bf16: Whether they run in mixed precision.
    """
    victims: dict[str, list[Any]] = {
        name: [weights[name], type(model).__name__, configuration(model)] for name, model in models.items()
    }
    # These take nothing but the architecture, so their runs serve every protected model of it.
    architecture = [shapes(models["original"]), *victims["original"][1:]]
    victims |= {"scratch": architecture, UNTRAINED: architecture}
    domains = [domain.fingerprint for name, domain in data.given().items() if name in _ALWAYS_READ]
    how = [type(task).__name__, task.metric, getattr(task, "head", None)]
    how.append(configuration(getattr(task, "noise_scheduler", None)))
    how += ["bf16"] * bf16
    original = [] if data.original is None else [data.original.fingerprint]
    keys = []
    for run in runs:
        points = list(measured_points(run.strategy, len(data.training), measured).items())
        parts = [victims[run.model], domains, _described(run.strategy), run.seed, points, how]
        if data.folds:
            parts.append(["folds", len(data.folds)])
        if run.strategy.needs_original_data:
            # One that lacked them runs once they are given; no other reads them.
            parts.append(original)
        keys.append(hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=12).hexdigest())
    return keys


def _described(strategy: FineTuningStrategy) -> dict[str, Any]:
    """Return the strategy without the younger fields that it does not use: runs from before them keep their keys."""
    usual = FineTuningStrategy()
    return {n: v for n, v in strategy.to_dict().items() if n not in _YOUNGER or v != getattr(usual, n)}


def configuration(part: Any) -> dict[str, Any] | None:
    """Return what a model of transformers, or a model or scheduler of diffusers, is configured to compute, or None.

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

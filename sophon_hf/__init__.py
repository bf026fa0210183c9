"""Non-fine-tunable learning for Hugging Face models: protect them, attack them, report what the protection is worth.

Names are loaded when they are first used, so that `import sophon_hf` and the command line answer at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "SophonTrainer": "trainer",
    "SophonConfig": "config",
    "FineTuningStrategy": "finetuning",
    "StrategySpace": "finetuning",
    "AttackSuite": "attacks",
    "ClassificationTask": "tasks",
    "DiffusionTask": "tasks",
    "load_domain": "data",
    "select_classes": "data",
    "split_domain": "data",
}

__all__ = [
    "AttackSuite",
    "ClassificationTask",
    "DiffusionTask",
    "FineTuningStrategy",
    "SophonConfig",
    "SophonTrainer",
    "StrategySpace",
    "__version__",
    "load_domain",
    "select_classes",
    "split_domain",
]

if TYPE_CHECKING:
    from sophon_hf.attacks import AttackSuite
    from sophon_hf.config import SophonConfig
    from sophon_hf.data import load_domain, select_classes, split_domain
    from sophon_hf.finetuning import FineTuningStrategy, StrategySpace
    from sophon_hf.tasks import ClassificationTask, DiffusionTask
    from sophon_hf.trainer import SophonTrainer


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sophon_hf' has no attribute {name!r}")
    return getattr(import_module(f"sophon_hf.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)

"""Non-fine-tunable learning for Hugging Face models: protect them, attack them, report what the protection is worth.

Names are loaded when they are first used, so that `import sophon_hf` and the command line answer at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "SophonTrainer": "protection.trainer",
    "SophonConfig": "protection.config",
    "FineTuningStrategy": "finetuning.strategy",
    "StrategySpace": "finetuning.strategy",
    "AttackSuite": "attacks.suite",
    "ClassificationTask": "tasks.classification",
    "DiffusionTask": "tasks.diffusion",
    "load_domain": "data.loading",
    "load_metric": "tasks.metrics",
    "select_classes": "data.labels",
    "split_domain": "data.labels",
    "publish": "hub.publish",
    "audit": "auditing.audit",
    "benchmark": "benchmarking.benchmark",
}

__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from sophon_hf.attacks.suite import AttackSuite as AttackSuite
    from sophon_hf.auditing.audit import audit as audit
    from sophon_hf.benchmarking.benchmark import benchmark as benchmark
    from sophon_hf.data.labels import select_classes as select_classes
    from sophon_hf.data.labels import split_domain as split_domain
    from sophon_hf.data.loading import load_domain as load_domain
    from sophon_hf.finetuning.strategy import FineTuningStrategy as FineTuningStrategy
    from sophon_hf.finetuning.strategy import StrategySpace as StrategySpace
    from sophon_hf.hub.publish import publish as publish
    from sophon_hf.protection.config import SophonConfig as SophonConfig
    from sophon_hf.protection.trainer import SophonTrainer as SophonTrainer
    from sophon_hf.tasks.classification import ClassificationTask as ClassificationTask
    from sophon_hf.tasks.diffusion import DiffusionTask as DiffusionTask
    from sophon_hf.tasks.metrics import load_metric as load_metric


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sophon_hf' has no attribute {name!r}")
    return getattr(import_module(f"sophon_hf.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)

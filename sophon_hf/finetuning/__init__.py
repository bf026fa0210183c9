"""Fine-tuning strategies (what an adversary does) and the engine that runs them, for defender and attacker alike."""

from sophon_hf.finetuning.engine import FineTuning, Update
from sophon_hf.finetuning.environment import Environment, held_out_examples, sample_environment
from sophon_hf.finetuning.initialization import Stored, preserved
from sophon_hf.finetuning.persistent import PersistentAdversary
from sophon_hf.finetuning.stacked import StackedFineTuning
from sophon_hf.finetuning.strategy import FineTuningStrategy, NotApplicableError, StrategySpace

__all__ = [
    "Environment",
    "FineTuning",
    "FineTuningStrategy",
    "NotApplicableError",
    "PersistentAdversary",
    "StackedFineTuning",
    "Stored",
    "StrategySpace",
    "Update",
    "held_out_examples",
    "preserved",
    "sample_environment",
]

"""Attacks: sweeps of fine-tuning strategies, the suite that runs them, and the score of what they reach."""

from sophon_hf.attacks.attack import Curve, run_attack, run_attacks
from sophon_hf.attacks.results import AttackResults, Cell
from sophon_hf.attacks.score import BestAttack, RecoveredTransfer
from sophon_hf.attacks.suite import AttackSuite

__all__ = [
    "AttackResults",
    "AttackSuite",
    "BestAttack",
    "Cell",
    "Curve",
    "RecoveredTransfer",
    "run_attack",
    "run_attacks",
]

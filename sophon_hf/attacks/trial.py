"""One step of every kind of attack before the work begins: what fails in hour three fails in the first minute."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from torch import nn

from sophon_hf.attacks.adversary import AdversaryDomains
from sophon_hf.attacks.run import AttackRun, try_attack
from sophon_hf.attacks.score import UNTRAINED
from sophon_hf.finetuning.strategy import FineTuningStrategy, NotApplicableError
from sophon_hf.tasks.base import Task

logger = logging.getLogger(__name__)

# Nothing in which these differ makes a first step fail.
_NO_MATTER = (
    *("optimizer", "learning_rate", "weight_decay", "schedule", "warmup_ratio", "max_grad_norm"),
    *("batch_size", "epochs", "steps"),
)


def try_kinds(
    runs: Iterable[AttackRun], models: dict[str, nn.Module], task: Task, data: AdversaryDomains, required: bool = True
) -> None:
    """Take one step of each kind of attack on each model, on copies, and warn of those that fail.

    Kinds differ in initialization, transfer, adapter, preparation and the like; of each the attack with the smallest
    batches is tried. One that is not applicable does not count as failed.

    Args:
        runs: Those that are to be computed.
        models: By name; they are left as they are, and so are the random states.
        task: What the adversary learns.
        data: Its data.
        required: Whether it is an error that all fail.

    Raises:
        ValueError: All fail, at least on the given models, where one is required.
    """
    kinds: dict[tuple[str, FineTuningStrategy], FineTuningStrategy] = {}
    usual = FineTuningStrategy()
    for run in sorted(runs, key=lambda run: run.strategy.batch_size):
        # A batch of one is a kind of its own, which batch norm refuses.
        alike = {name: getattr(usual, name) for name in _NO_MATTER} | {"batch_size": min(2, run.strategy.batch_size)}
        # What an untrained model does, the others do, too.
        if run.model != UNTRAINED:
            kinds.setdefault((run.model, run.strategy.with_changes(**alike)), run.strategy)
    failed: list[str] = []
    going = 0
    for (name, _), strategy in kinds.items():
        try:
            try_attack(models["original" if name == "scratch" else name], task, strategy, data)
        except NotApplicableError:
            continue
        except Exception as error:  # A model's own code may raise anything.
            failed.append(f"{strategy.name} on {name}: {type(error).__name__}: {error}")
        else:
            going += name != "scratch"  # By itself it measures no model.
    if required and failed and not going:
        raise ValueError(f"No attack gets through its first step, so there is nothing to measure. {failed[0]}")
    for message in failed:
        logger.warning("An attack fails at its first step, and others of its kind will: %s", message)

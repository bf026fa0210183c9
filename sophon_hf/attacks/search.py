"""Search the strategy space by Optuna: what an adversary with an afternoon does.

Every model gets the same number of trials, chosen by what they reach on validation data. A search keeps no state of its
own. It proposes the same strategies from the same values, so that finished runs, which the suite keeps as files, bring
it back to where it was, and all processes of a launch follow it together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from sophon_hf.attacks.score import AttackSummary
from sophon_hf.attacks.sweeps import scratch
from sophon_hf.finetuning.strategy import PREPARATIONS, SCHEDULES, FineTuningStrategy
from sophon_hf.utils import write_atomically

TRIALS = 40
# Proposed at once, on any number of processes: another number would be another search.
_ROUND = 8


class Search:
    """The search of one model, which proposes strategies and is told what they reached.

    Args:
        trials: How many strategies are tried, those included that are told without having been proposed.
        direct: Whether the model's own head has an output for every class.
        original: Whether there are data of the original domain.
        greater_is_better: For the adversary.
        epochs: Length of every attack.

    Attributes:
        trials: As given.
        spent: How many of them were told.

    Raises:
        ImportError: Optuna is not installed.
    """

    def __init__(self, trials: int, direct: bool, original: bool, greater_is_better: bool, epochs: float):
        optuna = _optuna()
        one_of, number = optuna.distributions.CategoricalDistribution, optuna.distributions.FloatDistribution
        known = [p for p in PREPARATIONS if original or p not in ("warm_up", "distill")]
        self.space = {
            "initialization": one_of(("direct", "new_head") if direct else ("new_head",)),
            "reinitialized_blocks": optuna.distributions.IntDistribution(0, 3),
            "transfer": one_of(("all", "head", "norm")),
            "optimizer": one_of(("momentum", "nesterov", "adam", "adamw")),
            "learning_rate": number(1e-5, 0.3, log=True),
            "schedule": one_of(SCHEDULES),
            "weight_decay": one_of((0.0, 1e-4, 1e-3, 1e-2)),
            "batch_size": one_of((10, 25, 50, 100)),
            "preparation": one_of((None, *known)),
        }
        sampler = optuna.samplers.TPESampler(seed=0, multivariate=True, constant_liar=True)
        self._study = optuna.create_study(direction="maximize" if greater_is_better else "minimize", sampler=sampler)
        self.trials, self.spent, self.epochs = trials, 0, epochs
        self._open: dict[FineTuningStrategy, list[Any]] = {}

    @property
    def waiting(self) -> list[FineTuningStrategy]:
        """Return what was proposed and not told yet."""
        return list(self._open)

    def propose(self) -> list[FineTuningStrategy]:
        """Return the strategies of the next round; none where all trials are spent."""
        for _ in range(min(_ROUND, self.trials - self.spent)):
            trial = self._study.ask(fixed_distributions=self.space)
            values = dict(trial.params)
            if values["initialization"] == "direct":
                values["reinitialized_blocks"] = 0
            self._open.setdefault(FineTuningStrategy(**values, epochs=self.epochs), []).append(trial)
        return self.waiting

    def tell(self, strategy: FineTuningStrategy, validation: float | None) -> None:
        """Take in what a strategy reached; None where it reached nothing.

        Also one that was not proposed counts as a trial. Outside of the space it teaches nothing.
        """
        states = _optuna().trial.TrialState
        reached = validation is not None and math.isfinite(validation)
        trials = self._open.pop(strategy, [])
        self.spent += max(1, len(trials))
        for trial in trials:
            self._study.tell(trial, *((validation, states.COMPLETE) if reached else (None, states.FAIL)))
        if reached and not trials:
            params = {name: getattr(strategy, name) for name in self.space}
            with suppress(ValueError):
                self._study.add_trial(
                    _optuna().trial.create_trial(params=params, distributions=self.space, value=validation)
                )


def next_round(
    searches: dict[str, Search], attacks: Sequence[AttackSummary], starts: Sequence[FineTuningStrategy]
) -> dict[str, list[FineTuningStrategy]]:
    """Tell each model's search what its attacks reached, and return what to run next.

    Args:
        searches: By model.
        attacks: All that have been run.
        starts: What was tried on every model before the search.

    Returns:
        For each model the strategies that were not run yet; nothing at all once every search is at its end.
    """
    asked = {}
    for model, search in searches.items():
        reached = {attack.strategy: attack.validation for attack in attacks if attack.model == model}

        def run_as(strategies: Sequence[FineTuningStrategy], model: str = model) -> list[FineTuningStrategy]:
            return [scratch([s])[0] for s in strategies] if model == "scratch" else list(strategies)

        told = search.waiting or ([] if search.spent else list(starts))
        for strategy, ran in zip(told, run_as(told), strict=True):
            search.tell(strategy, reached.get(ran))
        if proposed := search.propose():
            asked[model] = [s for s in dict.fromkeys(run_as(proposed)) if s not in reached]
    return asked


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ImportError("The sweep 'search' needs Optuna: pip install 'sophon-hf[search]'.") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def write_sweep(strategies: Sequence[FineTuningStrategy], path: Path) -> None:
    """Write strategies as a sweep file, so that they can be tried on another model."""
    usual = FineTuningStrategy()
    entries = [
        {f.name: getattr(s, f.name) for f in fields(s) if getattr(s, f.name) != getattr(usual, f.name)}
        for s in strategies
    ]
    write_atomically(path, yaml.safe_dump(entries, sort_keys=False))

"""Results of a sweep as data, and the score that is computed from them: recovered transfer."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sophon_hf.attacks.plots import plot_curves
from sophon_hf.attacks.run import Curve
from sophon_hf.attacks.score import AttackSummary, RecoveredTransfer, Scores, mean_of_finite
from sophon_hf.finetuning.strategy import FineTuningStrategy
from sophon_hf.utils import finite_or_none, write_atomically

# The model that has never been trained and warms up on the adversary's original data.
UNTRAINED = "untrained"


@dataclass
class AttackRun:
    """One attack on one model with one seed.

    Attributes:
        model: "protected", "original", "scratch", or a further baseline.
        strategy: What the adversary did.
        seed: Of the attack.
        curve: What it reached; None where it did not end.
        error: Why it did not end.
        applicable: False where the strategy cannot be carried out on this model at all (which is not resistance).
    """

    model: str
    strategy: FineTuningStrategy
    seed: int
    curve: Curve | None = None
    error: str | None = None
    applicable: bool = True

    @property
    def failed(self) -> bool:
        """Whether the attack could have been carried out, but broke off."""
        return self.error is not None and self.applicable

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = {**asdict(self), "strategy": self.strategy.to_dict()}
        if self.curve is not None:
            values["curve"] = {n: [finite_or_none(v) for v in points] for n, points in values["curve"].items()}
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> AttackRun:
        """The inverse of `to_dict`."""
        curve = None
        if values["curve"] is not None:
            curve = Curve(**{n: [_number_or_nan(v) for v in points] for n, points in values["curve"].items()})
        return cls(**{**values, "strategy": FineTuningStrategy.from_dict(values["strategy"]), "curve": curve})


@dataclass
class AttackResults:
    """All cells of a sweep.

    Attributes:
        cells: The cells.
        metric: "accuracy" or "mse".
        greater_is_better: For the adversary.
        test_examples: Size of the test split.
        original_metric: The original domain's test metric of each model, where it was measured.
        facts: What was run: sweep, budget, seeds, fingerprints, versions, cost of an example.
        benign: `fine_tunability` on an allowed task, where one was given.
        pictures: Of a diffusion model: grids of clean, noisy and denoised images, by what they show.
    """

    cells: list[AttackRun]
    metric: str
    greater_is_better: bool
    test_examples: int
    original_metric: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    benign: dict[str, float] | None = None
    pictures: dict[str, Path] = field(default_factory=dict)

    def of(self, model: str) -> list[AttackRun]:
        """The cells of a model that ended."""
        return [cell for cell in self.cells if cell.model == model and cell.curve is not None]

    def by_strategy(self, model: str) -> Iterator[tuple[FineTuningStrategy, list[AttackRun]]]:
        """The cells of a model that ended, grouped by strategy."""
        groups: dict[FineTuningStrategy, list[AttackRun]] = {}
        for cell in self.of(model):
            groups.setdefault(cell.strategy, []).append(cell)
        yield from groups.items()

    def summaries(self) -> list[AttackSummary]:
        """Return each attack on each model over its seeds, stopped at the epoch with its best mean validation metric.

        A seed that diverged says nothing of the others, so the mean is over those that are finite.
        """
        groups: dict[tuple[str, FineTuningStrategy], list[AttackRun]] = {}
        for cell in self.cells:
            groups.setdefault((cell.model, cell.strategy), []).append(cell)
        found = []
        for (model, strategy), cells in groups.items():
            ended = [(cell.seed, curve) for cell in cells if (curve := cell.curve) is not None]
            curves, point, best = [curve for _, curve in ended], -1, math.nan
            validation = mean_of_finite([curve.validation for curve in curves])
            if np.isfinite(validation).any():
                point = int(np.nanargmax(validation if self.greater_is_better else -validation))
                best = float(validation[point])
            found.append(
                AttackSummary(
                    model=model,
                    strategy=strategy,
                    seeds=tuple(seed for seed, _ in ended),
                    epoch=curves[0].epoch[point] if math.isfinite(best) else None,
                    validation=finite_or_none(best),
                    test=tuple(finite_or_none(curve.test[point]) for curve in curves),
                    final=tuple(finite_or_none(curve.test[-1]) for curve in curves),
                    failed=sum(cell.failed for cell in cells),
                    applicable=all(cell.applicable for cell in cells),
                )
            )
        return found

    def scores(self) -> Scores:
        """Return what scores this sweep; take it once where several figures are wanted, since it goes through all cells."""
        return Scores(self.summaries(), self.metric, self.greater_is_better, self.test_examples, self.original_metric)

    def best(self, model: str, among: Iterable[FineTuningStrategy] | None = None) -> AttackSummary | None:
        """Return the strongest attack on a model, as `Scores.best` chooses it."""
        return self.scores().best(model, among)

    def recovered_transfer(
        self, among: Iterable[FineTuningStrategy] | None = None, model: str = "protected"
    ) -> RecoveredTransfer:
        """Return the score of the protection over the whole sweep, or `among` some of its attacks (`Scores`)."""
        return self.scores().recovered_transfer(among, model)

    def cost_to_recover(self) -> dict[str, float] | None:
        """What the strongest attack on the protected model pays until it is as good as the best training from scratch.

        Returns:
            Steps, images and (where known) floating-point operations at the first measured point there; None where it
            never gets there within its budget.
        """
        scores = self.scores()
        protected, scratch = scores.best("protected"), scores.best("scratch")
        if protected is None or scratch is None:
            return None
        cells = [cell for cell in self.of("protected") if cell.strategy == protected.strategy]
        mean = mean_of_finite([cell.curve.test for cell in cells])
        reached = np.flatnonzero(mean >= scratch.mean if self.greater_is_better else mean <= scratch.mean)
        if not len(reached):
            return None
        step = cells[0].curve.step[int(reached[0])]
        images = step * min(protected.strategy.batch_size, self.facts.get("training_examples", np.inf))
        cost = {"steps": step, "images": images}
        if self.facts.get("flops_per_example"):
            cost["flops"] = images * self.facts["flops_per_example"]
        return cost

    def fine_tunability(self) -> dict[str, float] | None:
        """How well each model is fine-tuned: its best attack's mean test metric, for runs on an allowed task.

        Returns:
            "protected", "original" and "scratch", and "difference": protected minus original, so turned that below 0 is
            a loss to the user. None where a model has no finished attack.
        """
        scores = self.scores()
        best = {model: scores.best(model) for model in ("protected", "original", "scratch")}
        if any(attack is None for attack in best.values()):
            return None
        means = {model: attack.mean for model, attack in best.items()}
        sign = 1 if self.greater_is_better else -1
        return means | {"difference": sign * (means["protected"] - means["original"])}

    def to_dataset(self):
        """One row a measured point, as a `datasets.Dataset`."""
        import datasets

        rows = [
            {
                "model": cell.model, "attack": cell.strategy.name, "seed": cell.seed, "epoch": epoch, "step": step,
                "test": test, "validation": validation, "loss": loss,
            }
            for cell in self.cells if cell.curve is not None
            for epoch, step, test, validation, loss in zip(
                cell.curve.epoch, cell.curve.step, cell.curve.test, cell.curve.validation, cell.curve.loss, strict=True
            )
        ]  # fmt: skip
        return datasets.Dataset.from_list(rows)

    def plot(self, path: str | Path = "curves.png") -> Path:
        """Metric per epoch, one panel a start, best attack of each model there, as in Fig. 3.

        Where the suite measured every so many steps, the axis shows steps.
        """
        by_step = self.facts.get("measured_every") is not None
        scores = self.scores()
        scratch = scores.best("scratch")
        panels: dict[str, dict[str, tuple]] = {}
        for start in dict.fromkeys(_start(cell.strategy) for cell in self.of("protected")):
            among = [strategy for strategy, _ in self.by_strategy("protected") if _start(strategy) == start]
            chosen = {name: scores.best(name, among) for name in dict.fromkeys(c.model for c in self.cells)}
            chosen["scratch"] = scratch
            panels[start] = {
                name: self._line(name, attack.strategy, by_step)
                for name, attack in chosen.items()
                if attack is not None
            }
        return plot_curves(panels, Path(path), self.metric, unit="steps" if by_step else "epochs")

    def _line(self, model: str, strategy: FineTuningStrategy, by_step: bool) -> tuple[list[float], list[list[float]]]:
        curves = [cell.curve for cell in self.of(model) if cell.strategy == strategy]
        return curves[0].step if by_step else curves[0].epoch, [curve.test for curve in curves]

    def save(self, path: Path) -> None:
        """Write everything as JSON, atomically; what is not finite is read back as NaN."""
        write_atomically(
            path,
            json.dumps(
                {
                    "facts": self.facts,
                    "benign": self.benign and {n: finite_or_none(v) for n, v in self.benign.items()},
                    "pictures": {t: os.path.relpath(p, path.parent) for t, p in self.pictures.items()},
                    "metric": self.metric,
                    "greater_is_better": self.greater_is_better,
                    "test_examples": self.test_examples,
                    "original_metric": {n: finite_or_none(v) for n, v in self.original_metric.items()},
                    "cells": [cell.to_dict() for cell in self.cells],
                },
                indent=1,
                allow_nan=False,
            ),
        )

    @classmethod
    def load(cls, path: str | Path) -> AttackResults:
        """The inverse of `save`."""
        path = Path(path)
        values = json.loads(path.read_text(encoding="utf-8"))
        pictures = {title: path.parent / name for title, name in values.get("pictures", {}).items()}
        for name in ("original_metric", "benign"):
            if values.get(name):
                values[name] = {n: _number_or_nan(v) for n, v in values[name].items()}
        return cls(**{**values, "cells": [AttackRun.from_dict(cell) for cell in values["cells"]], "pictures": pictures})


def _number_or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _start(strategy: FineTuningStrategy) -> str:
    return strategy.name.split(", ")[0]

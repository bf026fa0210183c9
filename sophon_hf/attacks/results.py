"""Results of a sweep as data: every run, and what follows from all of them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sophon_hf.attacks.run import AttackRun, Curve
from sophon_hf.attacks.score import AttackSummary, RecoveredTransfer, Scores, mean_of_finite
from sophon_hf.finetuning.strategy import FineTuningStrategy
from sophon_hf.utils import finite_or_none, write_atomically


@dataclass
class AttackResults:
    """All runs of a sweep.

    Attributes:
        runs: One a model, attack and seed.
        metric: "accuracy" or "mse".
        greater_is_better: For the adversary.
        test_examples: Size of the test split.
        original_metric: The original domain's test metric of each model, where it was measured.
        facts: What was run: sweep, seeds, fingerprints, versions, cost of an example.
        benign: `fine_tunability` on an allowed task, where one was given.
        pictures: Of a diffusion model: grids of clean, noisy and denoised images, by what they show.
    """

    runs: list[AttackRun]
    metric: str
    greater_is_better: bool
    test_examples: int
    original_metric: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    benign: dict[str, float] | None = None
    pictures: dict[str, Path] = field(default_factory=dict)

    def models(self) -> list[str]:
        """Return the names of all models, in the order in which they were attacked."""
        return list(dict.fromkeys(run.model for run in self.runs))

    def of(self, model: str) -> list[AttackRun]:
        """Return the runs on a model that ended."""
        return [run for run in self.runs if run.model == model and run.curve is not None]

    def curves(self, model: str) -> dict[FineTuningStrategy, list[Curve]]:
        """Return the curves of each attack on a model, one a seed that ended."""
        found: dict[FineTuningStrategy, list[Curve]] = {}
        for run in self.runs:
            if run.model == model and run.curve is not None:
                found.setdefault(run.strategy, []).append(run.curve)
        return found

    def summaries(self) -> list[AttackSummary]:
        """Return each attack on each model over its seeds, stopped at the epoch with its best mean validation metric.

        A seed that diverged says nothing of the others, so the mean is over those that are finite.
        """
        groups: dict[tuple[str, FineTuningStrategy], list[AttackRun]] = {}
        for run in self.runs:
            groups.setdefault((run.model, run.strategy), []).append(run)
        found = []
        for (model, strategy), runs in groups.items():
            ended = [(run.seed, curve) for run in runs if (curve := run.curve) is not None]
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
                    highest=self._highest(curves),
                    failed=sum(run.failed for run in runs),
                    applicable=all(run.applicable for run in runs),
                )
            )
        return found

    def _highest(self, curves: list[Curve]) -> float | None:
        """Return the strongest mean test metric of any point; None where nothing is finite."""
        sign = 1 if self.greater_is_better else -1
        means = sign * mean_of_finite([curve.test for curve in curves])
        return sign * float(np.nanmax(means)) if np.isfinite(means).any() else None

    def scores(self) -> Scores:
        """Return what scores this sweep; it goes through all runs, so take it once where several figures are wanted."""
        fingerprints = self.facts.get("fingerprints", {})
        chose = fingerprints.get("validation") or fingerprints.get("training") or {}
        return Scores(
            self.summaries(),
            self.metric,
            self.greater_is_better,
            self.test_examples,
            self.original_metric,
            chose.get("examples"),
            {domain: level for domain, level in self.facts.get("chance", {}).items() if level is not None},
            fingerprints.get("original_test", {}).get("examples"),
        )

    def best(self, model: str, among: Iterable[FineTuningStrategy] | None = None) -> AttackSummary | None:
        """Return the strongest attack on a model, as `Scores.best` chooses it."""
        return self.scores().best(model, among)

    def recovered_transfer(
        self, among: Iterable[FineTuningStrategy] | None = None, model: str = "protected"
    ) -> RecoveredTransfer:
        """Return the score of the protection over the whole sweep, or `among` some of its attacks (`Scores`)."""
        return self.scores().recovered_transfer(among, model)

    def cost_to_recover(self) -> dict[str, float] | None:
        """Return what the strongest attack on the protected model pays until it is as good as training from scratch.

        Returns:
            Steps, images and (where known) floating-point operations at the first measured point there; None where it
            never gets there.
        """
        scores = self.scores()
        protected, scratch = scores.best("protected"), scores.best("scratch")
        if protected is None or scratch is None:
            return None
        curves = self.curves("protected")[protected.strategy]
        mean = mean_of_finite([curve.test for curve in curves])
        reached = np.flatnonzero(scores.sign * mean >= scores.sign * scratch.mean)
        if not len(reached):
            return None
        step = curves[0].step[int(reached[0])]
        images = step * min(protected.strategy.batch_size, self.facts.get("training_examples", np.inf))
        cost = {"steps": step, "images": images}
        if self.facts.get("flops_per_example"):
            cost["flops"] = images * self.facts["flops_per_example"]
        return cost

    def fine_tunability(self) -> dict[str, float] | None:
        """Return how well each model is fine-tuned: its best attack's mean test metric, for runs on an allowed task.

        Returns:
            "protected", "original" and "scratch", and "difference": protected minus original, so turned that below 0 is
            a loss to the user. None where a model has no finished attack.
        """
        scores, means = self.scores(), {}
        for model in ("protected", "original", "scratch"):
            best = scores.best(model)
            if best is None:
                return None
            means[model] = best.mean
        return means | {"difference": scores.sign * (means["protected"] - means["original"])}

    def to_dataset(self) -> Any:
        """Return one row a measured point, as a `datasets.Dataset`."""
        import datasets

        rows = []
        for run in self.runs:
            if run.curve is not None:
                about = {"model": run.model, "attack": run.strategy.name, "seed": run.seed}
                points = {name: getattr(run.curve, name) for name in ("epoch", "step", "test", "validation", "loss")}
                rows += [about | dict(zip(points, row, strict=True)) for row in zip(*points.values(), strict=True)]
        return datasets.Dataset.from_list(rows)

    def plot(self, path: str | Path = "curves.png") -> Path:
        """Draw the metric per epoch, one panel a start, with the best attack on each model there, as in Fig. 3.

        A kernel regression trains nothing, so it has a panel by itself.
        Where the suite measured every so many steps, the axis shows steps.
        """
        from sophon_hf.attacks.plots import plot_curves  # Who protects a model needs no matplotlib.

        by_step = self.facts.get("measured_every") is not None
        scores, curves = self.scores(), {model: self.curves(model) for model in self.models()}
        starts: dict[str, list[FineTuningStrategy]] = {}
        for strategy in curves.get("protected", {}):
            start = "kernel regression" if strategy.transfer == "kernel" else strategy.name.split(", ")[0]
            starts.setdefault(start, []).append(strategy)
        panels: dict[str, dict[str, tuple]] = {}
        for start, among in starts.items():
            panels[start] = {}
            for model, found in curves.items():
                # Scratch shares no start with the others: every panel shows its best.
                best = scores.best(model, None if model == "scratch" else among)
                if best is not None:
                    shown = found[best.strategy]
                    x = shown[0].step if by_step else shown[0].epoch
                    panels[start][model] = x, [curve.test for curve in shown]
        return plot_curves(panels, Path(path), self.metric, unit="steps" if by_step else "epochs")

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
                    "runs": [run.to_dict() for run in self.runs],
                },
                indent=1,
                allow_nan=False,
            ),
        )

    @classmethod
    def load(cls, path: str | Path) -> AttackResults:
        """Read what `save` wrote.

        Raises:
            ValueError: The file is torn, or something else.
        """
        path = Path(path)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            pictures = {title: path.parent / name for title, name in values.get("pictures", {}).items()}
            for name in ("original_metric", "benign"):
                if values.get(name):
                    values[name] = {n: math.nan if v is None else v for n, v in values[name].items()}
            return cls(**{**values, "runs": [AttackRun.from_dict(run) for run in values["runs"]], "pictures": pictures})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is torn, or holds no results of an attack suite ({error}): run the suite again, which keeps "
                "finished attacks."
            ) from error

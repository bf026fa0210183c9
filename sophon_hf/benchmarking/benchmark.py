"""One call: protect a packaged pair's model, or take a protected one, attack it, and write down what was found."""

from __future__ import annotations

import copy
import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Protocol

import datasets
import torch
from torch import nn
from transformers import PreTrainedModel

from sophon_hf import __version__
from sophon_hf.attacks.results import AttackResults
from sophon_hf.attacks.score import RecoveredTransfer
from sophon_hf.attacks.suite import AttackSuite
from sophon_hf.attacks.sweeps import load_sweep
from sophon_hf.benchmarking import BUDGETS
from sophon_hf.benchmarking.pairs import Pair, load_pair
from sophon_hf.finetuning.strategy import FineTuningStrategy
from sophon_hf.models.loading import load_model
from sophon_hf.protection.config import SophonConfig
from sophon_hf.protection.presets import PRESETS
from sophon_hf.protection.trainer import SophonTrainer
from sophon_hf.utils import hint, process_state, write_atomically


class Defence(Protocol):
    """What can protect a model: any object with this method."""

    def protect(self, model: nn.Module, restricted: datasets.DatasetDict, original: datasets.DatasetDict) -> nn.Module:
        """Return the protected model.

        Args:
            model: The pre-trained model, a copy that may be changed.
            restricted: The defender's half of the restricted domain: splits "train" and "validation".
            original: The original domain: splits "train" and "validation".
        """


@dataclass(frozen=True)
class BenchmarkResult:
    """What a benchmark found.

    Attributes:
        recovered_transfer: The score over all attacks of the budget, at the number of examples where it is worst.
        direct: The same over the attacks that start from the whole model, its head included.
        results: All attacks, at that number of examples.
        record: What is written as JSON.
        path: Where.
    """

    recovered_transfer: RecoveredTransfer
    direct: RecoveredTransfer
    results: AttackResults
    record: dict[str, Any]
    path: Path

    def __str__(self) -> str:
        intact = self.record[f"original_{self.results.metric}"]
        best = {name: sum(b["test"]) / len(b["test"]) for name, b in self.record["best"].items() if b["test"]}
        reached = ", ".join(f"{name} {value:.3f}" for name, value in best.items() if name != "untrained")
        return (
            f"{self.record['pair']}, {self.record['protection']}, {self.record['budget']}, "
            f"{self.record['examples']} examples: recovered transfer {self.recovered_transfer}, direct attacks only "
            f"{self.direct}; best attacks: {reached}; original {self.results.metric} {intact['before']:.3f} before, "
            f"{intact['after']:.3f} after"
        )


def benchmark(
    model: nn.Module | str | Path | Defence,
    pair: str | Pair = "letters",
    budget: str | Path | Sequence[FineTuningStrategy] = "small",
    output_dir: str | Path = "benchmark-output",
    seeds: Sequence[int] | None = None,
    name: str | None = None,
) -> BenchmarkResult:
    """Measure a protection by the fixed protocol of a pair, print the row, and write it as JSON.

    Args:
        model: A protected model of the pair's architecture (itself, its folder or Hub id), or a defence: a preset of
            `SophonConfig` by name, or an object with `protect(model, restricted, original)` (`Defence`), which is given
            the defender's half and the original domain, and no test split.
        pair: The name of a packaged pair (`load_pair`), or a pair of your own.
        budget: "small": the pair's attacks, and some that no preset simulates, at the pair's first number of examples.
            "full": also the sweeps `strong`, `adaptive` and `peft`. Or a sweep, as `AttackSuite` takes it. These run at
            all of the pair's numbers of examples, and the row is about the one at which the protection is worst.
        output_dir: Gets the pre-trained and the protected model, the attacks, and `<pair>-<name>-<budget>.json`. The
            same call again computes only attacks that are missing, and takes what a preset has protected already.
        seeds: The adversary's; the pair's own where None.
        name: What the row calls the protection; the preset's, folder's or class's name where None.

    Raises:
        ValueError: There is no such pair or budget, or the model is not of the pair's architecture.
        TypeError: What was given is neither a model nor a defence, or the defence returned no model.
    """
    pair = load_pair(pair) if isinstance(pair, str) else pair
    title, strategies = _attacks(pair, budget)
    name = _name(model) if name is None else name
    if not name or Path(name).name != name:
        raise ValueError(f"name is {name!r}, but names a file: leave out slashes.")
    output_dir, is_main = Path(output_dir), process_state().is_main_process
    # A model that cannot be loaded is told before the pair's own is pre-trained.
    given = _load(model)
    original = _pretrained(pair, output_dir / "pretrained" / pair.name)
    start = time.time()
    protected, run = (
        (given, {})
        if given is not None
        else _protect(model, pair, original, output_dir / "protected" / f"{pair.name}-{name}")
    )
    run["seconds"] = round(time.time() - start)
    start = time.time()
    found = {
        examples: attack(
            pair, strategies, output_dir / "attacks", seeds, examples=examples, protected=protected, original=original
        )
        for examples in (pair.examples[:1] if title == "small" else pair.examples)
    }
    transfers = {examples: results.recovered_transfer() for examples, results in found.items()}
    # The worst case is what counts; where all are void, the first says why.
    values = {e: t.value for e, t in transfers.items() if t.value is not None}
    worst = max(values, key=values.__getitem__) if values else pair.examples[0]
    results = found[worst]
    record = {
        "pair": pair.name,
        "protection": name,
        "budget": title,
        "examples": worst,
        "seeds": results.facts["seeds"],
        **to_record(results),
        "by_examples": {examples: vars(transfer) for examples, transfer in transfers.items()},
        "protection_run": run,
        "attack_seconds": round(time.time() - start),
        "date": date.today().isoformat(),
        "machine": machine(),
        "data": results.facts["data"],
        "versions": {"sophon_hf": __version__, **results.facts["versions"]},
    }
    path = output_dir / f"{pair.name}-{name}-{title}.json"
    direct = RecoveredTransfer(**record["recovered_transfer_direct"])
    result = BenchmarkResult(transfers[worst], direct, results, record, path)
    if is_main:
        write_atomically(path, json.dumps(record, indent=1))
        print(result)
    return result


def attack(
    pair: Pair,
    sweep: str | Path | Sequence[FineTuningStrategy],
    folder: Path,
    seeds: Sequence[int] | None = None,
    *,
    protected: nn.Module,
    original: nn.Module,
    examples: int | None = None,
    baselines: dict[str, nn.Module] | None = None,
) -> AttackResults:
    """Attack models of a pair; what is finished in the folder already is read.

    Args:
        pair: Whose data the adversary has.
        sweep: As of `AttackSuite`.
        folder: Keeps every finished run.
        seeds: The adversary's; the pair's where None.
        protected: The protected model.
        original: The same before.
        examples: The adversary's; the pair's first number where None.
        baselines: Further models, by name.
    """
    suite = AttackSuite(
        sweep,
        folder,
        seeds=pair.seeds if seeds is None else seeds,
        epochs=pair.epochs,
        measured_epochs=(0, pair.epochs / 2, pair.epochs),
        examples=pair.examples[0] if examples is None else examples,
    )
    warm_up = any(strategy.needs_original_data for strategy in suite.strategies)
    return suite.run(
        protected=protected,
        original=original,
        baselines=baselines,
        restricted_dataset=pair.adversary,
        eval_dataset=pair.test,
        original_dataset=pair.original["train"] if warm_up else None,
        original_eval_dataset=pair.original["test"],
    )


def protect_by_preset(preset: str, pair: Pair, model: nn.Module, folder: Path, **fields: Any) -> SophonTrainer:
    """Protect a pair's model by a preset of `SophonConfig`, and save it.

    Args:
        preset: Its name.
        pair: Gives the data, and what the preset is given on it.
        model: Pre-trained; it is changed.
        folder: Gets the protected model.
        fields: Further ones of `SophonConfig`, which win.
    """
    fields = {
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": not torch.accelerator.is_available(),
        **pair.presets.get(preset, {}),
        **fields,
    }
    config = SophonConfig.preset(preset, output_dir=str(folder), **fields)
    validation = {"original": pair.original["validation"], "restricted": pair.defender["validation"]}
    trainer = SophonTrainer(model, pair.defender["train"], pair.original["train"], config, eval_dataset=validation)
    trainer.train()
    trainer.save_model()
    return trainer


def to_record(results: AttackResults) -> dict[str, Any]:
    """Return what a record says of the attacks: scores, the best attack on each model, and a table of all of them.

    The table has one row an attack: on each model the mean and SD of its final test metric.
    """
    names = {"original": "before", "protected": "after"}
    rows: dict[FineTuningStrategy, dict[str, Any]] = {}
    for model in results.models():
        for strategy, curves in results.curves(model).items():
            final = torch.tensor([curve.test[-1] for curve in curves])
            row = rows.setdefault(strategy, {"attack": strategy.name, "start": strategy.initialization})
            row[model] = [round(float(final.mean()), 4), round(float(final.std()), 4) if len(final) > 1 else 0.0]
    direct = [strategy for strategy in results.curves("protected") if strategy.initialization == "direct"]
    best = {model: summary for model in results.models() if (summary := results.best(model)) is not None}
    return {
        "metric": results.metric,
        f"original_{results.metric}": {names.get(m, m): value for m, value in results.original_metric.items()},
        "best": {
            m: {"strategy": b.name, "epoch": b.epoch, "validation": b.validation, "test": b.finite}
            for m, b in best.items()
        },
        "recovered_transfer": vars(results.recovered_transfer()),
        "recovered_transfer_direct": vars(results.recovered_transfer(direct)),
        "recovered_by_original_data": vars(results.recovered_transfer(model="untrained")),
        "table": list(rows.values()),
    }


def machine() -> str:
    """Return what this runs on, as a record says it."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} threads"
    return f"{platform.machine()}, {device}"


def _attacks(pair: Pair, budget: str | Path | Sequence[FineTuningStrategy]) -> tuple[str, list[FineTuningStrategy]]:
    """Return what a budget is called in the record, and its attacks."""
    if not isinstance(budget, (str, Path)):
        return "custom", list(budget)
    if str(budget) not in BUDGETS:
        return Path(budget).stem, load_sweep(budget)
    size = pair.attacks[0].batch_size
    small = [
        *pair.attacks,
        # What no preset simulates: it would otherwise be asked only what it was made to answer.
        FineTuningStrategy("new_head", transfer="norm", learning_rate=3e-3, batch_size=size),
        FineTuningStrategy("new_head", head_first=0.5, learning_rate=3e-3, batch_size=size),
    ]
    sweeps = ("strong", "adaptive", "peft") if str(budget) == "full" else ()
    return str(budget), list(dict.fromkeys([*small, *(s for sweep in sweeps for s in load_sweep(sweep))]))


def _name(model: nn.Module | str | Path | Defence) -> str:
    if isinstance(model, (str, Path)):
        return Path(model).resolve().name
    return str(getattr(model, "name", None) or type(model).__name__)


def _load(model: nn.Module | str | Path | Defence) -> nn.Module | None:
    """Return the protected model that was given, or None where a defence was."""
    if isinstance(model, nn.Module):
        return load_model(model)
    if not isinstance(model, (str, Path)):
        if not callable(getattr(model, "protect", None)):
            raise TypeError(f"{type(model).__name__} is neither a model nor a defence: a defence has `protect`.")
        return None
    if str(model) in PRESETS:
        return None
    if not Path(model).is_dir() and str(model).count("/") != 1:
        choices = f" The presets are {', '.join(PRESETS)}."
        raise ValueError(
            f"{str(model)!r} is no preset, no folder, and no Hub id ('owner/name').{hint(model, PRESETS, choices)}"
        )
    return load_model(model)


def _pretrained(pair: Pair, folder: Path) -> nn.Module:
    """Return the pair's pre-trained model, from the folder where it is there already."""
    state = process_state()
    if state.is_main_process and not (folder / "model.safetensors").exists():
        beside = folder.with_name(f".{folder.name}")
        pair.pretrained().save_pretrained(beside)
        # Whole or not at all: an interrupted save would be read as a model.
        os.replace(beside, folder)
    state.wait_for_everyone()
    return load_model(folder)


def _protect(model: Any, pair: Pair, original: nn.Module, folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Return the protected model, and what there is to say of how it was made; it is saved in the folder."""
    victim = copy.deepcopy(original)
    if isinstance(model, (str, Path)):
        done = folder / "protection.json"
        asked = json.loads(json.dumps({"preset": str(model), **pair.presets.get(str(model), {})}))
        if not done.exists():
            guard = protect_by_preset(str(model), pair, victim, folder).guard
            failure = guard.failure if guard.state.best_step is None else None
            made = {"config": asked, "best_step": guard.state.best_step, "failure": failure}
            if process_state().is_main_process:
                write_atomically(done, json.dumps(made, indent=1))
            process_state().wait_for_everyone()
        run = json.loads(done.read_text(encoding="utf-8"))
        if run["config"] != asked:
            raise ValueError(f"{folder} was protected with {run['config']}, not {asked}: choose another `name`.")
        return load_model(folder), run
    # Copies, so that no defence can reach a test split through them.
    seen = [
        datasets.DatasetDict({n: part[n] for n in ("train", "validation")}) for part in (pair.defender, pair.original)
    ]
    protected: Any = model.protect(victim, *seen)
    if not isinstance(protected, PreTrainedModel):
        raise TypeError(
            f"{type(model).__name__}.protect returned {type(protected).__name__}, but must return the protected model."
        )
    if process_state().is_main_process:
        protected.save_pretrained(folder)
    return protected, {}

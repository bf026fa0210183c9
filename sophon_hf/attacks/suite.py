"""The attack suite: every attack of a sweep on the protected model, the original one, and from scratch."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import nn
from tqdm.auto import tqdm

from sophon_hf.attacks.budget import Budget, check_disjoint, check_same_architecture, flops_per_example, head_fits
from sophon_hf.attacks.cache import cell_keys
from sophon_hf.attacks.pictures import draw_denoised
from sophon_hf.attacks.results import UNTRAINED, AttackResults, AttackRun
from sophon_hf.attacks.run import EVALUATION_BATCH, PAPER_EPOCHS, measured_epochs, run_attacks
from sophon_hf.attacks.sweeps import load_sweep, scratch, warming_up
from sophon_hf.data.domain import Domain, Source, build_domain, load_domain
from sophon_hf.data.fingerprint import fingerprint_domain
from sophon_hf.data.labels import split_domain
from sophon_hf.data.preprocessing import ModelInputs
from sophon_hf.finetuning.preparations import untrained_copy
from sophon_hf.finetuning.strategy import USUAL_EPOCHS, FineTuningStrategy, NotApplicableError
from sophon_hf.models.loading import hash_state, load_model, load_processor, refuse_half_precision
from sophon_hf.tasks.base import Task, infer_task, load_task
from sophon_hf.tasks.evaluation import evaluate_model
from sophon_hf.utils import write_atomically

logger = logging.getLogger(__name__)

VALIDATION_SHARE = 0.1


class AttackSuite:
    """Finds the strongest attack of a sweep.

    Args:
        sweep: The name of a sweep, a JSON or YAML file with a list of strategies, or the strategies themselves.
        output_dir: Each finished cell is a file there, so a second run computes what is missing only.
        seeds: Seeds of every attack.
        epochs: Length of an ordinary attack, in passes over the adversary's data; a strategy that is longer than the
            usual 20 keeps its proportion, and one that sets its `steps` keeps them. The strategies' own where None.
        measured_epochs: When test and validation metrics are taken; of an attack that is longer than the usual 20 epochs
            also at every tenth of its length beyond them.
        measured_every: Take them every so many optimizer steps instead, to see the first steps of an attack.
        stack_seeds: Train the seeds of an attack together, as one stack, which gives the same within rounding; for models so
            small that one leaves the device idle. On a CPU it is slower. What cannot be stacked runs seed by seed, and
            says so.
        examples: How many of the adversary's examples it uses, stratified; all where None, or, with a warning, where there
            are fewer.
        task: What is learned, where it cannot be inferred. That of a pipeline by its id or folder has its noise scheduler.
        processing_class: Image processor, tokenizer or feature extractor, for raw columns. Left out, it is what is saved
            with the original model, or else the protected one, where that is an id or a folder; modules bring none.
        input_columns: {"original": ..., "restricted": ..., "benign": ...}: the raw input column, where it is not found by itself.
        label_columns: The same for the label column.
    """

    def __init__(
        self,
        sweep: str | Path | Sequence[FineTuningStrategy] = "strong",
        output_dir: str | Path = "attacks",
        *,
        seeds: Sequence[int] = (0, 1, 2),
        epochs: float | None = None,
        measured_epochs: Sequence[float] = PAPER_EPOCHS,
        measured_every: int | None = None,
        stack_seeds: bool = False,
        examples: int | None = None,
        task: Task | None = None,
        processing_class: Any | None = None,
        input_columns: dict[str, str | None] | None = None,
        label_columns: dict[str, str | None] | None = None,
    ):
        strategies = load_sweep(sweep) if isinstance(sweep, (str, Path)) else list(sweep)
        if not strategies:
            raise ValueError("The sweep is empty: name at least one strategy.")
        if epochs is not None:
            strategies = [
                s.with_changes(epochs=epochs * s.epochs / USUAL_EPOCHS) if s.steps is None else s for s in strategies
            ]
        if not seeds or len(set(seeds)) != len(seeds):
            raise ValueError(f"seeds are {list(seeds)}: give at least one, each once.")
        if measured_every is not None and measured_every < 1:
            raise ValueError(f"measured_every is {measured_every}, but must be a number of steps, 1 or more.")
        if examples is not None and examples < 1:
            raise ValueError(f"examples is {examples}, but must be 1 or more; leave it out for all.")
        strategies = list(dict.fromkeys(strategies))
        self.name = str(sweep) if isinstance(sweep, (str, Path)) else "custom"
        self.strategies, self.seeds, self.measured_epochs = strategies, list(seeds), list(measured_epochs)
        self.measured_every, self.stack_seeds = measured_every, stack_seeds
        self.output_dir, self.examples, self.task = Path(output_dir), examples, task
        self.processing_class = processing_class
        self.input_columns, self.label_columns = input_columns or {}, label_columns or {}

    def run(
        self,
        *,
        protected: nn.Module | str,
        original: nn.Module | str,
        restricted_dataset: Source,
        eval_dataset: Source,
        validation_dataset: Source | None = None,
        original_dataset: Source | None = None,
        original_eval_dataset: Source | None = None,
        baselines: dict[str, nn.Module] | None = None,
        benign_dataset: Source | None = None,
        benign_eval_dataset: Source | None = None,
    ) -> AttackResults:
        """Run what is missing and return all results. All models are put on the device of the process.

        Args:
            protected: The protected model, or its Hub id or folder.
            original: The same model before protection.
            restricted_dataset: The adversary's data, which the defender never saw (`split_domain`).
            eval_dataset: The restricted domain's test split; it reports and never chooses.
            validation_dataset: What attacks are chosen by; a tenth of the adversary's data where left out.
            original_dataset: Data of the original domain that the adversary may warm up on; attacks that need it are
                recorded as not applicable where it is left out. An untrained model warms up on them, too, which tells what they
                are worth by themselves ("untrained" in the results).
            original_eval_dataset: The original domain's test split, to tell whether the protected model still works.
            baselines: Further models to attack, by name (an NTL model, say).
            benign_dataset: An allowed task: the same sweep at the same budget tells what the protection costs an honest
                user (`results.benign`).
            benign_eval_dataset: Its test split.

        Raises:
            ValueError: Models of different architecture or in half precision, a baseline with a name of the suite's own,
                overlapping data, or missing labels.
        """
        if (benign_dataset is None) != (benign_eval_dataset is None):
            raise ValueError("benign_dataset and benign_eval_dataset go together: give both or neither.")
        if taken := {"protected", "original", "scratch", UNTRAINED} & set(baselines or {}):
            raise ValueError(f"baselines has {sorted(taken)}, which are names of the suite's own: give others.")
        given = {"protected": protected, "original": original, **(baselines or {})}
        models = {name: _load(model) for name, model in given.items()}
        for name, model in models.items():
            refuse_half_precision(model, name)
        check_same_architecture(models)
        task, processor = self._task_and_processor(models["original"], original, protected)
        needs = task.inputs(models["original"])
        budget = self._budget(needs, processor, restricted_dataset, eval_dataset, validation_dataset)
        if original_dataset is not None:
            budget.original = self._domain(needs, processor, load_domain(original_dataset), "original")
        original_metric = {}
        if original_eval_dataset is not None:
            test = self._domain(needs, processor, load_domain(original_eval_dataset, "test"), "original")
            if not head_fits(task, models["original"], test):
                raise ValueError(
                    f"The original domain's test split has {test.num_classes} classes, more than the model's head has "
                    "outputs: select the classes that the model knows, in its order (`select_classes`)."
                )
            budget.original_test = test
            original_metric = {n: evaluate_model(task, m, test, EVALUATION_BATCH).metric for n, m in models.items()}
            for name, model in models.items():
                draw_denoised(task, model, test, self.output_dir / f"original-{name}.png")
        check_disjoint(budget)
        if benign_dataset is not None:
            benign = self._benign_suite()
            allowed = benign._budget(needs, processor, benign_dataset, benign_eval_dataset, None)
            check_disjoint(allowed)
        results = self._attack(task, models, budget, original_metric)
        if benign_dataset is not None:
            pair = {name: models[name] for name in ("protected", "original")}
            results.benign = benign._attack(task, pair, allowed, {}).fine_tunability()
            results.save(self.output_dir / "results.json")
        return results

    def _attack(
        self, task: Task, models: dict[str, nn.Module], budget: Budget, original_metric: dict[str, float]
    ) -> AttackResults:
        """Compute the cells that are missing, and save all results."""
        cells = self._cells(models, budget)
        weights = {name: hash_state(model) for name, model in models.items()}
        keys = cell_keys(cells, task, models, weights, budget, lambda strategy: self._measured(strategy, budget))
        found = [self._read(key, cell) for key, cell in zip(keys, cells, strict=True)]
        # A cell that failed is tried again; one that is not applicable stays so.
        missing = [i for i, cell in enumerate(found) if cell is None or cell.failed]
        self._compute(task, models, budget, [(keys[i], cells[i]) for i in missing])
        for i in missing:
            found[i] = self._read(keys[i], cells[i]) or cells[i]
        facts = self._facts(task, models, weights, budget)
        results = AttackResults(found, task.metric, task.greater_is_better, len(budget.test), original_metric, facts)
        results.pictures = self._pictures(results, keys)
        results.save(self.output_dir / "results.json")
        return results

    def _benign_suite(self) -> AttackSuite:
        suite = copy.copy(self)
        suite.output_dir = self.output_dir / "benign"
        suite.input_columns, suite.label_columns = (
            {"restricted": columns.get("benign")} for columns in (self.input_columns, self.label_columns)
        )
        return suite

    def _task_and_processor(self, model: nn.Module, *given: nn.Module | str) -> tuple[Task, Any | None]:
        """The suite's own; else what is saved with the first of the given models that is an id or a folder."""
        task, processor = self.task, self.processing_class
        source = next((m for m in given if not isinstance(m, nn.Module)), None)
        if task is None:
            task = infer_task(model) if source is None else load_task(source, model)
        if processor is None and source is not None:
            processor = load_processor(source, model)
        return task, processor

    def _budget(self, needs: ModelInputs, processor: Any | None, restricted, test, validation) -> Budget:
        dataset, label, carved = load_domain(restricted), self.label_columns.get("restricted"), validation is None
        if carved:
            validation, dataset = split_domain(dataset, share=VALIDATION_SHARE, column=label)
        if self.examples is not None and self.examples < len(dataset):
            dataset, _ = split_domain(dataset, share=(self.examples + 0.5) / len(dataset), column=label)
        elif self.examples is not None and self.examples > len(dataset):
            logger.warning(
                "%d examples were asked for, but the adversary has %d%s: it uses them all.", self.examples, len(dataset),
                " beside those for validation" if carved else "",
            )  # fmt: skip
        training, held_out, test = (
            self._domain(needs, processor, part, "restricted")
            for part in (dataset, load_domain(validation, "validation"), load_domain(test, "test"))
        )
        if carved:
            # Data that hold an example twice would otherwise have it on both sides.
            raw = training.transformed
            seen, hashes = set(training.example_hashes(raw)), held_out.example_hashes(raw)
            kept = [i for i, digest in enumerate(hashes) if digest not in seen]
            if not kept:
                raise ValueError("Every validation example is a training example too: give a validation_dataset.")
            if len(kept) < len(hashes):
                held_out = self._domain(needs, processor, validation.select(kept), "restricted")
        return Budget(training, held_out, test)

    def _domain(self, needs: ModelInputs, processor: Any | None, dataset: datasets.Dataset, name: str) -> Domain:
        return build_domain(
            dataset, needs, processor, name=name, input_column=self.input_columns.get(name),
            label=self.label_columns.get(name),
        )  # fmt: skip

    def _cells(self, models: dict[str, nn.Module], budget: Budget) -> list[AttackRun]:
        warm_ups = [] if budget.original is None else warming_up(self.strategies)
        by_model = {name: self.strategies for name in models}
        by_model |= {"scratch": scratch(self.strategies), UNTRAINED: warm_ups}
        return [AttackRun(name, s, seed) for seed in self.seeds for name, sweep in by_model.items() for s in sweep]

    def _measured(self, strategy: FineTuningStrategy, budget: Budget) -> list[float] | str:
        if self.measured_every is not None:
            return f"every {self.measured_every} steps"
        return measured_epochs(strategy, len(budget.training), self.measured_epochs)

    def _read(self, key: str, cell: AttackRun) -> AttackRun | None:
        path = self.output_dir / "cells" / f"{key}.json"
        if not path.exists():
            return None
        try:
            # Models of equal weights share a file, so its name for the model may be the other one's. The strategy is equal;
            # one object of it for all cells is what a sweep of thousands has room for.
            read = AttackRun.from_dict(json.loads(path.read_text(encoding="utf-8")))
            return replace(read, model=cell.model, strategy=cell.strategy)
        except (ValueError, KeyError, TypeError):
            logger.warning("%s is torn or not a result: it is computed again.", path)
            return None

    def _compute(
        self, task: Task, models: dict[str, nn.Module], budget: Budget, missing: list[tuple[str, AttackRun]]
    ) -> None:
        state = process_state()
        # All must have listed what is missing before the first one writes, or their shares would not add up.
        state.wait_for_everyone()
        groups: dict[tuple, list[tuple[str, AttackRun]]] = {}
        for key, cell in missing:
            seed = None if self.stack_seeds and cell.model != UNTRAINED else cell.seed
            groups.setdefault((cell.model, cell.strategy, seed), []).append((key, cell))
        mine = list(groups.values())[state.process_index :: state.num_processes]
        steps = sum(cell.strategy.total_steps(len(budget.training)) for group in mine for _, cell in group)
        with tqdm(total=steps, desc="attacking", unit="step", disable=not state.is_main_process or not mine) as bar:
            for number, group in enumerate(mine, 1):
                cells = [cell for _, cell in group]
                bar.set_postfix_str(f"attack {number}/{len(mine)}: {cells[0].model}, {cells[0].strategy.name}")
                victim = models["original" if cells[0].model in ("scratch", UNTRAINED) else cells[0].model]
                pictures = {cell.seed: self._picture(key) for key, cell in group}
                self._run_cells(task, victim, budget, cells, pictures, bar.update)
                for key, cell in group:
                    write_atomically(self.output_dir / "cells" / f"{key}.json", json.dumps(cell.to_dict()))
        state.wait_for_everyone()

    def _run_cells(
        self,
        task: Task,
        victim: nn.Module,
        budget: Budget,
        cells: Sequence[AttackRun],
        pictures: dict[int, Path],
        progress: Callable[[int], Any],
    ) -> None:
        """Run the cells of one attack on one model, which differ in the seed."""
        strategy, seeds = cells[0].strategy, [cell.seed for cell in cells]
        try:
            if strategy.needs_original_head and not head_fits(task, victim, budget.training):
                raise NotApplicableError(
                    f"the head has fewer outputs than the {budget.training.num_classes} restricted classes"
                )
            if cells[0].model == UNTRAINED:
                victim = untrained_copy(victim, task, budget.training, cells[0].seed)
            curves = run_attacks(
                victim, task, strategy, budget.training, budget.test, seeds=seeds, validation=budget.validation,
                original=budget.original, epochs=self.measured_epochs, every=self.measured_every,
                after_step=lambda *_: progress(len(cells)),
                at_end=lambda seed, model: draw_denoised(task, model, budget.test, pictures[seed]),
            )  # fmt: skip
            for cell, curve in zip(cells, curves, strict=True):
                cell.curve = curve
        except NotApplicableError as reason:
            for cell in cells:
                cell.error, cell.applicable = str(reason), False
        except Exception as error:
            if len(cells) > 1:
                logger.warning("The seeds of %s on %s run one by one: %s", strategy.name, cells[0].model, error)
                for cell in cells:
                    self._run_cells(task, victim, budget, [cell], pictures, progress)
                return
            cells[0].error = f"{type(error).__name__}: {error}"
            logger.warning("%s on %s failed and is recorded: %s", strategy.name, cells[0].model, cells[0].error)

    def _picture(self, key: str) -> Path:
        return self.output_dir / "cells" / f"{key}.png"

    def _pictures(self, results: AttackResults, keys: list[str]) -> dict[str, Path]:
        """Of each model: the restricted domain after its best attack with the first seed, and the original domain."""
        pictures = {}
        for model in dict.fromkeys(cell.model for cell in results.cells):
            best = results.best(model)
            for key, cell in zip(keys, results.cells, strict=True):
                if best and (cell.model, cell.strategy, cell.seed) == (model, best.strategy, self.seeds[0]):
                    pictures[f"restricted domain, {model} after its best attack"] = self._picture(key)
        for model in results.original_metric:
            pictures[f"original domain, {model}"] = self.output_dir / f"original-{model}.png"
        return {title: path for title, path in pictures.items() if path.exists()}

    def plan(self, examples: int, models: int = 2, benign_examples: int | None = None) -> dict[str, int]:
        """What `run` would do at most: cells, optimizer steps and images.

        Args:
            examples: The adversary's training examples.
            models: How many are attacked, the protected and the original one among them.
            benign_examples: Those of the allowed task, where there is one.
        """
        seeds, from_scratch = len(self.seeds), scratch(self.strategies)
        attacks = [(s, examples) for s in [*self.strategies * models, *from_scratch, *warming_up(self.strategies)]]
        if benign_examples is not None:
            attacks += [(s, benign_examples) for s in [*self.strategies * 2, *from_scratch]]
        steps = [s.total_steps(count) for s, count in attacks]
        images = [n * min(s.batch_size, count) for n, (s, count) in zip(steps, attacks, strict=True)]
        return {"cells": seeds * len(attacks), "steps": seeds * sum(steps), "images": seeds * sum(images)}

    def _facts(
        self, task: Task, models: dict[str, nn.Module], weights: dict[str, str], budget: Budget
    ) -> dict[str, Any]:
        packages = ("torch", "transformers", "diffusers", "datasets", "peft")
        return {
            "sweep": self.name,
            "seeds": self.seeds,
            "measured_every": self.measured_every,
            "flops_per_example": flops_per_example(task, models["original"], budget.training),
            "training_examples": len(budget.training),
            "validation_examples": len(budget.validation),
            "weights": weights,
            "data": {n: getattr(budget, n).fingerprint for n in ("training", "validation", "test")},
            "fingerprints": {n: asdict(fingerprint_domain(d)) for n, d in vars(budget).items() if d is not None},
            "versions": {package: version(package) for package in packages},
        }


def _load(model: nn.Module | str) -> nn.Module:
    model = model if isinstance(model, nn.Module) else load_model(model)
    return model.to(process_state().device)


def process_state() -> Any:
    """accelerate's `PartialState`: which process this is, of how many, and its device."""
    from accelerate import PartialState

    # Else accelerate would start every process of a machine without a GPU on its own.
    return PartialState(cpu=not torch.accelerator.is_available())

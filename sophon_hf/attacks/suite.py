"""The attack suite: every attack of a sweep on the protected model, the original one, and from scratch."""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date
from functools import partial
from importlib.metadata import version
from operator import index
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from sophon_hf.attacks.adversary import (
    AdversaryData,
    AdversaryDomains,
    check_same_architecture,
    flops_per_example,
    head_fits,
)
from sophon_hf.attacks.cache import run_keys
from sophon_hf.attacks.plots import draw_denoised
from sophon_hf.attacks.results import AttackResults
from sophon_hf.attacks.run import EVALUATION_BATCH, PAPER_EPOCHS, AttackRun, in_bf16, measured_points, run_attack
from sophon_hf.attacks.score import UNTRAINED
from sophon_hf.attacks.search import TRIALS, Search, next_round, write_sweep
from sophon_hf.attacks.sweeps import load_sweep, of_original_data, scratch
from sophon_hf.attacks.trial import try_kinds
from sophon_hf.data.loading import Source
from sophon_hf.data.preprocessing import InputColumn
from sophon_hf.finetuning.preparations import untrained_copy
from sophon_hf.finetuning.strategy import USUAL_EPOCHS, FineTuningStrategy, NotApplicableError
from sophon_hf.models.loading import agree_on_padding, hash_state, load_model, load_processor, refuse_weights
from sophon_hf.tasks.base import Task, infer_task, load_task
from sophon_hf.tasks.evaluation import evaluate_model, first_rows, try_domain
from sophon_hf.tasks.metrics import MetricSource, refuse_two_metrics
from sophon_hf.utils import check_choice, has_bf16, process_state, refuse_unwritable, write_atomically

logger = logging.getLogger(__name__)


class AttackSuite:
    """Find the strongest attack of a sweep.

    Args:
        sweep: The name of a sweep, a file of strategies, or these themselves; "search" goes on by Optuna.
        output_dir: Each finished run is a file there, so a second run computes what is missing only.
        trials: How many strategies the sweep "search" tries on each model; 40 where None.
        seeds: Seeds of every attack.
        epochs: Length of an ordinary attack, in passes over the adversary's data; a strategy that is longer than the
            usual 20 keeps its proportion, and one that sets its `steps` keeps them. The strategies' own where None.
        measured_epochs: When test and validation metrics are taken; of an attack that is longer than the usual 20
            epochs also at every tenth of its length beyond them.
        measured_every: Take them every so many optimizer steps instead, to see the first steps of an attack.
        examples: How many of the adversary's examples it uses, stratified; all where None, or, with a warning, where
            there are fewer.
        bf16: Whether all models are attacked in mixed precision, which is faster where the processor has it: weights
            stay float32. The original metric is measured in full precision.
        task: What is learned, where it cannot be inferred. The task of a pipeline (an id or a folder) has the
            pipeline's noise scheduler.
        metric: What attacks are chosen and reported by, as `load_metric` takes it; ACC-k, MSE-k or the task's by
            default. It has to be the claim's where the report is published.
        processing_class: Image processor, tokenizer or feature extractor, for raw columns. Left out, it is what is
            saved with the original model, or else the protected one, where that is an id or a folder.
        input_columns: The raw input column by domain ("original", "restricted", "benign"), where it is not found by
            itself, or two columns of text.
        label_columns: The same for the label column.
    """

    def __init__(
        self,
        sweep: str | Path | Sequence[FineTuningStrategy] = "strong",
        output_dir: str | Path = "attacks",
        *,
        trials: int | None = None,
        seeds: Sequence[int] = (0, 1, 2),
        epochs: float | None = None,
        measured_epochs: Sequence[float] = PAPER_EPOCHS,
        measured_every: int | None = None,
        examples: int | None = None,
        bf16: bool = False,
        task: Task | None = None,
        metric: MetricSource | None = None,
        processing_class: Any | None = None,
        input_columns: Mapping[str, InputColumn] | None = None,
        label_columns: Mapping[str, str | None] | None = None,
    ):
        strategies = load_sweep(sweep) if isinstance(sweep, (str, Path)) else list(sweep)
        if wrong := [entry for entry in strategies if not isinstance(entry, FineTuningStrategy)]:
            raise TypeError(f"The sweep holds {wrong[0]!r}: give FineTuningStrategy objects (or a file of mappings).")
        if not strategies:
            raise ValueError("The sweep is empty: name at least one strategy.")
        if epochs is not None:
            share = float(epochs) / USUAL_EPOCHS
            strategies = [s.with_changes(epochs=share * s.epochs) if s.steps is None else s for s in strategies]
        try:
            seeds, measured_epochs = [index(seed) for seed in seeds], [float(epoch) for epoch in measured_epochs]
        except TypeError as error:
            told = f"seeds are {seeds!r} and measured_epochs {measured_epochs!r}"
            raise TypeError(f"{told}: give lists of numbers, and whole ones as seeds.") from error
        if not seeds or len(set(seeds)) != len(seeds):
            raise ValueError(f"seeds are {seeds}: give at least one, each once.")
        for name, number in (("measured_every", measured_every), ("examples", examples), ("trials", trials)):
            if number is not None and (not isinstance(number, int) or number < 1):
                raise ValueError(f"{name} is {number!r}, but must be a whole number of 1 or more, or left out.")
        for name, named in (("input_columns", input_columns), ("label_columns", label_columns)):
            for domain in named or ():
                check_choice(domain, ("original", "restricted", "benign"), f"A domain in {name}")
        if wrong_epochs := [epoch for epoch in measured_epochs if not 0 <= epoch < math.inf]:
            raise ValueError(f"measured_epochs has {wrong_epochs[0]}, but an epoch is finite and not below 0.")
        if bf16 and not has_bf16():
            raise ValueError(f"bf16 is True, but this {process_state().device.type} has no bfloat16: leave it out.")
        refuse_two_metrics(task, metric)
        refuse_unwritable(output_dir)
        strategies = list(dict.fromkeys(strategies))
        searches = str(sweep) == "search"
        if trials is not None and not searches:
            raise ValueError(f'trials is {trials}, but only the sweep "search" has trials: leave it out.')
        self.trials = (TRIALS if trials is None else trials) if searches else 0
        if searches and self.trials <= len(strategies):
            raise ValueError(f"trials is {trials}, but a search begins with {len(strategies)} strategies: give more.")
        self.epochs = USUAL_EPOCHS if epochs is None else epochs
        self.name = str(sweep) if isinstance(sweep, (str, Path)) else "custom"
        self.strategies, self.seeds, self.measured_epochs = strategies, seeds, measured_epochs
        self.measured_every, self.processing_class = measured_every, processing_class
        self.output_dir, self.examples, self.task, self.metric = Path(output_dir), examples, task, metric
        self.input_columns, self.label_columns, self.bf16 = input_columns or {}, label_columns or {}, bf16

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
            validation_dataset: What attacks are chosen by; as in `AdversaryData` where left out.
            original_dataset: Data of the original domain that the adversary may warm up on; attacks that need it are
                recorded as not applicable where it is left out. An untrained model warms up on them, too, which tells
                what they are worth by themselves ("untrained" in the results).
            original_eval_dataset: The original domain's test split, to tell whether the protected model still works.
            baselines: Further models to attack, by name (an NTL model, say).
            benign_dataset: An allowed task: the same sweep at the same budget tells what the protection costs an honest
                user (`results.benign`).
            benign_eval_dataset: Its test split.

        Raises:
            ValueError: Models of different architecture, in half precision or not finite, a baseline with a name of the
                suite's own, overlapping data, or missing labels.
        """
        if (benign_dataset is None) != (benign_eval_dataset is None):
            raise ValueError("benign_dataset and benign_eval_dataset go together: give both or neither.")
        if taken := {"protected", "original", "scratch", UNTRAINED} & set(baselines or {}):
            raise ValueError(f"baselines has {sorted(taken)}, which are names of the suite's own: give others.")
        given = {"protected": protected, "original": original, **(baselines or {})}
        models = {name: load_model(model).to(process_state().device) for name, model in given.items()}
        for name, model in models.items():
            refuse_weights(model, name)
        check_same_architecture(models)
        task, processor = self._task_and_processor(models["original"], original, protected)
        for model in models.values():
            agree_on_padding(model, processor)
        needs = task.inputs(models["original"])
        data = self._data(restricted_dataset, eval_dataset, validation_dataset, original_dataset, original_eval_dataset)
        domains = data.build(needs, processor)
        for part in domains.given().values():
            try_domain(task, models["original"], part.name, part)
        device = next(models["original"].parameters()).device
        has_head = task.structure(models["original"], first_rows(task, domains.training, device)).outputs is not None
        for domain in (domains.original, domains.original_test):
            if domain is None or domain.labels is None or not has_head:
                continue
            if not head_fits(task, models["original"], domain):
                raise ValueError(
                    f"The original domain has {domain.num_classes} classes with labels up to {domain.labels.max()}, "
                    "for which the model's head has too few outputs: select the classes that the model knows, in its "
                    "order (`select_classes`)."
                )
        domains.check_disjoint()
        if benign_dataset is not None and benign_eval_dataset is not None:
            benign = self._benign_suite()
            allowed = benign._data(benign_dataset, benign_eval_dataset).build(needs, processor)
            allowed.check_disjoint()
        original_metric = {}
        if domains.original_test is not None:
            for name, model in models.items():
                found = evaluate_model(task, model, domains.original_test, EVALUATION_BATCH)
                original_metric[name] = found.metric
                draw_denoised(task, domains.original_test, self.output_dir / f"original-{name}.png", model)
        results = self._attack(task, models, domains, original_metric)
        results.facts["models"] = {name: _name(model) for name, model in given.items()}
        results.facts["date"] = date.today().isoformat()
        results.save(self.output_dir / "results.json")
        if benign_dataset is not None:
            pair = {name: models[name] for name in ("protected", "original")}
            results.benign = benign._attack(task, pair, allowed, {}).fine_tunability()
            results.save(self.output_dir / "results.json")
        return results

    def _attack(
        self, task: Task, models: dict[str, nn.Module], data: AdversaryDomains, original_metric: dict[str, float]
    ) -> AttackResults:
        """Compute the runs that are missing, and save all results."""
        weights = {name: hash_state(model) for name, model in models.items()}
        # Before the work, which a mistake in this bookkeeping would cost.
        facts: dict[str, Any] = {"trials": self.trials, "weights": weights, **data.facts(task)}
        facts |= {"sweep": self.name, "seeds": self.seeds, "measured_every": self.measured_every}
        facts["precision"] = "bf16" if self.bf16 else "float32"
        facts["flops_per_example"] = flops_per_example(task, models["original"], data.training)
        facts["versions"] = {p: version(p) for p in ("torch", "transformers", "diffusers", "datasets", "peft")}
        results = AttackResults([], task.metric, task.greater_is_better, len(data.test), original_metric, facts)
        keys: list[str] = []
        learned = in_bf16(task, process_state().device) if self.bf16 else task

        def finish(sweeps: dict[str, list[FineTuningStrategy]]) -> None:
            runs = [AttackRun(name, s, seed) for seed in self.seeds for name, sweep in sweeps.items() for s in sweep]
            new = run_keys(runs, task, models, weights, data, self.measured_every or self.measured_epochs, self.bf16)
            found = [self._read(key, run) for key, run in zip(new, runs, strict=True)]
            # A run that failed is tried again; one that is not applicable stays so.
            missing = [i for i, run in enumerate(found) if run is None or run.failed]
            if not keys:  # What a search proposes later costs only itself.
                lost = [runs[i] for i in missing]
                try_kinds(lost, models, learned, data, required=len(lost) == len(runs))
            self._compute(learned, models, data, [(new[i], runs[i]) for i in missing])
            for i in missing:
                found[i] = self._read(new[i], runs[i])
            results.runs += [run if done is None else done for run, done in zip(runs, found, strict=True)]
            keys.extend(new)

        first = {name: self.strategies for name in models} | {"scratch": scratch(self.strategies)}
        finish(first | {UNTRAINED: [] if data.original is None else of_original_data(self.strategies)})
        if self.trials:
            can = head_fits(task, models["original"], data.training), data.original is not None
            searches = {n: Search(self.trials, *can, task.greater_is_better, self.epochs) for n in first}
            while asked := next_round(searches, results.summaries(), self.strategies):
                finish(asked)
            best = results.best("protected")
            if data.original is not None and best is not None and best.strategy not in self.strategies:
                finish({UNTRAINED: of_original_data([best.strategy])})
        for best in filter(None, map(results.best, models if self.trials else ())):
            write_sweep([best.strategy], self.output_dir / f"best-{best.model}.yaml")
        results.pictures = self._pictures(results, keys)
        results.save(self.output_dir / "results.json")
        return results

    def _data(
        self,
        training: Source,
        test: Source,
        validation: Source | None = None,
        original: Source | None = None,
        original_test: Source | None = None,
    ) -> AdversaryData:
        return AdversaryData(
            training,
            test,
            validation,
            original,
            original_test,
            examples=self.examples,
            input_columns=self.input_columns,
            label_columns=self.label_columns,
        )

    def _benign_suite(self) -> AttackSuite:
        """Return this suite for the allowed task, whose columns it takes for those of the restricted domain."""
        suite = copy.copy(self)
        suite.output_dir = self.output_dir / "benign"
        suite.input_columns = {"restricted": self.input_columns.get("benign")}
        suite.label_columns = {"restricted": self.label_columns.get("benign")}
        return suite

    def _task_and_processor(self, model: nn.Module, *given: nn.Module | str) -> tuple[Task, Any | None]:
        """Return the suite's own; else what is saved with the first of the given models that is an id or a folder."""
        task, processor = self.task, self.processing_class
        source = next((m for m in given if not isinstance(m, nn.Module)), None)
        if task is None:
            task = infer_task(model, self.metric) if source is None else load_task(source, model, self.metric)
        if processor is None and source is not None:
            processor = load_processor(source, model)
        return task, processor

    def _file(self, key: str, suffix: str = "json") -> Path:
        return self.output_dir / "runs" / f"{key}.{suffix}"

    def _read(self, key: str, run: AttackRun) -> AttackRun | None:
        path = self._file(key)
        if not path.exists():
            return None
        try:
            read = AttackRun.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError):
            logger.warning("%s is torn or not a result: it is computed again.", path)
            return None
        # Models of equal weights share a file, so its name for the model may be the other one's. The strategy is equal;
        # one object of it for all runs is what a sweep of thousands has room for.
        return replace(read, model=run.model, strategy=run.strategy)

    def _compute(
        self, task: Task, models: dict[str, nn.Module], data: AdversaryDomains, missing: list[tuple[str, AttackRun]]
    ) -> None:
        """Compute this process's share of what is missing, each run a file when it ends."""
        state = process_state()
        # All must have listed what is missing before the first one writes, or their shares would not add up.
        state.wait_for_everyone()
        mine = missing[state.process_index :: state.num_processes]
        # A model has more than its weights, so what was measured of one serves it alone.
        starts: dict[str, dict[tuple, float]] = {name: {} for name in models}
        steps = (1 + len(data.folds)) * sum(run.strategy.total_steps(len(data.training)) for _, run in mine)
        with tqdm(total=steps, desc="attacking", unit="step", disable=not state.is_main_process or not mine) as bar:
            for number, (key, run) in enumerate(mine, 1):
                bar.set_postfix_str(f"attack {number}/{len(mine)}: {run.model}, {run.strategy.name}")
                attacked = "original" if run.model in ("scratch", UNTRAINED) else run.model
                victim = models[attacked]
                try:
                    if run.model == UNTRAINED:
                        victim = untrained_copy(victim, task, data.training, run.seed)
                    run.curve = run_attack(
                        victim,
                        task,
                        run.strategy,
                        data,
                        seed=run.seed,
                        measured=self.measured_every or self.measured_epochs,
                        after_step=lambda *_: bar.update(),
                        at_end=partial(draw_denoised, task, data.test, self._file(key, "png")),
                        starts=starts[attacked],
                    )
                except NotApplicableError as reason:
                    run.error, run.applicable = str(reason), False
                except Exception as error:  # Whatever a model raises: the other attacks go on.
                    run.error = f"{type(error).__name__}: {error}"
                    logger.warning("%s on %s failed and is recorded: %s", run.strategy.name, run.model, run.error)
                write_atomically(self._file(key), json.dumps(run.to_dict()))
        state.wait_for_everyone()

    def _pictures(self, results: AttackResults, keys: list[str]) -> dict[str, Path]:
        """Return pictures of each model: the restricted domain after its best attack, and the original domain."""
        pictures, scores = {}, results.scores()
        for model in results.models():
            best = scores.best(model)
            for key, run in zip(keys, results.runs, strict=True):
                if best and (run.model, run.strategy, run.seed) == (model, best.strategy, self.seeds[0]):
                    pictures[f"restricted domain, {model} after its best attack"] = self._file(key, "png")
        for model in results.original_metric:
            pictures[f"original domain, {model}"] = self.output_dir / f"original-{model}.png"
        return {title: path for title, path in pictures.items() if path.exists()}

    def plan(
        self, examples: int, models: int = 2, benign_examples: int | None = None, folds: int = 0
    ) -> dict[str, int]:
        """Return what `run` would do at most: runs, optimizer steps, images, and measurements.

        Args:
            examples: The adversary's training examples.
            models: How many are attacked, the protected and the original one among them.
            benign_examples: Those of the allowed task, where there is one.
            folds: In how many folds these examples choose attacks (`num_folds`); each costs a run's steps once more.
        """
        seeds, from_scratch = len(self.seeds), scratch(self.strategies)
        # What a search proposes is not known before; its length is.
        proposed = [FineTuningStrategy(epochs=self.epochs)] * max(0, self.trials - len(self.strategies))
        sweep, untrained = [*self.strategies, *proposed], of_original_data(self.strategies)
        from_scratch += proposed if self.trials else []
        attacks = [(s, examples) for s in [*sweep * models, *from_scratch, *untrained]]
        if benign_examples is not None:
            attacks += [(s, benign_examples) for s in [*sweep * 2, *from_scratch]]
        steps = [s.total_steps(count) for s, count in attacks]
        images = [n * min(s.batch_size, count) for n, (s, count) in zip(steps, attacks, strict=True)]
        fits, measured = seeds * (1 + folds), self.measured_every or self.measured_epochs
        points = seeds * sum(len(measured_points(s, count, measured)) for s, count in attacks)
        plan = {"steps": fits * sum(steps), "images": fits * sum(images), "measurements": points}
        return {"runs": seeds * len(attacks), **plan}


def _name(model: nn.Module | str) -> str:
    """Return what a model is called in a report: its Hub id, its folder's base name, or its class."""
    if isinstance(model, nn.Module):
        return type(model).__name__
    return Path(model).resolve().name if Path(model).exists() else str(model)

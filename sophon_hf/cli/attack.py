"""`sophon-hf attack`: run a sweep of attacks, and tell what it found."""

from __future__ import annotations

import argparse
from pathlib import Path

import datasets
import numpy as np

from sophon_hf.attacks.adversary import num_folds
from sophon_hf.attacks.run import EVALUATION_BATCH
from sophon_hf.attacks.suite import AttackSuite
from sophon_hf.cli.loading import columns, load_half, load_metric, load_split, look_for, protected_model
from sophon_hf.cli.report import tell
from sophon_hf.cli.timing import attack_seconds, duration
from sophon_hf.data.domain import build_domain
from sophon_hf.data.labels import number_classes
from sophon_hf.models.loading import agree_on_padding, load_model, load_processor
from sophon_hf.tasks.base import load_task
from sophon_hf.utils import process_state


def run(options: argparse.Namespace) -> None:
    """Run a sweep as the options say, and write its report to `output_dir/attacks/report`."""
    folder = Path(options.output_dir) / "attacks"
    protected = protected_model(options)
    suite = AttackSuite(
        options.sweep,
        folder,
        trials=options.trials,
        seeds=options.seeds,
        epochs=options.epochs,
        measured_every=options.measured_every,
        examples=options.examples,
        bf16=options.bf16,
        metric=load_metric(options),
        **columns(options),
    )
    looked = [look_for(source, on_hub=not options.dry_run) for source in (protected, options.model)]
    remarks = [remark for remark in looked if remark]
    training, test = load_half(options, defender=False), load_split(options, "restricted", test=True)
    benign, benign_test = load_split(options, "benign"), load_split(options, "benign", test=True)
    if process_state().is_main_process:
        _tell_plan(suite, options, training, test, benign, remarks)
    if options.dry_run:
        return
    results = suite.run(
        protected=protected,
        original=options.model,
        restricted_dataset=training,
        eval_dataset=test,
        original_dataset=load_split(options, "original"),
        original_eval_dataset=load_split(options, "original", test=True),
        benign_dataset=benign,
        benign_eval_dataset=benign_test,
    )
    if process_state().is_main_process:
        tell(results, folder / "report")


def _tell_plan(
    suite: AttackSuite,
    options: argparse.Namespace,
    training: datasets.Dataset,
    test: datasets.Dataset,
    benign: datasets.Dataset | None,
    remarks: list[str],
) -> None:
    """Say what the suite would do at most and, where the original model can be loaded, how long that takes."""
    count = min(options.examples or len(training), len(training))
    benign_count = None if benign is None else min(options.examples or len(benign), len(benign))
    plan = suite.plan(count, benign_examples=benign_count, folds=num_folds(len(training)))
    print(f"{plan['runs']} runs, {plan['steps']:,} optimizer steps, {plan['images']:,} images")
    for strategy in suite.strategies if options.dry_run else ():
        print(f"  {strategy.name}: {strategy.total_steps(count)} steps a run")
    if benign_count is not None:
        print(f"The same attacks run on the {benign_count} examples of the allowed task, which are counted above.")
    for remark in remarks:
        print(remark)
    state = process_state()
    try:
        model = load_model(options.model).to(state.device)
        processor = load_processor(options.model, model)
        agree_on_padding(model, processor)
        task = load_task(options.model, model)
        needs, named = task.inputs(model), columns(options)
        # Rows that lie apart, since the first may be all of one class.
        rows = np.unique(np.linspace(0, len(training) - 1, EVALUATION_BATCH).astype(int))
        domain = build_domain(
            training.select(rows),
            needs,
            processor,
            name="restricted",
            input_column=named["input_columns"]["restricted"],
            classes=number_classes("restricted", [training, test], needs, named["label_columns"]["restricted"]),
        )
        sizes = [min(strategy.batch_size, len(domain)) for strategy in suite.strategies]
        seconds = attack_seconds(model, task, domain, (min(sizes), max(sizes)), plan, len(test))
    except (OSError, ValueError) as error:  # What the suite does not take, it tells itself.
        print(f"How long that takes was not measured: {' '.join(str(error).split())}")
        return
    print(f"In all {duration(seconds / state.num_processes)}; what is finished already is not computed again.")

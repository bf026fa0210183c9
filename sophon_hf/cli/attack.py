"""`sophon-hf attack`: run a sweep of attacks, and tell what it found."""

from __future__ import annotations

import argparse
from pathlib import Path

import datasets
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from sophon_hf.attacks.adversary import num_folds
from sophon_hf.attacks.suite import AttackSuite, process_state
from sophon_hf.cli.loading import columns, load_half, load_split, protected_model
from sophon_hf.cli.report import tell

_DOMAINS = ("original", "restricted", "benign")


def run(options: argparse.Namespace) -> None:
    """Run a sweep as the options say, and write its report to `output_dir/attacks/report`."""
    folder = Path(options.output_dir) / "attacks"
    protected = protected_model(options)
    suite = AttackSuite(
        options.sweep,
        folder,
        seeds=options.seeds,
        epochs=options.epochs,
        measured_every=options.measured_every,
        examples=options.examples,
        input_columns=columns(options, "input", _DOMAINS),
        label_columns=columns(options, "label", _DOMAINS),
    )
    training, benign = load_half(options, defender=False), load_split(options, "benign")
    remarks = [remark for source in (protected, options.model) if (remark := _look_for(source))]
    if options.dry_run:
        _print_plan(suite, options, training, benign, remarks)
        return
    results = suite.run(
        protected=protected,
        original=options.model,
        restricted_dataset=training,
        eval_dataset=load_split(options, "restricted", test=True),
        original_dataset=load_split(options, "original"),
        original_eval_dataset=load_split(options, "original", test=True),
        benign_dataset=benign,
        benign_eval_dataset=load_split(options, "benign", test=True),
    )
    if process_state().is_main_process:
        tell(results, folder / "report")


def _print_plan(
    suite: AttackSuite,
    options: argparse.Namespace,
    training: datasets.Dataset,
    benign: datasets.Dataset | None,
    remarks: list[str],
) -> None:
    count, benign_count = (
        None if data is None else min(options.examples or len(data), len(data)) for data in (training, benign)
    )
    plan = suite.plan(count, benign_examples=benign_count, folds=num_folds(len(training)))
    print(f"{plan['runs']} runs, {plan['steps']:,} optimizer steps, {plan['images']:,} images:")
    for strategy in suite.strategies:
        print(f"  {strategy.name}: {strategy.total_steps(count)} steps a run")
    if benign_count is not None:
        print(f"The same attacks run on the {benign_count} examples of the allowed task, which are counted above.")
    for remark in remarks:
        print(remark)


def _look_for(model: str) -> str | None:
    """What is not known of a model without loading it or asking the Hub.

    Raises:
        FileNotFoundError: A folder without a model, or what is neither a folder nor could be a Hub id.
    """
    folder = Path(model)
    if folder.is_dir():
        if not any((folder / name).exists() for name in ("config.json", "model_index.json")):
            raise FileNotFoundError(
                f"{model!r} holds neither config.json nor model_index.json: no model is saved there."
            )
        return None
    try:
        validate_repo_id(model)
    except HFValidationError as error:
        raise FileNotFoundError(
            f"There is no folder {model!r}, and it is not the form of a Hub id ('user/name')."
        ) from error
    return f"{model!r} is no folder here, and was not looked up on the Hub."

"""`sophon-hf attack` and `sophon-hf report`: run a sweep of attacks, and tell what it found."""

from __future__ import annotations

import argparse
from pathlib import Path

import datasets
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from sophon_hf.attacks.adversary import num_folds
from sophon_hf.attacks.report import to_markdown, write_report
from sophon_hf.attacks.results import AttackResults
from sophon_hf.attacks.suite import AttackSuite
from sophon_hf.cli.options import (
    add_attack_options,
    add_domain_options,
    columns,
    load_benign,
    load_original,
    load_restricted,
)

DOMAINS = ("original", "restricted", "benign")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sophon-hf attack",
        description="Attack a protected model, the original one, and train from scratch, at the same budget.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--protected", required=True, help="Hub id or folder of the protected model")
    add("--original", required=True, help="Hub id or folder of the model before protection")
    add("--restricted", required=True, help="restricted domain: Hub id or folder of a data set")
    add("--original_data", help="original domain, to measure intactness and for attacks that warm up on it")
    add_domain_options(parser)
    add("--benign", help="an allowed task (Hub id or folder): what the protection costs an honest user")
    add("--benign_split", default="train", help="its split that is trained on")
    add("--benign_test_split", default="test", help="its split that is measured on")
    add("--benign_classes", nargs="+", help="keep these classes of it, numbered in this order")
    for kind in ("input", "label"):
        add(f"--benign_{kind}", help=f"{kind} column of the benign domain, where it is not clear")
    add_attack_options(parser)
    add(
        "--measured_every", type=int, metavar="STEPS", help="measure every so many steps, not at epochs 0, 1, 5, ... 20"
    )
    add("--examples", type=int, help="the adversary's examples, stratified; all where left out")
    add(
        "--output_dir", default="attacks", help="finished attacks and the report; a second run computes what is missing"
    )
    add("--dry-run", action="store_true", help="tell the number of runs and their cost, and run nothing")
    return parser


def main(arguments: list[str]) -> None:
    """Run a sweep as the arguments say, and write its report to `output_dir/report`."""
    options = _parser().parse_args(arguments)
    suite = AttackSuite(
        options.sweep,
        options.output_dir,
        seeds=options.seeds,
        epochs=options.epochs,
        measured_every=options.measured_every,
        examples=options.examples,
        input_columns=columns(options, "input", DOMAINS),
        label_columns=columns(options, "label", DOMAINS),
    )
    training, test = load_restricted(options, options.restricted)
    benign, benign_test = (None, None) if options.benign is None else load_benign(options, options.benign)
    if options.dry_run:
        _print_plan(suite, options, training, benign)
        return
    warm_up, intact = (None, None) if options.original_data is None else load_original(options, options.original_data)
    results = suite.run(
        protected=options.protected,
        original=options.original,
        restricted_dataset=training,
        eval_dataset=test,
        original_dataset=warm_up,
        original_eval_dataset=intact,
        benign_dataset=benign,
        benign_eval_dataset=benign_test,
    )
    _write(results, Path(options.output_dir) / "report")


def _print_plan(
    suite: AttackSuite, options: argparse.Namespace, training: datasets.Dataset, benign: datasets.Dataset | None
) -> None:
    remarks = [remark for source in (options.protected, options.original) if (remark := _look_for(source))]
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


def report(arguments: list[str]) -> None:
    """Write the report of a finished sweep again."""
    parser = argparse.ArgumentParser(prog="sophon-hf report", description="Write report.json, report.md, plots, HTML.")
    parser.add_argument("folder", type=Path, help="output_dir of `sophon-hf attack`")
    folder = parser.parse_args(arguments).folder
    path = folder / "results.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: `sophon-hf attack --output_dir {folder}` writes it.")
    _write(AttackResults.load(path), folder / "report")


def _write(results: AttackResults, folder: Path) -> None:
    summary = write_report(results, folder)
    print(to_markdown(results, summary).split("\n| ")[0])
    print(f"The whole report: {folder}/index.html")

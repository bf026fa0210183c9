"""`sophon-hf attack` and `sophon-hf report`: run a sweep of attacks, and tell what it found."""

from __future__ import annotations

import argparse
from pathlib import Path

import datasets

from sophon_hf.attacks import AttackResults, AttackSuite
from sophon_hf.attacks.sweeps import SWEEPS
from sophon_hf.commands.protect import load_processor
from sophon_hf.data import load_domain, select_classes, split_domain
from sophon_hf.reporting.report import to_markdown, write_report
from sophon_hf.tasks import load_model, load_task

DOMAINS = ("original", "restricted", "benign")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sophon-hf attack",
        description="Attack a protected model, the original one, and train from scratch, at the same budget.",
    )
    add = parser.add_argument
    add("--protected", required=True, help="Hub id or folder of the protected model")
    add("--original", required=True, help="Hub id or folder of the model before protection")
    add("--restricted", required=True, help="restricted domain: Hub id or folder of a data set")
    add("--restricted_split", default="train", help="its split that the adversary trains on")
    add("--test_split", default="test", help="its split that results are reported on")
    add("--restricted_classes", nargs="+", help="keep these classes, numbered in this order, as for protection")
    add("--original_data", help="original domain, to measure intactness and for attacks that warm up on it")
    add("--original_split", default="train", help="its split for attacks that warm up on it")
    add("--original_test_split", default="test", help="its split that intactness is measured on")
    add("--benign", help="an allowed task (Hub id or folder): what the protection costs an honest user")
    add("--benign_split", default="train", help="its split that is trained on")
    add("--benign_test_split", default="test", help="its split that is measured on")
    add("--benign_classes", nargs="+", help="keep these classes of it, numbered in this order")
    for name in DOMAINS:
        add(f"--{name}_input", help=f"input column of the {name} domain, where it is not clear")
        add(f"--{name}_label", help=f"label column of the {name} domain, where it is not clear")
    add("--original_classes", nargs="+", help="keep these classes of it, numbered in this order, as for protection")
    add(
        "--whole",
        action="store_true",
        help="train on the whole split, not on the adversary's half of `sophon-hf protect`",
    )
    add("--sweep", default="strong", help=f"{', '.join(SWEEPS)}, or a JSON or YAML file with strategies")
    add("--examples", type=int, help="the adversary's examples, stratified; all by default")
    add("--epochs", type=float, help="of an ordinary attack; 20 by default")
    add(
        "--measured_every", type=int, metavar="STEPS", help="measure every so many steps, not at epochs 0, 1, 5, ... 20"
    )
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of every attack")
    add(
        "--output_dir", default="attacks", help="finished attacks and the report; a second run computes what is missing"
    )
    add("--dry-run", action="store_true", help="list the cells and their cost, and run nothing")
    return parser


def main(arguments: list[str]) -> None:
    """Run a sweep as the arguments say, and write its report to `output_dir/report`."""
    options = _parser().parse_args(arguments)
    original = load_model(options.original)
    suite = AttackSuite(
        options.sweep, options.output_dir, seeds=options.seeds, epochs=options.epochs, measured_every=options.measured_every,
        examples=options.examples,
        task=load_task(options.original, original), processing_class=load_processor(options.original, original),
        input_columns={name: getattr(options, f"{name}_input") for name in DOMAINS},
        label_columns={name: getattr(options, f"{name}_label") for name in DOMAINS},
    )  # fmt: skip
    training, test = (_part(options, "restricted", s) for s in (options.restricted_split, options.test_split))
    if not options.whole:
        _, training = split_domain(training, column=options.restricted_label)
    if options.dry_run:
        count = min(options.examples or len(training), len(training))
        plan = suite.plan(count)
        print(f"{plan['cells']} cells, {plan['steps']:,} optimizer steps, {plan['images']:,} images:")
        for strategy in suite.strategies:
            print(f"  {strategy.name}: {strategy.total_steps(count)} steps a cell")
        return
    warm_up, intact = (
        options.original_data and _part(options, "original", split)
        for split in (options.original_split, options.original_test_split)
    )
    benign, benign_test = (
        options.benign and _part(options, "benign", split)
        for split in (options.benign_split, options.benign_test_split)
    )
    results = suite.run(
        protected=options.protected,
        original=original,
        restricted_dataset=training,
        eval_dataset=test,
        original_dataset=warm_up,
        original_eval_dataset=intact,
        benign_dataset=benign,
        benign_eval_dataset=benign_test,
    )
    _write(results, Path(options.output_dir) / "report")


def _part(options: argparse.Namespace, domain: str, split: str) -> datasets.Dataset:
    """A split of a domain, with the classes that the options ask for."""
    source = options.original_data if domain == "original" else getattr(options, domain)
    classes = getattr(options, f"{domain}_classes")
    dataset = load_domain(source, split)
    return select_classes(dataset, classes, getattr(options, f"{domain}_label")) if classes else dataset


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

"""`sophon-hf report`: tell what a finished sweep found."""

from __future__ import annotations

import argparse
from pathlib import Path

from sophon_hf.attacks.report import to_markdown, write_report
from sophon_hf.attacks.results import AttackResults


def run(options: argparse.Namespace) -> None:
    """Write the report of the attacks in `output_dir` again."""
    folder = Path(options.output_dir) / "attacks"
    if not (folder / "results.json").exists():
        raise FileNotFoundError(
            f"{folder} has no results.json: `sophon-hf attack --output_dir {options.output_dir}` writes it."
        )
    tell(AttackResults.load(folder / "results.json"), folder / "report")


def tell(results: AttackResults, folder: Path) -> None:
    """Write a report into a folder, and print its head."""
    summary = write_report(results, folder)
    print(to_markdown(results, summary).split("\n| ")[0])
    print(f"The whole report: {folder}/index.html")

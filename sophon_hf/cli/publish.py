"""`sophon-hf publish`: a protected model goes to the Hub."""

from __future__ import annotations

import argparse
from pathlib import Path

from sophon_hf.hub.publish import publish


def run(options: argparse.Namespace) -> None:
    """Publish as the options say, and print where."""
    attacks = Path(options.output_dir) / "attacks"
    found = attacks if (attacks / "results.json").exists() else None
    commit = publish(
        options.output_dir,
        options.repo_id,
        report=options.report or found,
        private=options.private or None,  # Left out, the account's own setting counts.
        revision=options.revision,
    )
    print(f"Published: {commit.commit_url}")
    if options.report is None and found is not None:
        print(f"Card and sophon.json tell of the attacks in {found}.")
    print(f"Anyone can audit it: sophon-hf audit {options.repo_id} --restricted DATA --original DATA")

"""`sophon-hf audit`: is what a published model claims of itself true?"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sophon_hf.auditing.audit import audit
from sophon_hf.cli.loading import columns, load_half, load_metric, load_split, protected_model
from sophon_hf.utils import process_state


def run(options: argparse.Namespace) -> None:
    """Audit as the options say, print the verdicts, and exit with what they come to."""
    folder = Path(options.output_dir) / "audit"
    found = audit(
        protected_model(options),
        folder,
        revision=options.revision,
        unprotected=options.model,
        restricted_dataset=load_half(options, defender=False),
        eval_dataset=load_split(options, "restricted", test=True),
        original_dataset=load_split(options, "original"),
        original_eval_dataset=load_split(options, "original", test=True),
        sweep=options.sweep,
        seeds=options.seeds,
        epochs=options.epochs,
        examples=options.examples,
        metric=load_metric(options),
        **columns(options),
    )
    if process_state().is_main_process:
        print(found.to_text())
        print(f"\nThe whole audit: {folder}/audit.md")
    sys.exit(found.exit_code)

"""`sophon-hf audit`: is what a published model claims of itself true?"""

from __future__ import annotations

import argparse
import sys

from sophon_hf.auditing.audit import audit as audit_model
from sophon_hf.cli.options import add_attack_options, add_domain_options, columns, load_original, load_restricted


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sophon-hf audit",
        description="Check what a published model claims. Without data: form, hashes, and whether the claim agrees "
        "with "
        "itself. With data: its figures too.",
        epilog="Exits with 0 where everything that could be checked was reproduced, with 1 where something is weaker "
        "than "
        "claimed or tampered with, and with 2 where the audit could not be carried out.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("model", help="Hub id (user/name) or folder of the published model")
    add("--revision", help="branch, tag or commit on the Hub; the newest commit where left out")
    add("--unprotected", help="Hub id or folder of the model before protection; what the claim names where left out")
    add("--restricted", help="restricted domain: Hub id or folder of a data set")
    add("--original", help="original domain: Hub id or folder of a data set")
    add_domain_options(parser)
    add_attack_options(parser)
    add("--examples", type=int, help="the adversary's examples, stratified; as many as the claim's where left out")
    add("--output_dir", default="audit", help="audit.json, audit.md, attacks and their report; a second run goes on")
    return parser


def main(arguments: list[str]) -> None:
    """Audit as the arguments say, print the verdicts, and exit with what they come to."""
    options = _parser().parse_args(arguments)
    restricted = (None, None) if options.restricted is None else load_restricted(options, options.restricted)
    original = (None, None) if options.original is None else load_original(options, options.original)
    audit = audit_model(
        options.model,
        options.output_dir,
        revision=options.revision,
        unprotected=options.unprotected,
        restricted_dataset=restricted[0],
        eval_dataset=restricted[1],
        original_dataset=original[0],
        original_eval_dataset=original[1],
        sweep=options.sweep,
        seeds=options.seeds,
        epochs=options.epochs,
        examples=options.examples,
        input_columns=columns(options, "input"),
        label_columns=columns(options, "label"),
    )
    print(audit.to_text())
    print(f"\nThe whole audit: {options.output_dir}/audit.md")
    sys.exit(audit.exit_code)

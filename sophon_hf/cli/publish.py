"""`sophon-hf publish`: a protected model goes to the Hub."""

from __future__ import annotations

import argparse

from sophon_hf.hub.publish import publish


def main(arguments: list[str]) -> None:
    """Publish as the arguments say, and print where."""
    parser = argparse.ArgumentParser(
        prog="sophon-hf publish",
        description="Upload a protected model with card and sophon.json, in one commit. Log in first: `hf auth login`. "
        "Configuration, safetensors, processor, README.md, sophon.json and plots leave the machine, nothing else.",
    )
    add = parser.add_argument
    add("folder", metavar="DIR", help="where SophonTrainer or `sophon-hf protect` saved the model")
    add("repo_id", metavar="user/name", help="model repository; it is made where it does not exist")
    add("--report", metavar="DIR", help="output_dir of `sophon-hf attack` on this model: for the card and sophon.json")
    add("--private", action="store_true", help="make a new repository private")
    add("--revision", help="branch to commit to; main by default")
    options = parser.parse_args(arguments)
    commit = publish(
        options.folder,
        options.repo_id,
        report=options.report,
        private=options.private or None,
        revision=options.revision,
    )
    print(f"Published: {commit.commit_url}")
    print(f"Anyone can audit it: sophon-hf audit {options.repo_id} --restricted DATA --original DATA")

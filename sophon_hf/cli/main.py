"""`sophon-hf`: protect a model, attack it, report, or see the demo.

Libraries are imported only by the command that needs them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

USAGE = """usage: sophon-hf COMMAND ...

Protect pre-trained models against fine-tuning in a restricted domain, and measure what the protection is worth.

commands:
  protect [CONFIG.yaml] [--field value ...]   run Algorithm 1 on a model (`protect --help` explains the fields)
  attack  --protected ... --original ...      find the strongest attack of a sweep (`sophon-hf attack --help`)
  report  DIR                                 tell again what a finished sweep found
  publish DIR user/name [--report DIR]        upload a protected model to the Hub, with card and sophon.json
  audit   MODEL [--restricted ... --original ...]   find out whether what a published model claims is true
  demo    [--output_dir DIR]                  pre-train, protect, attack and report on data that ships with a dependency

`--traceback` anywhere shows where an error came from.
On several processes: accelerate launch -m sophon_hf.cli protect CONFIG.yaml
"""


def _protect(arguments: list[str]) -> None:
    from sophon_hf.cli.protect import main as protect

    protect(arguments)


def _attack(arguments: list[str]) -> None:
    from sophon_hf.cli.attack import main as attack

    attack(arguments)


def _report(arguments: list[str]) -> None:
    from sophon_hf.cli.attack import report

    report(arguments)


def _audit(arguments: list[str]) -> None:
    from sophon_hf.cli.audit import main as audit

    audit(arguments)


def _publish(arguments: list[str]) -> None:
    from sophon_hf.cli.publish import main as publish

    publish(arguments)


def _demo(arguments: list[str]) -> None:
    import argparse

    parser = argparse.ArgumentParser(prog="sophon-hf demo", description="Pre-train, protect, attack, report.")
    parser.add_argument(
        "--output_dir", default="demo-output", help="gets model, attacks and report; an earlier demo makes room"
    )
    parser.add_argument("--seed", type=int, default=0, help="of both protections")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="of iterations and adversary's seeds; 0.1 for a glance"
    )
    options = parser.parse_args(arguments)
    from sophon_hf.cli.demo import run

    run(options.output_dir, options.seed, options.scale)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "protect": _protect,
    "attack": _attack,
    "report": _report,
    "publish": _publish,
    "audit": _audit,
    "demo": _demo,
}


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `sophon-hf`."""
    arguments = sys.argv[1:] if arguments is None else arguments
    traceback = "--traceback" in arguments
    arguments = [argument for argument in arguments if argument != "--traceback"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return
    if arguments[0] == "--version":
        from sophon_hf import __version__

        print(__version__)
        return
    if arguments[0] not in COMMANDS:
        from sophon_hf.utils import hint

        sys.exit(f"sophon-hf has no command {arguments[0]!r}." + hint(arguments[0], COMMANDS, f"\n{USAGE}"))
    # An audit ends in 1 where a claim is not true, so nothing else of it may.
    auditing = arguments[0] == "audit"
    expected = (Exception,) if auditing else (ValueError, TypeError, OSError)
    try:
        COMMANDS[arguments[0]](arguments[1:])
    except expected as error:
        if traceback:
            raise
        message = f"sophon-hf {arguments[0]}: {error}"
        if not auditing:
            sys.exit(message)
        print(message, file=sys.stderr)
        sys.exit(2)

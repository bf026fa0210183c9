"""`sophon-hf`: read what a command is told, then import the libraries that it needs, and run it."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import warnings
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from sophon_hf import __version__
from sophon_hf.cli.doctor import explain_misfit
from sophon_hf.cli.options import COMMANDS, read_options
from sophon_hf.utils import hint

USAGE = f"""usage: sophon-hf COMMAND [CONFIG.yaml] [--flag value ...]

Protect pre-trained models against fine-tuning in a restricted domain, and measure what the protection is worth.

commands:
{chr(10).join(f"  {name:9} {line}" for name, line in COMMANDS.items())}

`sophon-hf COMMAND --help` explains the flags. A YAML file may hold them for all commands; flags win.
`--traceback` anywhere shows where an error came from; `--version` shows the version.
In several processes: sophon-hf protect CONFIG.yaml --accelerate_config two_gpus
"""


def main(arguments: list[str] | None = None) -> None:
    """Run `sophon-hf` with these arguments, or with those of the process.

    Raises:
        SystemExit: With 2 and one line where something could not be carried out; with 130 after Ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    traceback = "--traceback" in arguments
    arguments = [argument for argument in arguments if argument != "--traceback"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return
    if arguments[0] == "--version":
        print(__version__)
        return
    command, options = arguments[0], argparse.Namespace()
    if command not in COMMANDS:
        _end(f"sophon-hf has no command {command!r}." + hint(command, COMMANDS, f"\n{USAGE}"))
    try:
        options = read_options(command, arguments[1:])
        if getattr(options, "accelerate_config", None):
            _launch(options.accelerate_config, arguments)
        else:
            _run(command, options)
    except KeyboardInterrupt:
        if _rank() == 0 and getattr(options, "accelerate_config", None) != "":
            print(f"\nsophon-hf {command}: interrupted. {_how_to_go_on(command, options)}", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        # What torch raises, which must not be imported before it is needed.
        out_of_memory = type(error).__name__ == "OutOfMemoryError"
        misfit = explain_misfit(error)
        foreseen = out_of_memory or misfit or isinstance(error, (ValueError, TypeError, OSError, ImportError))
        # An audit ends in 1 where a claim is not true, so nothing else of it may.
        if traceback or not (foreseen or command == "audit"):
            raise
        if _rank():
            time.sleep(30)  # Where all processes fail alike, the first one says why, and the launcher ends the others.
        advice = " Take smaller batches." if out_of_memory else ""
        _end(f"sophon-hf {command}: {misfit or ' '.join(str(error).split())}{advice}")


class _Once(logging.Filter):
    """Drop what was said before: the estimate of the time warns of what the work itself warns of."""

    def __init__(self) -> None:
        super().__init__()
        self.said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        new = message not in self.said
        self.said.add(message)
        return new


def _run(command: str, options: argparse.Namespace) -> None:
    if logging.lastResort is not None:
        logging.lastResort.addFilter(_Once())
    # DDP advises on an argument that the Trainer sets.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if _rank():
        # What the first process warns of, and how far it is, holds for all.
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
        os.environ |= {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    module = import_module(f"sophon_hf.cli.{command}")
    if "transformers" in sys.modules:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # A bar for each file that is read or written.
    if command == "demo":
        module.run(**vars(options))
    else:
        module.run(options)


def _end(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    ended = SystemExit(message)
    ended.code = 2
    raise ended


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


def _how_to_go_on(command: str, options: argparse.Namespace) -> str:
    if command in ("attack", "audit", "benchmark"):
        return "The same command goes on: finished attacks are kept."
    if command == "protect" and any(Path(options.output_dir).glob("checkpoint-*")):
        return "The same command with --resume goes on from the last checkpoint."
    return "The same command starts again: nothing was saved yet." if command == "protect" else "Start it again."


def _launch(config: str, arguments: list[str]) -> None:
    """Run the command in the processes that a configuration of accelerate asks for."""
    import yaml
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # The process has said why it failed.
    if (yaml.safe_load(Path(config).read_text(encoding="utf-8")) or {}).get("use_cpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # accelerate starts several processes on CPUs as if on GPUs.
    # The last of two flags counts: these processes must not launch others.
    command = ["--config_file", config, "-m", "sophon_hf.cli", *arguments, "--accelerate_config="]
    try:
        launch_command(launch_command_parser().parse_args(command))
    except SignalException:
        raise KeyboardInterrupt from None
    except ChildFailedError as error:
        code = next(iter(error.failures.values())).exitcode
        sys.exit(code if code > 0 else 1)

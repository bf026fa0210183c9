"""`sophon-hf protect`: Algorithm 1 from a YAML file and flags."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from dataclasses import dataclass, field
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from sophon_hf.data.labels import select_classes, split_domain
from sophon_hf.data.loading import load_domain
from sophon_hf.finetuning.strategy import check_choice
from sophon_hf.protection.config import PRESETS, SophonConfig
from sophon_hf.protection.trainer import SophonTrainer
from sophon_hf.utils import hint

_FILE_FIRST = "A YAML file comes first, flags follow."


@dataclass
class ProtectArguments:
    """What is protected, and against what."""

    model: str = field(metadata={"help": "Hub id or folder of a classifier, a backbone or a denoiser."})
    original: str = field(metadata={"help": "Original domain: Hub id or folder of a data set."})
    restricted: str = field(metadata={"help": "Restricted domain: Hub id or folder of a data set."})
    original_split: str = field(default="train", metadata={"help": "Its split to protect with."})
    restricted_split: str = field(default="train", metadata={"help": "Its split to protect with."})
    original_classes: list[str] | None = field(
        default=None, metadata={"help": "Keep these classes of it, numbered in this order as the model numbers them."}
    )
    restricted_classes: list[str] | None = field(
        default=None, metadata={"help": "Keep these classes of it, numbered in this order."}
    )
    original_input: str | None = field(default=None, metadata={"help": "Its input column, where it is not clear."})
    restricted_input: str | None = field(default=None, metadata={"help": "Its input column, where it is not clear."})
    original_label: str | None = field(default=None, metadata={"help": "Its label column, where it is not clear."})
    restricted_label: str | None = field(default=None, metadata={"help": "Its label column, where it is not clear."})
    adversary_half: bool = field(
        default=True,
        metadata={
            "help": "Keep half of the restricted domain (seeded, stratified) away from protection, for attacks to use; "
            "false protects with all of it."
        },
    )
    preset: str = field(
        default="paper", metadata={"help": f"Defaults of the hyper-parameters: {' or '.join(PRESETS)}."}
    )
    resume: bool = field(default=False, metadata={"help": "Go on from the last complete checkpoint in output_dir."})


class _Parser(HfArgumentParser):
    """Explains SOPHON's own fields: among the hundred of `TrainingArguments` they would not be found."""

    def __init__(self) -> None:
        super().__init__(
            [ProtectArguments, SophonConfig],
            prog="sophon-hf protect",
            usage="%(prog)s [CONFIG.yaml] [--field value ...]",
            description="Protect a model by Algorithm 1. Fields come from a YAML file, which comes first, and from "
            "flags, which "
            "win. model, original and restricted must be given, in the one or by the other.",
            epilog="All fields of transformers.TrainingArguments (seed, bf16, report_to, ...) are understood, too.",
            allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        own = {"help", *ProtectArguments.__annotations__, *SophonConfig.__annotations__}
        for action in self._actions:
            if action.dest not in own or action.option_strings[0].startswith("--no_"):
                action.help = argparse.SUPPRESS

    def error(self, message: str) -> NoReturn:
        sys.exit(f"sophon-hf protect: {message}. {_FILE_FIRST} `sophon-hf protect --help` explains the fields.")


def read_arguments(arguments: list[str]) -> tuple[ProtectArguments, SophonConfig]:
    """Merge a YAML file (first, if given) and flags; flags win.

    Raises:
        ValueError: An unknown field (the closest one is named), or a file that is no mapping.
        SystemExit: A value of the wrong type, or a missing field.
    """
    parser = _Parser()
    values: dict[str, Any] = {}
    if arguments and arguments[0].endswith((".yaml", ".yml")):
        with open(arguments[0], encoding="utf-8") as file:
            values = yaml.safe_load(file) or {}
        if not isinstance(values, dict):
            raise ValueError(f"{arguments[0]} must hold fields (`model: ...`), not a {type(values).__name__}.")
        arguments = arguments[1:]
    known = [f.name for cls in (ProtectArguments, SophonConfig) for f in dataclasses.fields(cls) if f.init]
    for name in values:
        _check_known(str(name), known)
    given = {argument[2:].split("=")[0] for argument in arguments if argument.startswith("--")}
    values = {**_preset(arguments, values), **values}
    flags = [flag for name, value in values.items() if name not in given for flag in _as_flags(name, value)]
    parsed = parser.parse_args_into_dataclasses([*flags, *arguments], return_remaining_strings=True)
    for argument in parsed[-1]:
        if argument.startswith("--"):
            _check_known(argument[2:].split("=")[0], known)
    if parsed[-1]:
        raise ValueError(f"{parsed[-1][0]!r} belongs to no field. {_FILE_FIRST}")
    return parsed[0], parsed[1]


def _preset(arguments: list[str], values: dict[str, Any]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", default=values.get("preset", "paper"))
    name = parser.parse_known_args(arguments)[0].preset
    check_choice(name, PRESETS, "preset")
    return PRESETS[name]


def _check_known(name: str, known: list[str]) -> None:
    if name not in known:
        raise ValueError(f"There is no field {name!r}.{hint(name, known)}")


def _as_flags(name: str, value: Any) -> list[str]:
    if value is None:
        return []
    json_fields = ("gamma", "strategy_space")
    if isinstance(value, dict) or name in json_fields:
        return [f"--{name}", json.dumps(value)]
    if name == "fsdp" and isinstance(value, bool):
        return ["--fsdp"] if value else []  # What follows it would be read as a list of options.
    if value is False and name.endswith("_strategy"):
        return [f"--{name}", "no"]  # YAML reads an unquoted no as false.
    if isinstance(value, list):
        return [f"--{name}", *(str(item) for item in value)]
    return [f"--{name}", str(value)]


def main(arguments: list[str]) -> None:
    """Protect as the arguments say, and leave the protected model in `output_dir`."""
    options, config = read_arguments(arguments)
    domains = {}
    for name in ("original", "restricted"):
        dataset = load_domain(getattr(options, name), getattr(options, f"{name}_split"))
        classes = getattr(options, f"{name}_classes")
        label = getattr(options, f"{name}_label")
        domains[name] = select_classes(dataset, classes, label) if classes else dataset
    if options.adversary_half:
        domains["restricted"], _ = split_domain(domains["restricted"], column=options.restricted_label)
    trainer = SophonTrainer(
        options.model,
        domains["restricted"],
        domains["original"],
        config,
        input_columns={"original": options.original_input, "restricted": options.restricted_input},
        label_columns={"original": options.original_label, "restricted": options.restricted_label},
    )
    trainer.train(resume_from_checkpoint=options.resume or None)
    if config.save_strategy == "no":
        trainer.save_model()  # `save_strategy` is about checkpoints; the command is run for the model.
    state = trainer.guard.state
    if state.best_step is None and state.start is not None:
        # The guard's warning has said so already.
        sys.exit(f"sophon-hf protect: there is no protected model in {config.output_dir}; the warning above says why.")
    if trainer.is_world_process_zero():
        which = "not evaluated" if state.best_step is None else f"iteration {state.best_step}"
        print(f"Protected model ({which}) saved in {config.output_dir}.")

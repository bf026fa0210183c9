"""What a command is told: by a configuration file, which all commands share, and by flags, which win.

Nothing here imports torch, so that help and typing errors answer at once.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from sophon_hf.attacks.sweeps import SWEEPS
from sophon_hf.benchmarking import BUDGETS, PAIRS
from sophon_hf.cli.fields import sophon_fields, training_fields
from sophon_hf.protection.presets import PRESETS
from sophon_hf.utils import hint, read_yaml

COMMANDS = {
    "protect": "run Algorithm 1 on a model",
    "attack": "find the strongest attack of a sweep on a protected model",
    "report": "tell again what a finished sweep found",
    "publish": "upload a protected model to the Hub, with its card and sophon.json",
    "audit": "find out whether what a published model claims is true",
    "doctor": "check versions and devices, and whether the libraries work together",
    "benchmark": "protect a packaged pair's model, or take a protected one, and attack it by a fixed protocol",
    "demo": "pre-train, protect, attack and report, on data that ships with the dependencies",
}
_EPILOGS = {
    "protect": "All fields of transformers.TrainingArguments (seed, bf16, report_to, ...) are flags and keys too.",
    "publish": "Log in first: `hf auth login`. Configuration, safetensors, processor, README.md, sophon.json and plots "
    "leave the machine, nothing else.",
    "audit": "Without data it checks form, hashes, and whether the claim agrees with itself; with data, its figures "
    "too. Exits with 0 where everything that could be checked was reproduced, with 1 where something is weaker than "
    "claimed or tampered with, and with 2 where the audit could not be carried out.",
}
# What a word without a flag stands for; where there are fewer words than names, the last names.
_WORDS = {
    "benchmark": ["model"],
    "report": ["output_dir"],
    "publish": ["output_dir", "repo_id"],
    "audit": ["protected"],
}
_SHOWN = {"repo_id": "user/name", "model": "MODEL"}
_CONFIGS = {path.stem: path for path in sorted((Path(__file__).parent / "accelerate_configs").glob("*.yaml"))}


def _sweep(text: str) -> str:
    if text in SWEEPS or Path(text).is_file():
        return text
    if Path(text).suffix in (".json", ".yaml", ".yml"):
        raise argparse.ArgumentTypeError(f"there is no file {text!r}")
    choices = f" There are {', '.join(SWEEPS)}, or give a .json or .yaml file"
    raise argparse.ArgumentTypeError(f"There is no sweep {text!r}.{hint(text, SWEEPS, choices)}")


def _accelerate_config(text: str) -> str:
    # The processes that are launched get an empty one, so that they do not launch others.
    if not text or text in _CONFIGS or Path(text).is_file():
        return str(_CONFIGS.get(text, text))
    choices = f" There are {', '.join(_CONFIGS)}, or give a file"
    raise argparse.ArgumentTypeError(f"There is no configuration {text!r}.{hint(text, _CONFIGS, choices)}")


@dataclass(frozen=True)
class _Flag:
    """A word that commands are told, with one meaning in all of them.

    Attributes:
        commands: Which take it.
        help: What it is.
        kind: A type as an annotation has it, or a function that reads it.
        default: Where nobody names it.
        required: The commands that cannot do without.
        choices: Its values, where there are few.
    """

    commands: str
    help: str
    kind: str | Callable[[str], str] = "str"
    default: Any = None
    required: str = ""
    choices: Sequence[str] | None = None


def _reading_flags(domain: str, commands: str) -> dict[str, _Flag]:
    """Return the flags that say how a domain's data are read."""
    return {
        f"{domain}_split": _Flag(commands, f"split of --{domain} to learn from", default="train"),
        f"{domain}_test_split": _Flag(commands, f"split of --{domain} to report on", default="test"),
        f"{domain}_classes": _Flag(
            commands, f"keep these classes of --{domain}, in this order; old=new renames one", "list[str]"
        ),
        f"{domain}_input": _Flag(
            commands, f"input column of --{domain}, where it is not clear, or two columns of text", "list[str]"
        ),
        f"{domain}_label": _Flag(
            commands,
            f"label column of --{domain}, where it is not clear, or one of ones and zeros a label",
            "list[str]",
        ),
        f"{domain}_caption": _Flag(
            commands, f"caption column of --{domain}, for a text-to-image pipeline, whose own parts encode it"
        ),
        f"{domain}_pixel_range": _Flag(
            commands, f"black and white in pictures of --{domain} with more than 8 bits, as 0 4095", "list[float]"
        ),
    }


_FLAGS = {
    "model": _Flag(
        "protect attack audit",
        "the model before protection: Hub id or folder (an audit takes the claim's where left out)",
        required="protect attack",
    ),
    "protected": _Flag("attack audit", "the protected model: Hub id or folder; output_dir where left out"),
    "output_dir": _Flag(
        "protect attack report publish audit",
        "folder of the protected model; attacks/ and audit/ in it are what these commands find",
        default="sophon-output",
    ),
    "original": _Flag("protect attack audit", "original domain: Hub id or folder of a data set", required="protect"),
    "restricted": _Flag(
        "protect attack audit", "restricted domain: Hub id or folder of a data set", required="protect attack"
    ),
    "benign": _Flag("attack", "an allowed task (Hub id or folder): what the protection costs an honest user"),
    **_reading_flags("original", "protect attack audit"),
    **_reading_flags("restricted", "protect attack audit"),
    **_reading_flags("benign", "attack"),
    "test_share": _Flag(
        "protect attack audit",
        "share of a domain without a test split that is kept for tests (seeded, stratified, copies on one side)",
        "float",
        0.2,
    ),
    "skip_unreadable": _Flag(
        "protect attack audit",
        "leave out examples that cannot be read or have no label, and tell how many",
        "bool",
        False,
    ),
    "adversary_half": _Flag(
        "protect attack audit",
        "split the restricted domain in halves (seeded, stratified): protect takes one, attack and audit the other; "
        "false: all of it",
        "bool",
        True,
    ),
    "metric": _Flag(
        "protect attack audit",
        "accuracy, mse (left out: the task's own), or a module of `evaluate`, also with arguments, as in "
        "{f1: {average: macro}}",
        "dict | str",
    ),
    "preset": _Flag("protect", "defaults of the hyper-parameters", default="paper", choices=tuple(PRESETS)),
    "resume": _Flag("protect", "go on from the last complete checkpoint in output_dir", "bool", False),
    "sweep": _Flag("attack audit", f"{', '.join(SWEEPS)}, or a JSON or YAML file of strategies", _sweep, "strong"),
    "epochs": _Flag(
        "attack audit",
        "length of an ordinary attack; one that sets its steps keeps them (left out: the sweep's own, in an audit the "
        "claim's)",
        "float",
    ),
    "seeds": _Flag("attack audit", "seeds of every attack", "list[int]", [0, 1, 2]),
    "examples": _Flag(
        "attack audit",
        "the adversary's examples, stratified (left out: all, in an audit as many as the claim's)",
        "int",
    ),
    "trials": _Flag("attack", "how many strategies the sweep search tries on each model (left out: 40)", "int"),
    "measured_every": _Flag("attack", "measure every so many steps, not at epochs 0, 1, 5, ... 20", "int"),
    "bf16": _Flag("attack", "attack all models in mixed precision: faster where the processor has it", "bool", False),
    "accelerate_config": _Flag(
        "protect attack audit",
        f"run in several processes: {', '.join(_CONFIGS)}, or a file that `accelerate config` wrote",
        _accelerate_config,
    ),
    "dry_run": _Flag("protect attack", "tell what would be done and how long it takes, and do nothing", "bool", False),
    "repo_id": _Flag("publish", "user/name on the Hub; made where it does not exist", required="publish"),
    "report": _Flag("publish", "folder of the attacks that card and sophon.json tell; output_dir/attacks if it exists"),
    "private": _Flag("publish", "make a new repository private", "bool", False),
    "revision": _Flag(
        "publish audit", "branch on the Hub, for an audit also tag or commit (left out: main, its newest commit)"
    ),
}
_LISTS: dict[Any, type] = {"list[str]": str, "list[int]": int, "list[float]": float}
# These commands share words with the others, and mean something else by them.
_OWN_FLAGS = {
    "demo": {
        "output_dir": _Flag(
            "demo", "gets models, attacks and report; an earlier demo makes room", default="demo-output"
        ),
        "seed": _Flag("demo", "seed of both protections", "int", 0),
        "scale": _Flag("demo", "factor of iterations and of the adversary's seeds; 0.1 for a glance", "float", 1.0),
    },
    "benchmark": {
        "model": _Flag(
            "benchmark",
            f"a preset ({', '.join(PRESETS)}), or a protected model: Hub id or folder",
            required="benchmark",
        ),
        "pair": _Flag("benchmark", "model and domains; letters needs no network", default="letters", choices=PAIRS),
        "budget": _Flag("benchmark", "full has more attacks and examples", default="small", choices=BUDGETS),
        "output_dir": _Flag("benchmark", "gets models, attacks, and the row as JSON", default="benchmark-output"),
        "seeds": _Flag("benchmark", "seeds of every attack (left out: the pair's)", "list[int]"),
        "name": _Flag("benchmark", "what the row calls the protection (left out: the preset's or folder's name)"),
    },
}


def read_options(command: str, arguments: list[str]) -> argparse.Namespace:
    """Return what a command was told; fields of `SophonConfig` are there only where they were named.

    Args:
        command: Its name.
        arguments: What follows it: a configuration file, if any, other words, and flags.

    Raises:
        ValueError: An unknown name (the closest one is named), a wrong or a missing value, or a broken file.
        FileNotFoundError: There is no such file.
        SystemExit: After `--help`.
    """
    parser = _Parser(command)
    flags, words = parser.read_flags(arguments)
    file = parser.read_file(words.pop(0)) if words and words[0].endswith((".yaml", ".yml")) else {}
    names = _WORDS.get(command, [])
    if len(words) > len(names):
        parser.error(f"{words[len(names)]!r} belongs to no flag (a configuration file ends in .yaml or .yml)")
    named = dict(zip(names[len(names) - len(words) :], words, strict=True))
    options = {**parser.defaults, **file, **named, **flags}
    if missing := [f"--{name}" for name in parser.required if options[name] is None]:
        parser.error(f"the following are required, as flags or in a configuration file: {', '.join(missing)}")
    return argparse.Namespace(**options)


class _Parser(argparse.ArgumentParser):
    """The flags of a command."""

    def __init__(self, command: str):
        words = [_SHOWN.get(name, "DIR") for name in _WORDS.get(command, [])]
        what = COMMANDS[command]
        super().__init__(
            prog=f"sophon-hf {command}",
            usage=" ".join(["%(prog)s [CONFIG.yaml]", *(f"[{word}]" for word in words), "[--flag value ...]"]),
            description=f"{what[0].upper()}{what[1:]}. A YAML file, which comes first, may hold any flag as a key, and "
            "may be the same file for all commands. Flags win.",
            epilog=_EPILOGS.get(command),
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
        )
        shared = {name: flag for name, flag in _FLAGS.items() if command in flag.commands.split()}
        flags = _OWN_FLAGS.get(command, shared)
        self.defaults = {name: flag.default for name, flag in flags.items()}
        self.required = [name for name, flag in flags.items() if command in flag.required.split()]
        self.nullable = {name for name, flag in flags.items() if flag.default is None}
        for name, flag in flags.items():
            self._add(name, flag)
        if command == "protect":
            self._add_config(set(flags))

    def _add_config(self, known: set[str]) -> None:
        theirs, own = training_fields(), sophon_fields()
        for name, field in {**own, **{n: f for n, f in theirs.items() if n not in own}}.items():
            if field.nullable:
                self.nullable.add(name)
            if name in known:
                continue
            # Among a hundred fields of the Trainer SOPHON's would not be found.
            text = field.metadata.get("help", "") if name in own else argparse.SUPPRESS
            choices = [c for f in (field, theirs.get(name)) if f is not None and (c := f.metadata.get("choices"))]
            more = {key: field.metadata[key] for key in ("nargs", "const") if key in field.metadata}
            flag = _Flag("protect", text, field.kind, field.default, choices=choices[0] if choices else None)
            self._add(name, flag, **more)

    def _add(self, name: str, flag: _Flag, **more: Any) -> None:
        """Add a flag, and for a switch that is on also the one that turns it off."""
        how: dict[str, Any]
        if flag.kind == "bool":
            how = {"type": _truth, "nargs": "?", "const": True}
        elif flag.kind in _LISTS:
            how = {"type": _LISTS[flag.kind], "nargs": "+"}
        elif flag.choices:
            how = {"type": str, "choices": flag.choices}
        elif isinstance(flag.kind, str):
            how = {"type": {"int": int, "float": float, "str": str}.get(flag.kind, _json_or_text)}
        else:
            how = {"type": flag.kind}
        text = flag.help
        if text is not argparse.SUPPRESS:
            shown = "" if flag.default is None else f" (default: {flag.default})"
            text = f"{text.rstrip('.')}{shown}".replace("%", "%%")
        self.add_argument(f"--{name}", help=text, metavar=None if flag.choices else "VALUE", **{**how, **more})
        if flag.kind == "bool" and flag.default is True:
            self.add_argument(f"--no_{name}", dest=name, action="store_false", help=argparse.SUPPRESS)

    def error(self, message: str) -> NoReturn:
        """Leave it to `main` how a mistake is told."""
        end = "" if message.endswith(("?", ".")) else "."
        raise ValueError(f"{message}{end} `{self.prog} --help` explains the flags.")

    def read_flags(self, arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
        """Return what flags say, and the words that belong to none."""
        normal = []
        for argument in arguments:
            if argument.startswith("--"):
                name, equals, value = argument[2:].partition("=")
                name = name.replace("-", "_")
                known = [option[2:] for option in self._option_string_actions if option.startswith("--")]
                if name not in known:
                    close = hint(name, known).replace("'", "'--", 1)
                    self.error(f"There is no flag '--{name}'.{close}")
                argument = f"--{name}{equals}{value}"
            normal.append(argument)
        options, words = self.parse_known_args(normal)
        if flags := [word for word in words if word.startswith("-")]:
            self.error(f"There is no flag {flags[0]!r}")
        return vars(options), words

    def read_file(self, path: str) -> dict[str, Any]:
        """Return what a configuration file says to this command, after the checks that a flag goes through."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"There is no file {path!r}.")
        values = read_yaml(path) or {}
        if not isinstance(values, dict):
            raise ValueError(f"{path} must hold fields (`model: ...`), not a {type(values).__name__}.")
        actions = {action.dest: action for action in reversed(self._actions) if action.dest != "help"}
        options: dict[str, Any] = {}
        for name, value in values.items():
            try:
                if name not in actions:
                    # A key of another command's is left to it.
                    known = {*_FLAGS, *(n for flags in _OWN_FLAGS.values() for n in flags)}
                    known |= {*sophon_fields(), *training_fields()}
                    if name not in known:
                        raise ValueError(f"no command has such a key.{hint(name, known)}")
                elif isinstance(value, bool) and actions[name].const is True:
                    # A switch, which may also take a text.
                    options[name] = value if value or actions[name].type is _truth else None
                elif value is None:
                    if name not in self.nullable:
                        raise ValueError("it cannot be null; leave it out for its default")
                    options[name] = None
                else:
                    options |= self.read_flags([f"--{name}", *_as_texts(actions[name], value)])[0]
            except ValueError as error:
                raise ValueError(f"{path}: {name}: {error}") from error
        return options


def _as_texts(action: argparse.Action, value: Any) -> list[str]:
    """Return a value of a file as the arguments of its flag."""
    texts = []
    for item in value if isinstance(value, list) and action.nargs == "+" else [value]:
        if isinstance(item, (dict, list)):
            if action.type is not _json_or_text:
                raise ValueError(f"it takes {'a list of values' if action.nargs == '+' else 'one value'}, not {item!r}")
            item = json.dumps(item)
        elif isinstance(item, bool):
            if item is False and "no" in (action.choices or ()):
                item = "no"
            elif action.type is str:
                raise ValueError("YAML reads an unquoted yes, no, on or off as a truth value: put it in quotes")
            item = str(item).lower()
        texts.append(str(item))
    return texts


def _truth(text: str) -> bool:
    if text.lower() in ("true", "yes", "1", "t", "y"):
        return True
    if text.lower() in ("false", "no", "0", "f", "n"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def _json_or_text(text: str) -> Any:
    """Read JSON where it is a list, a mapping or a truth value; anything else is a text, such as a file's name."""
    if text.lstrip()[:1] not in ("{", "[") and text not in ("true", "false"):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from error

"""`sophon.json`: what is claimed of a protected model, with the hashes that tie the claim to its weights.

A downloaded one is a stranger's file: pydantic reads it field by field, and nothing in it is run or opened.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveInt, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from sophon_hf.attacks.checks import FailedCheck, check, void_reason
from sophon_hf.attacks.results import AttackResults
from sophon_hf.attacks.score import AttackSummary, RecoveredTransfer, Scores
from sophon_hf.data.fingerprint import DataFingerprint, is_base_name_or_hub_id
from sophon_hf.finetuning.strategy import StrategySpace
from sophon_hf.utils import write_atomically

FILE_NAME = "sophon.json"
SCHEMA = 1

_MAX_BYTES = 16 * 2**20
_LONGEST_SHOWN = 80
# The plain dataclasses of other rooms are read in the same way where they stand in one of these.
_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
_Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True, config=_STRICT)
class Method:
    """How the model was protected.

    Attributes:
        name: The algorithm.
        hyper_parameters: Those of `SophonConfig`, under its names.
        strategy_space: Phi.
    """

    name: str
    hyper_parameters: dict[str, Any]
    strategy_space: StrategySpace


@dataclass(frozen=True, config=_STRICT)
class Protection:
    """What the guard saw, on data held out of the defender's.

    Attributes:
        status: "protected" (a state inside the tolerance), "not protected" (there was none, or every suppression
            gradient was dropped, and the last good state was put back), "not measured" (no guard), "in progress" (a
            checkpoint).
        iteration: Whose state this is.
        original_before: The original metric before protection, where measured.
        original_after: The same of this state.
        simulated_examples: How many restricted examples the guard's simulated adversaries had.
        simulated_before: What the strongest of them reached in the restricted domain before protection.
        simulated_after: The same of this state.
        simulated_scratch: The same from scratch.
        rollbacks: How often the last good state was put back.
        dropped: Suppression gradients that were not finite and therefore not applied.
    """

    status: Annotated[str, Field(pattern="^(protected|not protected|not measured|in progress)$")]
    iteration: NonNegativeInt
    original_before: float | None
    original_after: float | None
    simulated_examples: PositiveInt
    simulated_before: float | None
    simulated_after: float | None
    simulated_scratch: float | None
    rollbacks: NonNegativeInt
    dropped: NonNegativeInt


@dataclass(frozen=True, config=_STRICT)
class Compute:
    """What the protection cost.

    Attributes:
        seconds: Of wall-clock time.
        iterations: Of Algorithm 1.
        simulated_passes: Forward and backward passes of simulated adversaries, on all processes.
    """

    seconds: NonNegativeFloat
    iterations: NonNegativeInt
    simulated_passes: NonNegativeInt


@dataclass(frozen=True, config=_STRICT)
class AttackReport:
    """What the attacks found.

    Attributes:
        sweep: Name of the sweep, or base name of its file.
        seeds: Those asked for.
        versions: Libraries that the attacks ran on.
        data: "training" and "validation" (the adversary's), "test", and where given "original" (to warm up on) and
            "original_test".
        precision: Of the attacks' forward passes; weights are float32 in both.
        chance: By domain the test metric of the best answer that looks at no input (the commonest class, say), where it
            can be computed.
        original_metric: The original domain's test metric of each model, where measured.
        attacks: All of them, on all models.
        recovered_transfer: The score of the whole sweep.
        failed_checks: Reasons to doubt it.
    """

    sweep: str
    seeds: Annotated[list[int], Field(min_length=1)]
    versions: dict[str, str]
    data: dict[str, DataFingerprint]
    precision: Annotated[str, Field(pattern="^(float32|bf16)$")]
    chance: dict[Annotated[str, Field(pattern="^(original|restricted)$")], float]
    original_metric: dict[str, float]
    attacks: list[AttackSummary]
    recovered_transfer: RecoveredTransfer
    failed_checks: list[FailedCheck]

    def __post_init__(self) -> None:
        if not is_base_name_or_hub_id(self.sweep):
            raise ValueError(f"sweep is {self.sweep!r}, but must be a name, without a path.")
        transfer = self.recovered_transfer
        if (transfer.value is None) == (transfer.void is None) or (transfer.value is None and transfer.interval):
            raise ValueError("recovered_transfer must have a value, with its interval, or void must say why not.")
        if transfer.interval is not None and transfer.interval[0] > transfer.interval[1]:
            raise ValueError(f"the interval of recovered_transfer is {transfer.interval}: its ends are swapped.")

    @classmethod
    def from_results(cls, results: AttackResults) -> AttackReport:
        """Return what `sophon-hf attack` left in results.json, without curves and without names of the machine."""
        # A message of the operating system may hold a path; the type of the error says enough.
        runs = [replace(r, error=r.error.split(":")[0] if r.failed and r.error else r.error) for r in results.runs]
        results = replace(results, runs=runs)
        failed, scores, facts = check(results), results.scores(), results.facts
        void = void_reason(failed)
        return cls(
            sweep=Path(str(facts.get("sweep", "custom"))).name,
            seeds=list(facts.get("seeds") or sorted({run.seed for run in runs})),
            versions=dict(facts.get("versions", {})),
            data={name: DataFingerprint(**values) for name, values in facts.get("fingerprints", {}).items()},
            precision=facts.get("precision", "float32"),
            chance=scores.chance,
            original_metric={n: float(v) for n, v in results.original_metric.items() if math.isfinite(v)},
            attacks=list(scores.attacks),
            recovered_transfer=scores.recovered_transfer()
            if void is None
            else RecoveredTransfer(None, None, _plain(void)),
            failed_checks=[FailedCheck(_plain(f.name), _plain(f.message), f.voids) for f in failed],
        )


@dataclass(frozen=True, config=_STRICT)
class Claim:
    """The content of sophon.json.

    Attributes:
        schema: Version of this form.
        method: How the model was protected.
        model: Class of the model.
        base_model: Hub id or folder base name of the original, where known.
        base_revision: Its commit on the Hub, where known.
        remote_code: Whether the original was loaded with code from its repository, because the user asked for it.
        versions: Libraries that the protection ran on.
        data: "original", "restricted", and the held-out "eval_original" and "eval_restricted".
        weights: SHA-256 of each safetensors file, by its name relative to the folder.
        state_hash: Hash of the weights as a model holds them: an attack report names the model that it attacked by it.
        metric: Its name, "accuracy" or "f1" say.
        greater_is_better: Whether a greater metric is better; such a metric lies in [0, 1].
        protection: What the guard saw.
        compute: What the protection cost.
        attacks: What the attacks found; None where none were run, and then no resistance is claimed.
    """

    schema: int
    method: Method
    model: str
    base_model: str | None
    base_revision: str | None
    remote_code: bool
    versions: dict[str, str]
    data: dict[str, DataFingerprint]
    weights: Annotated[dict[str, _Sha256], Field(min_length=1)]
    state_hash: str
    metric: Annotated[str, Field(min_length=1, max_length=100)]
    greater_is_better: bool
    protection: Protection
    compute: Compute
    attacks: AttackReport | None

    def __post_init__(self) -> None:
        if not self.model.isidentifier():
            raise ValueError(f"model is {self.model!r}, but must be the name of a class.")
        # Of these two the direction is known; the wrong one would turn every verdict round.
        if self.metric in ("accuracy", "mse") and self.greater_is_better != (self.metric == "accuracy"):
            raise ValueError(f"greater_is_better is {self.greater_is_better}, which does not go with {self.metric}.")
        if self.base_model is not None and not is_base_name_or_hub_id(self.base_model):
            raise ValueError(f"base_model is {self.base_model!r}, but must be a Hub id or a folder's base name.")
        for name in self.weights:
            if not _is_weight_file(name):
                raise ValueError(f"weights names {name!r}, which is not a safetensors file inside the folder.")

    @property
    def scores(self) -> Scores:
        """Return what scores the attacks; without any, no model has a best one."""
        report = self.attacks
        if report is None:
            return Scores((), self.metric, self.greater_is_better, 1)
        examples = report.data["test"].examples if "test" in report.data else 1
        chose = report.data.get("validation") or report.data.get("training")
        original = report.data.get("original_test")
        return Scores(
            report.attacks,
            self.metric,
            self.greater_is_better,
            examples,
            report.original_metric,
            None if chose is None else chose.examples,
            report.chance,
            None if original is None else original.examples,
        )

    @property
    def intactness(self) -> tuple[float, float] | None:
        """Return the original metric before and after: of the attacks' test split, else as the guard measured it."""
        if self.measured_on_test:
            metric = self.scores.original_metric
            return metric["original"], metric["protected"]
        before, after = self.protection.original_before, self.protection.original_after
        return None if before is None or after is None else (before, after)

    @property
    def measured_on_test(self) -> bool:
        """Return whether attacks measured the original domain's test split, before and after protection."""
        return {"original", "protected"} <= self.scores.original_metric.keys()

    @property
    def intactness_data(self) -> DataFingerprint | None:
        """Return what `intactness` was measured on, where the claim says so."""
        if self.attacks is not None and self.measured_on_test:
            return self.attacks.data.get("original_test")
        return self.data.get("eval_original")

    @classmethod
    def read(cls, path: str | os.PathLike) -> Claim:
        """Read a claim and check every field.

        Args:
            path: The file, or the folder that holds it.

        Raises:
            FileNotFoundError: There is none.
            ValueError: The file is too large, not JSON, of another version, or a field is wrong; the field is named.
        """
        path = Path(path)
        path = path / FILE_NAME if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: `SophonTrainer` writes it beside the model that it saves.")
        with open(path, "rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise ValueError(f"{path.name} is larger than {_MAX_BYTES / 2**20:g} MiB: a claim is smaller.")
        return cls.from_json(content)

    @classmethod
    def from_json(cls, content: str | bytes) -> Claim:
        """Return the claim that a text holds, checked as `read` does it."""
        values = parse_json(content, FILE_NAME)
        version = values.get("schema") if isinstance(values, dict) else None
        if type(version) is int and version != SCHEMA:
            advice = "update sophon_hf (pip install -U sophon-hf)" if version > SCHEMA else "publish the model again"
            raise ValueError(f"{FILE_NAME} has schema {version}, and this sophon_hf reads {SCHEMA}: {advice}.")
        _check_printable(values)
        try:
            # Written again first: what was checked is what is read, whichever of two fields of one name a parser takes.
            return _CLAIM.validate_json(json.dumps(values))
        except ValidationError as error:
            raise ValueError(f"{FILE_NAME}: {_first_error(error)}.") from error
        except RecursionError as error:
            raise ValueError(f"{FILE_NAME} is nested too deeply.") from error

    def to_json(self) -> str:
        """Return the text that `from_json` reads.

        Raises:
            ValueError: A field would not be read again.
        """
        text = json.dumps(asdict(self), indent=1, allow_nan=False)
        Claim.from_json(text)
        return text + "\n"

    def write(self, path: str | os.PathLike) -> None:
        """Write the file (or sophon.json in a folder) in full or not at all."""
        path = Path(path)
        write_atomically(path / FILE_NAME if path.is_dir() else path, self.to_json())


_CLAIM = TypeAdapter(Claim)


def parse_json(content: str | bytes, file: str) -> Any:
    """Parse JSON as its standard has it, without NaN and infinity.

    Raises:
        ValueError: It is not JSON.
    """

    def refuse(name: str) -> None:
        raise ValueError(f"it holds {name}, which JSON does not know")

    try:
        return json.loads(content, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}.") from error


def _check_printable(values: Any) -> None:
    """Raise a ValueError where a text at any depth holds what may not reach a terminal or a card.

    Such are escape sequences and marks that turn the direction of writing. pydantic has no type for this, and would not
    look into `hyper_parameters`.
    """
    waiting = [("", values)]
    # Without recursion, since a stranger decides on the depth.
    while waiting:
        where, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [(f"a name in {where or 'the file'}", name) for name in value]
            waiting += [(f"{where}.{name}".lstrip("."), inner) for name, inner in value.items()]
        elif isinstance(value, list):
            waiting += [(f"{where}[{number}]", inner) for number, inner in enumerate(value)]
        elif isinstance(value, str) and not value.isprintable():
            raise ValueError(f"{FILE_NAME}: {where} holds characters that cannot be shown: {_shown(value)}.")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{FILE_NAME}: {where} is not finite.")


def _first_error(error: ValidationError) -> str:
    """Say which field is wrong and why, in pydantic's words; the value is shown where it is short."""
    first = error.errors(include_url=False, include_context=False)[0]
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    message = first["msg"].removeprefix("Value error, ").rstrip(".")
    shown = "" if first["type"] in ("value_error", "missing") else f" (it is {_shown(first['input'])})"
    return f"{where or 'the whole'}: {message}{shown}"


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def hash_weights(folder: str | os.PathLike) -> dict[str, str]:
    """Return the SHA-256 of each safetensors file of a saved model, without checkpoints and hidden folders.

    Returns:
        File name relative to the folder, with "/" -> 64 hexadecimal digits.
    """
    hashes = {}
    for path in sorted(Path(folder).rglob("*.safetensors")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and _is_weight_file(name):
            with open(path, "rb") as file:
                digest = hashlib.sha256()
                while chunk := file.read(2**20):
                    digest.update(chunk)
            hashes[name] = digest.hexdigest()
    return hashes


def _is_weight_file(name: str) -> bool:
    """Return whether a name, relative to the folder and with "/", is that of a saved model's weights inside it."""
    hidden = any(not part or part.startswith((".", "checkpoint-")) for part in name.split("/"))
    return name.endswith(".safetensors") and not hidden and re.search(r"[\\:]", name) is None


def printable(text: str) -> str:
    """Replace what moves a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _plain(text: str) -> str:
    return printable(" ".join(text.split()))

"""`sophon.json`: what is claimed of a protected model, with the hashes that tie the claim to its weights.

One that was downloaded is a stranger's file: it is read field by field, and nothing in it is run, opened or believed.
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from sophon_hf.attacks.checks import FailedCheck, check, void_reason
from sophon_hf.attacks.results import AttackResults
from sophon_hf.attacks.score import mean_of_finite
from sophon_hf.data.fingerprint import DataFingerprint, is_base_name_or_hub_id
from sophon_hf.finetuning.strategy import FineTuningStrategy, StrategySpace, check_choice
from sophon_hf.hub.schema import parse_json, read_dataclass
from sophon_hf.hub.weights import is_weight_file
from sophon_hf.utils import write_atomically

FILE_NAME = "sophon.json"
SCHEMA = 1
MAX_BYTES = 16 * 2**20
STATUSES = ("protected", "not protected", "not measured", "in progress")
METRICS = ("accuracy", "mse")


@dataclass(frozen=True)
class Method:
    """How the model was protected.

    Attributes:
        name: The algorithm.
        hyper_parameters: Those of `SophonConfig`, under its names.
        strategy_space: Phi, as `StrategySpace.to_dict` writes it.
    """

    name: str
    hyper_parameters: dict[str, Any]
    strategy_space: dict[str, Any]

    def __post_init__(self) -> None:
        StrategySpace.from_dict(self.strategy_space)


@dataclass(frozen=True)
class Protection:
    """What the guard saw, on data held out of the defender's.

    Attributes:
        status: "protected" (a state inside the tolerance), "not protected" (there was none, or every suppression
            gradient was dropped, and the last good state was put back), "not measured" (no guard), "in progress" (a
            checkpoint).
        iteration: Whose state this is.
        original_before: The original metric before protection, where measured.
        original_after: The same of this state.
        simulated_before: What the guard's simulated adversaries reached in the restricted domain before protection.
        simulated_after: The same of this state.
        rollbacks: How often the last good state was put back.
        dropped: Suppression gradients that were not finite and therefore not applied.
    """

    status: str
    iteration: int
    original_before: float | None
    original_after: float | None
    simulated_before: float | None
    simulated_after: float | None
    rollbacks: int
    dropped: int

    def __post_init__(self) -> None:
        check_choice(self.status, STATUSES, "status")
        for name in ("iteration", "rollbacks", "dropped"):
            _not_negative(getattr(self, name), name)


@dataclass(frozen=True)
class Compute:
    """What the protection cost.

    Attributes:
        seconds: Of wall-clock time.
        iterations: Of Algorithm 1.
        simulated_passes: Forward and backward passes of simulated adversaries, on all processes.
    """

    seconds: float
    iterations: int
    simulated_passes: int

    def __post_init__(self) -> None:
        for field in fields(self):
            _not_negative(getattr(self, field.name), field.name)


@dataclass(frozen=True)
class AttackFigures:
    """One attack on one model.

    Attributes:
        model: "protected", "original", "scratch", or a further baseline.
        strategy: As `FineTuningStrategy.to_dict` writes it.
        seeds: Those whose run ended.
        epoch: Where the adversary stops, chosen on validation data; None where nothing could be chosen.
        validation: Mean there, over the seeds that are finite.
        test: Metric in the restricted domain there, one value a seed; None where it is not finite.
        final: The same at the last measured epoch.
        failed: Seeds whose run broke off.
        applicable: False where the strategy cannot be carried out on the model, which is no resistance.
    """

    model: str
    strategy: dict[str, Any]
    seeds: list[int]
    epoch: float | None
    validation: float | None
    test: list[float | None]
    final: list[float | None]
    failed: int
    applicable: bool

    def __post_init__(self) -> None:
        FineTuningStrategy.from_dict(self.strategy)
        _not_negative(self.failed, "failed")
        for name in ("test", "final"):
            if len(getattr(self, name)) != len(self.seeds):
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} values, but there are {len(self.seeds)} seeds."
                )
        if (self.epoch is None) != (self.validation is None):
            raise ValueError("epoch and validation go together: both are numbers, or neither is.")

    @property
    def name(self) -> str:
        """The strategy in words."""
        return FineTuningStrategy.from_dict(self.strategy).name

    @property
    def mean(self) -> float:
        """Test metric at the chosen epoch, mean over the seeds that are finite; NaN where none is."""
        return float(mean_of_finite([math.nan if v is None else v for v in self.test]))


@dataclass(frozen=True)
class Transfer:
    """Recovered transfer: a value with its 95 % interval (None where nothing tells it), or why there is none."""

    value: float | None
    interval: list[float] | None
    void: str | None

    def __post_init__(self) -> None:
        if (self.value is None) == (self.void is None) or (self.value is None and self.interval is not None):
            raise ValueError("either a value is given, with its interval, or void says why not.")
        if self.interval is not None and (len(self.interval) != 2 or self.interval[0] > self.interval[1]):
            raise ValueError(f"interval is {self.interval}, but must be a lower and an upper end.")


@dataclass(frozen=True)
class AttackReport:
    """What the attacks found.

    Attributes:
        sweep: Name of the sweep, or base name of its file.
        seeds: Those asked for.
        versions: Libraries that the attacks ran on.
        data: "training" and "validation" (the adversary's), "test", and where given "original" (to warm up on) and
            "original_test".
        original_metric: The original domain's test metric of each model, where measured.
        attacks: All of them, on all models.
        recovered_transfer: The score of the whole sweep.
        failed_checks: Reasons to doubt it.
    """

    sweep: str
    seeds: list[int]
    versions: dict[str, str]
    data: dict[str, DataFingerprint]
    original_metric: dict[str, float]
    attacks: list[AttackFigures]
    recovered_transfer: Transfer
    failed_checks: list[FailedCheck]

    def __post_init__(self) -> None:
        if not is_base_name_or_hub_id(self.sweep):
            raise ValueError(f"sweep is {self.sweep!r}, but must be a name, without a path.")
        if not self.seeds:
            raise ValueError("seeds is empty.")

    @classmethod
    def from_results(cls, results: AttackResults) -> AttackReport:
        """What `sophon-hf attack` left in results.json, without curves and without anything that names a machine."""
        # A message of the operating system may hold a path; the type of the error says enough.
        cells = [replace(c, error=c.error.split(":")[0] if c.failed else c.error) for c in results.runs]
        results = replace(results, runs=cells)
        failed, transfer = check(results), results.recovered_transfer()
        void = void_reason(failed)
        facts = results.facts
        return cls(
            sweep=Path(str(facts.get("sweep", "custom"))).name,
            seeds=list(facts.get("seeds") or sorted({c.seed for c in cells})),
            versions=dict(facts.get("versions", {})),
            data={name: DataFingerprint(**values) for name, values in facts.get("fingerprints", {}).items()},
            original_metric={n: float(v) for n, v in results.original_metric.items() if math.isfinite(v)},
            attacks=_attacks(results),
            recovered_transfer=Transfer(None, None, _plain(void))
            if void
            else Transfer(transfer.value, transfer.interval and list(transfer.interval), None),
            failed_checks=[FailedCheck(_plain(f.name), _plain(f.message), f.voids) for f in failed],
        )

    def strongest(self, model: str, greater_is_better: bool) -> AttackFigures | None:
        """The attack on a model with the best validation metric, as `AttackResults.best` chooses it."""
        found = [a for a in self.attacks if a.model == model and a.validation is not None]
        sign = 1 if greater_is_better else -1
        return max(found, key=lambda attack: sign * attack.validation, default=None)


@dataclass(frozen=True)
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
        metric: "accuracy" or "mse".
        greater_is_better: Whether a greater metric is better.
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
    weights: dict[str, str]
    state_hash: str
    metric: str
    greater_is_better: bool
    protection: Protection
    compute: Compute
    attacks: AttackReport | None

    def __post_init__(self) -> None:
        check_choice(self.metric, METRICS, "metric")
        if not self.model.isidentifier():
            raise ValueError(f"model is {self.model!r}, but must be the name of a class.")
        if self.greater_is_better != (self.metric == "accuracy"):
            raise ValueError(f"greater_is_better is {self.greater_is_better}, which does not go with {self.metric}.")
        if self.base_model is not None and not is_base_name_or_hub_id(self.base_model):
            raise ValueError(f"base_model is {self.base_model!r}, but must be a Hub id or a folder's base name.")
        if not self.weights:
            raise ValueError("weights is empty: there is nothing that the claim could be about.")
        for name, digest in self.weights.items():
            if not is_weight_file(name):
                raise ValueError(f"weights names {name!r}, which is no safetensors file inside the folder.")
            if not re.fullmatch(r"[0-9a-f]{64}", digest):
                raise ValueError(f"weights[{name!r}] is {digest!r}, but must be 64 hexadecimal digits.")

    @property
    def measured_on_test(self) -> bool:
        """Whether attacks measured the original domain's test split, before and after protection."""
        return self.attacks is not None and {"original", "protected"} <= set(self.attacks.original_metric)

    @property
    def intactness_data(self) -> DataFingerprint | None:
        """What `intactness` was measured on, where the claim says so."""
        return self.attacks.data.get("original_test") if self.measured_on_test else self.data.get("eval_original")

    @property
    def intactness(self) -> tuple[float, float] | None:
        """The original metric before and after: on the test split where attacks measured it, else as the guard did."""
        if self.measured_on_test:
            return self.attacks.original_metric["original"], self.attacks.original_metric["protected"]
        before, after = self.protection.original_before, self.protection.original_after
        return None if before is None or after is None else (before, after)

    @classmethod
    def read(cls, path: str | os.PathLike) -> Claim:
        """Read and check every field.

        Args:
            path: The file, or the folder that holds it.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is too large, no JSON, of an unknown version, or a field is wrong (which one is said).
        """
        path = Path(path)
        path = path / FILE_NAME if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: it comes from `SophonTrainer`, and says what is claimed.")
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError(f"{path.name} is larger than {MAX_BYTES / 2**20:g} MiB: it is no claim.")
        return cls.from_json(content)

    @classmethod
    def from_json(cls, content: str | bytes) -> Claim:
        """Check text as `read` does."""
        values = parse_json(content, FILE_NAME)
        version = values.get("schema") if isinstance(values, dict) else None
        if type(version) is int and version != SCHEMA:
            advice = "update sophon_hf (pip install -U sophon-hf)" if version > SCHEMA else "publish the model again"
            raise ValueError(f"{FILE_NAME} has schema {version}, and this sophon_hf reads {SCHEMA}: {advice}.")
        return read_dataclass(cls, values, FILE_NAME)

    def to_json(self) -> str:
        """The inverse of `from_json`.

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


def _attacks(results: AttackResults) -> list[AttackFigures]:
    return [
        AttackFigures(
            **{
                **vars(a),
                "strategy": a.strategy.to_dict(),
                **{name: list(getattr(a, name)) for name in ("seeds", "test", "final")},
            }
        )
        for a in results.summaries()
    ]


def printable(text: str) -> str:
    """Text without anything that moves a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _plain(text: str | None) -> str | None:
    return text and printable(" ".join(text.split()))


def _not_negative(value: float, name: str) -> None:
    if value < 0:
        raise ValueError(f"{name} is {value}, but must not be negative.")

"""The figures of a claim, measured again on the auditor's own data."""

from __future__ import annotations

import copy
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import load_torch_model
from torch import nn

from sophon_hf.attacks.checks import check
from sophon_hf.attacks.report import write_report
from sophon_hf.attacks.results import AttackResults
from sophon_hf.attacks.run import EVALUATION_BATCH
from sophon_hf.attacks.suite import AttackSuite, process_state
from sophon_hf.attacks.sweeps import SWEEPS, scratch
from sophon_hf.auditing.download import check_configurations, fetch
from sophon_hf.auditing.verdicts import (
    NOT_CHECKABLE,
    REPRODUCED,
    TAMPERED,
    Verdict,
    judge_intactness,
    judge_strongest,
    judge_transfer,
)
from sophon_hf.data.domain import build_domain
from sophon_hf.data.fingerprint import fingerprint_domain
from sophon_hf.data.loading import Source, load_domain
from sophon_hf.finetuning.strategy import USUAL_EPOCHS, FineTuningStrategy
from sophon_hf.hub.claim import Claim
from sophon_hf.models.loading import hash_state, load_model, load_processor
from sophon_hf.tasks.base import Task, load_task
from sophon_hf.tasks.evaluation import evaluate_model

# A stranger's strategy that takes longer than so many times the longest of the sweep is not run.
LONGEST = 10


@dataclass(frozen=True)
class Measurement:
    """What an auditor measures with; the fields are the arguments of `audit`."""

    restricted: Source | None
    test: Source | None
    original: Source | None
    original_test: Source | None
    sweep: str | Path | Sequence[FineTuningStrategy]
    seeds: list[int]
    epochs: float | None
    examples: int | None
    output_dir: Path
    input_columns: dict[str, str | None]
    label_columns: dict[str, str | None]


@dataclass
class Models:
    """The protected model and, where it can be had, the one before protection.

    Attributes:
        state: Whether the protected model is the one that the claim is about.
        protected: None where it does not load, or is another one.
        unprotected: None where it is out of reach; then `why` says why.
        why: See there.
        task: What they learned.
        processor: What prepares their raw inputs.
    """

    state: Verdict
    protected: nn.Module | None = None
    unprotected: nn.Module | None = None
    why: str = ""
    task: Task | None = None
    processor: Any | None = None


def load_models(claim: Claim, folder: Path, stage: Path, given: nn.Module | str | None) -> Models:
    """Load both models from safetensors and JSON.

    Args:
        claim: Names the model before protection, where none is given.
        folder: Of the protected model, checked.
        stage: Gets the files of the other one.
        given: The model before protection: Hub id, folder, or the model itself.

    Raises:
        OSError, ValueError: The given model cannot be loaded.
    """
    unprotected, why = _load_unprotected(claim, stage, given)
    if unprotected is None and not _is_configured(folder):
        why = "there is no config.json, so the model's class is not known: pass the unprotected model itself in Python"
        return Models(Verdict("state", NOT_CHECKABLE, why=why))
    try:
        protected = load_model(folder) if _is_configured(folder) else _like(unprotected, folder)
    except (ImportError, MemoryError) as error:
        return Models(Verdict("state", NOT_CHECKABLE, why=f"it cannot be loaded here: {_first_line(error)}"))
    except Exception as error:  # Whatever a stranger's files make a library raise.
        why = f"it does not load: {type(error).__name__}: {_first_line(error)}"
        return Models(Verdict("state", TAMPERED, why=why))
    if hash_state(protected) != claim.state_hash:
        why = "the loaded model's parameters are not those that the claim is about"
        return Models(Verdict("state", TAMPERED, why=why))
    state = Verdict("state", REPRODUCED, why="the loaded model holds what the claim is about")
    for model in (protected, unprotected):
        if model is not None:
            model.to(process_state().device)
    task, processor = load_task(folder, protected), load_processor(folder, protected)
    return Models(state, protected, unprotected, why, task, processor)


def _load_unprotected(claim: Claim, stage: Path, given: nn.Module | str | None) -> tuple[nn.Module | None, str]:
    """The model, or why there is none."""
    if isinstance(given, nn.Module):
        return copy.deepcopy(given), ""
    if given is not None:
        return _load_stranger(os.fspath(given), stage, None), ""
    if claim.base_model is None or "/" not in claim.base_model:
        return None, "no unprotected model: the claim names none on the Hub, and none was given (--unprotected)"
    try:
        return _load_stranger(claim.base_model, stage, claim.base_revision), ""
    except (OSError, ValueError) as error:
        return None, (
            f"no unprotected model: {claim.base_model!r}, which the claim names, cannot be had: {_first_line(error)}"
        )


def _load_stranger(source: str, stage: Path, revision: str | None) -> nn.Module:
    folder = fetch(source, stage, revision).folder
    check_configurations(folder)
    return load_model(folder)


def _is_configured(folder: Path) -> bool:
    return (folder / "config.json").exists() or (folder / "model_index.json").exists()


def _like(model: nn.Module, folder: Path) -> nn.Module:
    """A plain module's weights in a copy of the model that it was made from."""
    model = copy.deepcopy(model)
    load_torch_model(model, folder, strict=True, safe=True)
    return model


def measure(claim: Claim, models: Models, how: Measurement) -> tuple[list[Verdict], list[str], dict[str, Any]]:
    """Measure what the data allow.

    Returns:
        Verdicts, notes, and facts of how it was measured.

    Raises:
        ValueError: Data that do not fit the model, or models of different architecture.
    """
    verdicts, notes, facts, results = [], [], {}, None
    if claim.attacks is None:
        notes.append("The claim holds no attack report: no resistance is claimed, and none was measured.")
    elif how.restricted is None or models.unprotected is None:
        why = models.why if how.restricted is not None else "needs data of the restricted domain (--restricted)"
        verdicts += [
            Verdict(name, NOT_CHECKABLE, why=why)
            for name in (f"strongest attack's {claim.metric}", "recovered transfer")
        ]
    else:
        suite, left_out = _suite(claim, models, how)
        results = suite.run(
            protected=models.protected,
            original=models.unprotected,
            restricted_dataset=how.restricted,
            eval_dataset=how.test,
            original_dataset=how.original,
            original_eval_dataset=how.original_test,
        )
        write_report(results, how.output_dir / "report")
        same_data = _same_data(claim, results)
        judged = judge_strongest(claim, results, same_data), judge_transfer(claim, results, same_data)
        verdicts += [_as_strong(verdict, claim, results, left_out) for verdict in judged]
        notes += _attack_notes(claim, results, same_data)
        facts |= {name: results.facts[name] for name in ("seeds", "versions", "fingerprints")}
        facts["attacks"] = [strategy.to_dict() for strategy in suite.strategies]
    if how.original_test is None:
        why = "needs data of the original domain (--original)"
        verdicts.append(Verdict(f"original {claim.metric} after protection", NOT_CHECKABLE, why=why))
    else:
        verdict, facts["original_test"] = _intactness(claim, models, how, results)
        verdicts.append(verdict)
    return verdicts, notes, facts


def _intactness(
    claim: Claim, models: Models, how: Measurement, results: AttackResults | None
) -> tuple[Verdict, dict[str, Any]]:
    domain = build_domain(
        load_domain(how.original_test, "test"),
        models.task.inputs(models.protected),
        models.processor,
        name="original",
        input_column=how.input_columns.get("original"),
        label=how.label_columns.get("original"),
    )
    fingerprint, theirs = fingerprint_domain(domain), claim.intactness_data
    measured = dict(results.original_metric) if results is not None else {}
    for name, model in (("protected", models.protected), ("original", models.unprotected)):
        if name not in measured and model is not None:
            measured[name] = evaluate_model(models.task, model, domain, EVALUATION_BATCH).metric
    same_data = theirs is not None and theirs.hash == fingerprint.hash
    verdict = judge_intactness(claim, measured.get("original"), measured["protected"], len(domain), same_data)
    return verdict, asdict(fingerprint)


def _suite(claim: Claim, models: Models, how: Measurement) -> tuple[AttackSuite, list[str]]:
    """The attacks at the claim's budget, and which of the claim's own are left out."""
    data, epochs = claim.attacks.data, how.epochs
    if epochs is None and str(how.sweep) in SWEEPS:
        epochs = _claimed_epochs(claim)
    examples = data["training"].examples if how.examples is None and "training" in data else how.examples
    suite = AttackSuite(
        how.sweep,
        how.output_dir,
        seeds=how.seeds,
        epochs=epochs,
        examples=examples,
        task=models.task,
        processing_class=models.processor,
        input_columns=how.input_columns,
        label_columns=how.label_columns,
    )
    suite.strategies, left_out = _with_claimed(suite.strategies, claim)
    best = claim.attacks.strongest("protected", claim.greater_is_better)
    if best is not None:
        suite.measured_epochs = sorted({*suite.measured_epochs, best.epoch})
    return suite, left_out


def _same_data(claim: Claim, results: AttackResults) -> bool:
    ours, theirs = results.facts["fingerprints"], claim.attacks.data
    return all(name in theirs and ours[name]["hash"] == theirs[name].hash for name in ("training", "test"))


def _as_strong(verdict: Verdict, claim: Claim, results: AttackResults, left_out: list[str]) -> Verdict:
    """A verdict on resistance passes only where the adversary was at least the claim's."""
    theirs = claim.attacks.data.get("training")
    ours = results.facts["fingerprints"]["training"]["examples"]
    why = None
    if left_out:
        why = f"not repeated, since it would take too long or names layers by a pattern: {left_out[0]}"
    elif theirs is not None and ours < theirs.examples:
        why = f"the audit's adversary had {ours} examples, the claim's {theirs.examples}: give as many"
    if why is None or verdict.verdict != REPRODUCED:
        return verdict
    return replace(verdict, verdict=NOT_CHECKABLE, why=why)


def _attack_notes(claim: Claim, results: AttackResults, same_data: bool) -> list[str]:
    whose = "the claim's own data" if same_data else "other data than the claim's"
    notes = [f"The attacks ran on {whose}; their report is in report/index.html."]
    for prefix, checks in (("In the audit", check(results)), ("In the claim", claim.attacks.failed_checks)):
        notes += [f"{prefix}, {found.name}: {' '.join(found.message.split())}." for found in checks]
    return notes


def _with_claimed(sweep: list[FineTuningStrategy], claim: Claim) -> tuple[list[FineTuningStrategy], list[str]]:
    """The sweep with what the claim found strongest on each model, and the names of those that are left out.

    Else an audit could miss what the publisher knows of, and the original or scratch would look weaker than they are.
    """
    theirs = [FineTuningStrategy.from_dict(a.strategy) for a in claim.attacks.attacks if a.model == "protected"]
    longest = max(_passes(strategy) for strategy in sweep)
    added, left_out = [], []
    for model in ("protected", "original", "scratch"):
        best = claim.attacks.strongest(model, claim.greater_is_better)
        if best is None:
            continue
        strategy = FineTuningStrategy.from_dict(best.strategy)
        if model == "scratch":
            # Scratch is tuned over the optimizers and rates of the attacks, so the attack that lent it these is added.
            strategy = next((s for s in theirs if scratch([s]) == [strategy]), None)
            if strategy is None or scratch([strategy])[0] in scratch(sweep):
                continue
        # A stranger's regular expression may take for ever.
        if _passes(strategy) > LONGEST * longest or strategy.pattern is not None:
            left_out.append(strategy.name)
        else:
            added.append(strategy)
    return list(dict.fromkeys([*sweep, *added])), left_out


def _passes(strategy: FineTuningStrategy) -> float:
    """How long a strategy is: in epochs, or, where its steps are fixed, in hundreds of steps."""
    return strategy.epochs if strategy.steps is None else strategy.steps / 100


def _claimed_epochs(claim: Claim) -> float | None:
    """The length of the claim's ordinary attacks."""
    lengths = [a.strategy["epochs"] for a in claim.attacks.attacks if a.strategy.get("steps") is None]
    return min(statistics.mode(lengths), LONGEST * USUAL_EPOCHS) if lengths else None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]

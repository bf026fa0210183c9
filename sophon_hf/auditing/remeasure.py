"""The figures of a claim, measured again on the auditor's own data."""

from __future__ import annotations

import copy
import os
import statistics
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import transformers
from huggingface_hub import load_torch_model
from torch import nn

from sophon_hf.attacks.adversary import AdversaryData, chance_level
from sophon_hf.attacks.checks import check
from sophon_hf.attacks.report import write_report
from sophon_hf.attacks.results import AttackResults
from sophon_hf.attacks.run import EVALUATION_BATCH
from sophon_hf.attacks.suite import AttackSuite
from sophon_hf.attacks.sweeps import scratch
from sophon_hf.auditing.download import check_configurations, fetch
from sophon_hf.auditing.verdicts import (
    NOT_CHECKABLE,
    REPRODUCED,
    TAMPERED,
    Verdict,
    judge_chance,
    judge_intactness,
    judge_strongest,
    judge_transfer,
)
from sophon_hf.data.fingerprint import fingerprint_domain
from sophon_hf.data.loading import load_domain
from sophon_hf.finetuning.strategy import USUAL_EPOCHS, FineTuningStrategy
from sophon_hf.hub.claim import Claim
from sophon_hf.models.loading import agree_on_padding, hash_state, load_model, load_processor
from sophon_hf.tasks.base import Task, load_task
from sophon_hf.tasks.evaluation import evaluate_model
from sophon_hf.tasks.metrics import MetricSource
from sophon_hf.utils import process_state

# A stranger's strategy that takes longer than so many times the longest of the sweep is not run.
_LONGEST = 10


@dataclass
class Models:
    """Both models on the device of this process.

    Attributes:
        protected: The model that the claim is about.
        unprotected: The model before protection; None where it is out of reach.
        why: Why it is, where it is.
        task: What they learned.
        processor: What prepares their raw inputs.
    """

    protected: nn.Module
    unprotected: nn.Module | None
    why: str
    task: Task
    processor: Any | None


def load_models(
    claim: Claim,
    folder: Path,
    stage: Path,
    given: nn.Module | str | None,
    metric: MetricSource | None = None,
) -> tuple[Verdict, Models | None]:
    """Load both models from safetensors and JSON.

    Args:
        claim: Names the model before protection, where none is given.
        folder: Of the protected model, checked.
        stage: Gets the files of the other one.
        given: The model before protection: Hub id, folder, or the model itself.
        metric: What to measure by; the claim's, where it loads without a network, or else the task's own.

    Returns:
        Whether the protected model is the one that the claim is about, and the models where it is.

    Raises:
        OSError, ValueError: The given model cannot be loaded, or the given metric does not fit it.
    """
    unprotected, why = _load_unprotected(claim, stage, given)
    configured = (folder / "config.json").exists() or (folder / "model_index.json").exists()
    if configured:
        load = partial(load_model, folder)
    elif hasattr(transformers, claim.model) or hasattr(diffusers, claim.model):
        return Verdict(
            "state", TAMPERED, why=f"config.json is missing, without which no {claim.model} can be loaded"
        ), None
    elif unprotected is not None:
        load = partial(_like, unprotected, folder)
    else:
        reason = "there is no config.json, so the model's class is not known: pass the unprotected model in Python"
        return Verdict("state", NOT_CHECKABLE, why=reason), None
    try:
        protected = load()
    except (ImportError, MemoryError) as error:
        return Verdict("state", NOT_CHECKABLE, why=f"it cannot be loaded here: {_first_line(error)}"), None
    except Exception as error:
        # A stranger's files may make a library raise anything.
        reason = f"it does not load: {type(error).__name__}: {_first_line(error)}"
        return Verdict("state", TAMPERED, why=reason), None
    if hash_state(protected) != claim.state_hash:
        reason = "the loaded model's parameters are not those that the claim is about"
        return Verdict("state", TAMPERED, why=reason), None
    try:
        task = load_task(folder, protected, claim.metric if metric is None else metric)
    except ValueError:
        if metric is not None:
            raise
        task = load_task(folder, protected)  # The verdicts then ask for the claim's metric.
    processor = load_processor(folder, protected)
    for model in (protected, unprotected):
        if model is not None:
            agree_on_padding(model.to(process_state().device), processor)
    state = Verdict("state", REPRODUCED, why="the loaded model holds what the claim is about")
    return state, Models(protected, unprotected, why, task, processor)


def _load_unprotected(claim: Claim, stage: Path, given: nn.Module | str | None) -> tuple[nn.Module | None, str]:
    """Return the model before protection, or why there is none."""
    if isinstance(given, nn.Module):
        return load_model(copy.deepcopy(given)), ""
    if given is not None:
        return _load_stranger(os.fspath(given), stage, None), ""
    if claim.base_model is None or "/" not in claim.base_model:
        return None, "no unprotected model: the claim names none on the Hub, and none was given (--model)"
    try:
        return _load_stranger(claim.base_model, stage, claim.base_revision), ""
    except (OSError, ValueError) as error:
        why = f"{claim.base_model!r}, which the claim names, cannot be had: {_first_line(error)}"
        return None, f"no unprotected model: {why}"


def _load_stranger(source: str, stage: Path, revision: str | None) -> nn.Module:
    folder = fetch(source, stage, revision).folder
    check_configurations(folder)
    return load_model(folder)


def _like(model: nn.Module, folder: Path) -> nn.Module:
    """Load a plain module's weights into a copy of the model that it was made from."""
    model = copy.deepcopy(model)
    load_torch_model(model, folder, strict=True, safe=True)
    return model


def measure_resistance(
    claim: Claim, models: Models, data: AdversaryData, suite: AttackSuite
) -> tuple[list[Verdict], list[str], AttackResults | None]:
    """Attack both models, where there are data, and judge what the claim says of its attacks.

    Args:
        claim: What is claimed.
        models: Both models.
        data: The auditor's.
        suite: The audit's attacks, to which the claim's strongest are added.

    Returns:
        Verdicts, notes, and results where attacks ran.

    Raises:
        ValueError: Data that do not fit the model, or models of different architecture.
    """
    if claim.attacks is None:
        return [], ["The claim holds no attack report: no resistance is claimed, and none was measured."], None
    other_precision = suite.bf16 != (claim.attacks.precision == "bf16")
    if models.unprotected is None or data.training is None or data.test is None or other_precision:
        why = models.why or f"the claim's attacks ran in {claim.attacks.precision}, which this machine does not have"
        if data.training is None:
            why = "needs data of the restricted domain (--restricted)"
        names = (f"strongest attack's {claim.metric}", "recovered transfer")
        return [Verdict(name, NOT_CHECKABLE, why=why) for name in names], [], None
    suite.strategies, left_out = _with_claimed(suite.strategies, claim)
    best = claim.scores.best("protected")
    if best is not None and best.epoch is not None:
        suite.measured_epochs = sorted({*suite.measured_epochs, best.epoch})
    results = suite.run(
        protected=models.protected,
        original=models.unprotected,
        restricted_dataset=data.training,
        eval_dataset=data.test,
        original_dataset=data.original,
        original_eval_dataset=data.original_test,
    )
    write_report(results, suite.output_dir / "report")
    fingerprints, theirs = results.facts["fingerprints"], claim.attacks.data
    same_data = all(n in theirs and fingerprints[n]["hash"] == theirs[n].hash for n in ("training", "test"))
    same_test = "test" in theirs and fingerprints["test"]["hash"] == theirs["test"].hash
    chance = judge_chance(claim, "restricted", results.facts["chance"]["restricted"], same_test)
    verdicts = [judge_strongest(claim, results, same_data), judge_transfer(claim, results, same_data)]
    # A verdict on resistance passes only where the adversary was at least the claim's.
    ours, weaker = fingerprints["training"]["examples"], None
    if left_out:
        weaker = f"not repeated, since it would take too long or names layers by a pattern: {left_out[0]}"
    elif "training" in theirs and ours < theirs["training"].examples:
        weaker = f"the audit's adversary had {ours} examples, the claim's {theirs['training'].examples}: give as many"
    if weaker is not None:
        verdicts = [replace(v, verdict=NOT_CHECKABLE, why=weaker) if v.verdict == REPRODUCED else v for v in verdicts]
    whose = "the claim's own data" if same_data else "other data than the claim's"
    notes = [f"The attacks ran on {whose}; their report is in report/index.html."]
    for prefix, checks in (("In the audit", check(results)), ("In the claim", claim.attacks.failed_checks)):
        notes += [f"{prefix}, {found.name}: {' '.join(found.message.split())}." for found in checks]
    return [*verdicts, chance], notes, results


def measure_intactness(
    claim: Claim, models: Models, data: AdversaryData, results: AttackResults | None
) -> tuple[list[Verdict], dict[str, Any] | None]:
    """Measure both models on the auditor's test split of the original domain, and judge what the claim says of it.

    Returns:
        Verdicts, and the fingerprint of the split.
    """
    if data.original_test is None:
        why = "needs data of the original domain (--original)"
        return [Verdict(f"original {claim.metric} after protection", NOT_CHECKABLE, why=why)], None
    split = load_domain(data.original_test, "test")
    domain = data.domain(split, "original", models.task.inputs(models.protected), models.processor)
    fingerprint, theirs = fingerprint_domain(domain), claim.intactness_data
    # The suite has measured them already where attacks ran.
    measured = dict(results.original_metric) if results is not None else {}
    for name, model in (("protected", models.protected), ("original", models.unprotected)):
        if name not in measured and model is not None:
            measured[name] = evaluate_model(models.task, model, domain, EVALUATION_BATCH).metric
    same_data = theirs is not None and theirs.hash == fingerprint.hash
    verdicts = [judge_intactness(claim, measured.get("original"), measured["protected"], len(domain), same_data)]
    if claim.attacks is not None:
        tested = claim.attacks.data.get("original_test")
        same_test = tested is not None and tested.hash == fingerprint.hash
        verdicts.append(judge_chance(claim, "original", chance_level(models.task, domain), same_test))
    return verdicts, asdict(fingerprint)


def claimed_epochs(claim: Claim) -> float | None:
    """Return the length of the claim's ordinary attacks, at most so long that an audit of it ends."""
    lengths = [attack.strategy.epochs for attack in claim.scores.attacks if attack.strategy.steps is None]
    return min(statistics.mode(lengths), _LONGEST * USUAL_EPOCHS) if lengths else None


def _with_claimed(sweep: list[FineTuningStrategy], claim: Claim) -> tuple[list[FineTuningStrategy], list[str]]:
    """Return the sweep with what the claim found strongest on each model, and the names of those that are left out.

    Else an audit could miss what the publisher knows of, and the original or scratch would look weaker than they are.
    """
    theirs = [attack.strategy for attack in claim.scores.attacks if attack.model == "protected"]
    longest = max(_passes(strategy) for strategy in sweep)
    added, left_out = [], []
    for model in ("protected", "original", "scratch"):
        best = claim.scores.best(model)
        if best is None:
            continue
        strategy = best.strategy
        if model == "scratch":
            # Scratch is tuned over the optimizers and rates of the attacks, so the attack that lent it these is added.
            lender = next((s for s in theirs if scratch([s]) == [strategy]), None)
            if lender is None or scratch([lender])[0] in scratch(sweep):
                continue
            strategy = lender
        # A stranger's regular expression may take for ever.
        if _passes(strategy) > _LONGEST * longest or strategy.pattern is not None:
            left_out.append(strategy.name)
        else:
            added.append(strategy)
    return list(dict.fromkeys([*sweep, *added])), left_out


def _passes(strategy: FineTuningStrategy) -> float:
    """Return how long a strategy is: in epochs, or, where its steps are fixed, in hundreds of steps."""
    return strategy.epochs if strategy.steps is None else strategy.steps / 100


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]

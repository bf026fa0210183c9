"""Audit a published model: hashes and form without data, figures on the auditor's own data."""

from __future__ import annotations

import html
import json
import os
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from sophon_hf.attacks.adversary import AdversaryData
from sophon_hf.attacks.suite import AttackSuite
from sophon_hf.attacks.sweeps import SWEEPS, load_sweep
from sophon_hf.auditing.card_check import judge_card
from sophon_hf.auditing.download import Download, check_configurations, fetch
from sophon_hf.auditing.remeasure import (
    Models,
    claimed_epochs,
    load_models,
    measure_intactness,
    measure_resistance,
)
from sophon_hf.auditing.verdicts import NOT_CHECKABLE, REPRODUCED, TAMPERED, WEAKER, Verdict, judge_consistency
from sophon_hf.data.loading import Source
from sophon_hf.data.preprocessing import InputColumn
from sophon_hf.finetuning.strategy import FineTuningStrategy
from sophon_hf.hub.claim import FILE_NAME, Claim, hash_weights, printable
from sophon_hf.tasks.metrics import MetricSource
from sophon_hf.utils import has_bf16, refuse_unwritable, write_atomically


@dataclass
class Audit:
    """What an audit found.

    Attributes:
        source: Hub id, or base name of the folder.
        commit: The commit on the Hub that was audited.
        verdicts: One a claim.
        notes: What else a reader of the verdicts must know.
        facts: How it was measured.
    """

    source: str
    commit: str | None = None
    verdicts: list[Verdict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """Return 1 where something is weaker than claimed or tampered with, else 0."""
        return int(any(v.verdict in (WEAKER, TAMPERED) for v in self.verdicts))

    def _add(self, claim: str, verdict: str, why: str) -> None:
        self.verdicts.append(Verdict(claim, verdict, why=why))

    @property
    def _title(self) -> str:
        return f"Audit of {self.source}" + (f" at {self.commit}" if self.commit else "")

    def summary(self) -> str:
        """Return how many claims there are of each verdict, in one line."""
        counts = Counter(verdict.verdict for verdict in self.verdicts)
        return ", ".join(f"{counts[k]} {k}" for k in (REPRODUCED, WEAKER, TAMPERED, NOT_CHECKABLE) if counts[k])

    def to_text(self) -> str:
        """Return the verdicts for a terminal, one a line, and the notes."""
        lines = [self._title, ""]
        for v in self.verdicts:
            figures = f"claimed {v.claimed}, measured {v.measured}: " if v.claimed and v.measured else ""
            lines.append(f"{v.verdict:20}{v.claim}: {figures}{v.why}")
        return "\n".join(printable(line) for line in [*lines, "", *self.notes, f"{self.summary()}."])

    def to_markdown(self) -> str:
        """Return the audit as a table in Markdown, and its notes."""
        lines = [
            f"# {_inert(self._title)}",
            "",
            f"{self.summary()}.",
            "",
            "| claim | verdict | claimed | measured | why |",
        ]
        lines.append("|---" * 5 + "|")
        lines += ["| " + " | ".join(_inert(value) for value in asdict(v).values()) + " |" for v in self.verdicts]
        return "\n".join([*lines, "", *(f"- {_inert(note)}" for note in self.notes)]).rstrip() + "\n"

    def write(self, folder: Path) -> None:
        """Write audit.json and audit.md, each in full or not at all."""
        values = {**asdict(self), "exit_code": self.exit_code}
        write_atomically(folder / "audit.json", json.dumps(values, indent=1, allow_nan=False, default=str) + "\n")
        write_atomically(folder / "audit.md", self.to_markdown())


def audit(
    source: str | os.PathLike,
    output_dir: str | os.PathLike = "audit",
    *,
    revision: str | None = None,
    unprotected: nn.Module | str | None = None,
    restricted_dataset: Source | None = None,
    eval_dataset: Source | None = None,
    original_dataset: Source | None = None,
    original_eval_dataset: Source | None = None,
    sweep: str | Path | Sequence[FineTuningStrategy] = "strong",
    seeds: Sequence[int] = (0, 1, 2),
    epochs: float | None = None,
    examples: int | None = None,
    metric: MetricSource | None = None,
    input_columns: Mapping[str, InputColumn] | None = None,
    label_columns: Mapping[str, str | None] | None = None,
) -> Audit:
    """Check what a published model claims, and write audit.json and audit.md.

    Args:
        source: Hub id, or a folder that was published or is going to be.
        output_dir: Also gets the attacks and their report; a second run computes what is missing.
        revision: Branch, tag or commit on the Hub. The audit is pinned to the commit it names now.
        unprotected: The model before protection: Hub id, folder, or the model itself; what the claim names by default.
        restricted_dataset: The adversary's data. The sweep is left out where there are none.
        eval_dataset: The restricted domain's test split.
        original_dataset: Data of the original domain for attacks that warm up on it.
        original_eval_dataset: The original domain's test split.
        sweep: As `AttackSuite` takes it. The claim's own strongest attacks are always added.
        seeds: Of every attack.
        epochs: Of an ordinary attack; the claim's by default.
        examples: The adversary's; as many as the claim's by default.
        metric: The claim's metric, as `load_metric` takes it; needed where it is not one of this package's own.
        input_columns: {"original": ..., "restricted": ...}: the raw input column, where it is not found by itself.
        label_columns: The same for the label column.

    Raises:
        FileNotFoundError: There is no such model, or it holds no sophon.json, so that nothing is claimed.
        ConnectionError: The Hub cannot be reached.
        ValueError: Data or settings that fit no model.
    """
    if (restricted_dataset is None) != (eval_dataset is None):
        raise ValueError(
            "restricted_dataset and eval_dataset go together: attacks train on one and report on the other."
        )
    if isinstance(sweep, (str, Path)):
        load_sweep(sweep)  # A misspelt name is refused even where no sweep is run.
    refuse_unwritable(output_dir)
    output_dir = Path(output_dir)
    found = Audit(str(source) if not os.path.isdir(source) else Path(source).resolve().name)
    with tempfile.TemporaryDirectory(prefix="sophon-audit-") as stage:
        download = fetch(source, Path(stage) / "protected", revision)
        found.commit = download.commit
        claim = _read_claim(found, download)
        if claim is None or not _check_files(found, download, claim):
            found.write(output_dir)
            return found
        found.write(output_dir)  # What needs no data is there, should the rest be interrupted.
        state, models = load_models(claim, download.folder, Path(stage) / "unprotected", unprotected, metric)
        found.verdicts.append(state)
        if models is not None:
            theirs = None if claim.attacks is None else claim.attacks.data.get("training")
            data = AdversaryData(
                restricted_dataset,
                eval_dataset,
                original=original_dataset,
                original_test=original_eval_dataset,
                examples=theirs.examples if examples is None and theirs is not None else examples,
                input_columns=input_columns or {},
                label_columns=label_columns or {},
            )
            suite = AttackSuite(
                sweep,
                output_dir,
                seeds=seeds,
                epochs=claimed_epochs(claim) if epochs is None and str(sweep) in SWEEPS else epochs,
                examples=data.examples,
                bf16=claim.attacks is not None and claim.attacks.precision == "bf16" and has_bf16(),
                task=models.task,
                processing_class=models.processor,
                input_columns=data.input_columns,
                label_columns=data.label_columns,
            )
            _measure(found, claim, models, data, suite)
    found.write(output_dir)
    return found


def _measure(found: Audit, claim: Claim, models: Models, data: AdversaryData, suite: AttackSuite) -> None:
    """Add what the data allow to measure."""
    if (models.task.metric, models.task.greater_is_better) != (claim.metric, claim.greater_is_better):
        ours, theirs = (
            f"{of.metric} ({'greater' if of.greater_is_better else 'less'} is better)" for of in (models.task, claim)
        )
        why = f"the claim measures {theirs}, the audit {ours}: pass the claim's as `metric`"
        names = [f"original {claim.metric} after protection"]
        names += [] if claim.attacks is None else [f"strongest attack's {claim.metric}", "recovered transfer"]
        found.verdicts += [Verdict(name, NOT_CHECKABLE, why=why) for name in names]
        return
    verdicts, notes, results = measure_resistance(claim, models, data, suite)
    intact, fingerprint = measure_intactness(claim, models, data, results)
    found.verdicts += [*verdicts, *intact]
    found.notes += notes
    if results is not None:
        found.facts |= {name: results.facts[name] for name in ("seeds", "precision", "versions", "fingerprints")}
        found.facts["attacks"] = [strategy.to_dict() for strategy in suite.strategies]
    if fingerprint is not None:
        found.facts["original_test"] = fingerprint


def _read_claim(audit: Audit, download: Download) -> Claim | None:
    """Judge file names and sophon.json, and return the claim where it can be read."""
    if download.refused:
        first = sorted(download.refused)[0]
        audit._add("files", TAMPERED, f"{len(download.refused)} not touched, as {first!r}: {download.refused[first]}")
    else:
        audit._add("files", REPRODUCED, "every name stays inside the folder")
    if download.ignored:
        shown = ", ".join(repr(name) for name in download.ignored[:5])
        more = f" and {len(download.ignored) - 5} more" if len(download.ignored) > 5 else ""
        audit.notes.append(f"An audit does not read: {shown}{more}.")
    if FILE_NAME in download.refused:
        audit._add(FILE_NAME, TAMPERED, download.refused[FILE_NAME])
        return None
    if not (download.folder / FILE_NAME).exists():
        raise FileNotFoundError(f"{audit.source} holds no {FILE_NAME}: nothing is claimed of it that could be audited.")
    try:
        claim = Claim.read(download.folder / FILE_NAME)
        contradiction = judge_consistency(claim)
    except (ValueError, ArithmeticError) as error:
        # Figures of a forger's can be too large to compute with.
        audit._add(FILE_NAME, TAMPERED, str(error))
        return None
    if contradiction is not None:
        audit._add(FILE_NAME, TAMPERED, contradiction)
    else:
        audit._add(FILE_NAME, REPRODUCED, "of the right form, and its score follows from its attacks")
    return claim


def _check_files(audit: Audit, download: Download, claim: Claim) -> bool:
    """Judge weights, configurations and card; return whether they are the claim's and may be loaded."""
    found = hash_weights(download.folder)
    wrong = sorted(name for name in {*found, *claim.weights} if found.get(name) != claim.weights.get(name))
    if wrong:
        first, more = wrong[0], f" ({len(wrong)} such files)" if len(wrong) > 1 else ""
        kind = "is not claimed" if first not in claim.weights else "is missing" if first not in found else "differs"
        audit._add("weights", TAMPERED, f"{first!r} {kind}{more}")
    else:
        audit._add("weights", REPRODUCED, f"SHA-256 of {len(found)} file{'s' * (len(found) != 1)}")
    try:
        check_configurations(download.folder)
    except ValueError as error:
        # A publisher who says that the model needs code of its own forges nothing, but the code is not run either.
        audit._add("configuration", NOT_CHECKABLE if claim.remote_code else TAMPERED, str(error))
        return False
    audit._add("configuration", REPRODUCED, "asks for no code and no other repository")
    verdict, notes = judge_card(download.folder, claim)
    audit.verdicts.append(verdict)
    audit.notes += notes
    if audit.exit_code:
        audit.notes.append("Something is tampered with, so nothing was measured.")
    return audit.exit_code == 0


def _inert(text: str) -> str:
    """Return text as it may stand in a table: no markup, no new cell."""
    escaped = html.escape(printable(str(text)), quote=False)
    return escaped.replace("|", "\\|").translate(str.maketrans("`[]", "'()"))

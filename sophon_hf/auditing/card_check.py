"""Does the model card say what sophon.json says? Its metadata are compared; its prose is the publisher's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from sophon_hf.auditing.verdicts import NOT_CHECKABLE, REPRODUCED, TAMPERED, Verdict
from sophon_hf.hub.card import CARD, NOT_EVALUATED, evaluation_results, is_unedited
from sophon_hf.hub.claim import Claim

_LARGEST_CARD = 2**20
_LARGEST_METADATA = 2**15
_DEEPEST = 20


def judge_card(folder: Path, claim: Claim) -> tuple[Verdict, list[str]]:
    """Compare the card's figures with the claim's; it may leave some out, but not say that nothing was evaluated.

    Returns:
        The verdict, and notes.
    """
    path = folder / CARD
    if not path.exists():
        return Verdict("card", NOT_CHECKABLE, why=f"there is no {CARD}"), []
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(_LARGEST_CARD + 1)
        if len(text) > _LARGEST_CARD:
            raise ValueError(f"the card has more than {_LARGEST_CARD // 1024} KiB")
        parts = re.match(r"---[ \t]*\r?\n(.*?\r?\n)---[ \t]*(?:\r?\n|$)", text, re.DOTALL)
        if parts is None:
            raise ValueError("the card has none")
        metadata, body = read_metadata(parts[1]), text[parts.end() :]
        found = _figures(metadata)
    except ValueError as error:
        return Verdict("card", NOT_CHECKABLE, why=f"its metadata cannot be read: {error}"), []
    notes = [] if is_unedited(body) else ["The card's text was edited: what it says was not compared with the claim."]
    if claim.attacks is not None and NOT_EVALUATED in " ".join(body.split()):
        return Verdict("card", TAMPERED, why='it says "not evaluated", and the claim holds attacks'), notes
    results = evaluation_results(claim)
    expected = {result.metric_name: float(result.metric_value) for result in results}
    for name, value in found:
        if name not in expected:
            return Verdict("card", TAMPERED, why=f"it states {name!r}, which the claim does not"), notes
        # Written so that NaN differs too.
        if not abs(value - expected[name]) <= 1e-6 * max(1.0, abs(value)):
            why = f"it states {value:.4g} for {name!r}, the claim {expected[name]:.4g}"
            return Verdict("card", TAMPERED, why=why), notes
    scored = any(result.metric_type == "recovered_transfer" for result in results)
    if "non-fine-tunable" in str(metadata.get("tags")) and not scored:
        return Verdict("card", TAMPERED, why="it is tagged non-fine-tunable, and the claim holds no score"), notes
    left_out = len(expected.keys() - dict(found))
    words = f"; it leaves out {left_out} of its figures" if left_out else ""
    return Verdict("card", REPRODUCED, why=f"its metadata state what the claim does{words}"), notes


def read_metadata(header: str) -> dict[str, Any]:
    """Read a stranger's YAML: plain values, no references, no great size.

    Raises:
        ValueError: It is something else.
    """
    if len(header) > _LARGEST_METADATA:
        raise ValueError(f"they have more than {_LARGEST_METADATA // 1024} KiB")
    depth = 0
    try:
        # Before it is built: a reference can name one value a billion times, and depth is slow.
        for event in yaml.parse(header, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent):
                raise ValueError("they hold references (*), which could unfold without end")
            if depth > _DEEPEST:
                raise ValueError(f"they are nested more than {_DEEPEST} deep")
        values = yaml.safe_load(header)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}, {' '.join(str(error).split())[:200]}") from error
    if not isinstance(values, dict):
        raise ValueError("they are not a mapping")
    return values


def _figures(metadata: dict[str, Any]) -> list[tuple[str, float]]:
    """Return name and value of each metric of `model-index`, all that the Hub shows, also where two have one name."""
    figures = []
    try:
        for model in metadata.get("model-index") or []:
            for result in model["results"]:
                for metric in result["metrics"]:
                    figures.append((str(metric.get("name", metric["type"])), float(metric["value"])))
    except (TypeError, KeyError, AttributeError, ValueError, OverflowError) as error:
        raise ValueError(f"model-index is not of the Hub's form ({type(error).__name__})") from error
    return figures

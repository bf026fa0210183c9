"""The model card: what was measured of a protected model, from its claim alone, so that it cannot say more than that.

Its sentences stand in card.md.jinja.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from sophon_hf.attacks.score import UNTRAINED, describe_interval
from sophon_hf.data.fingerprint import DataFingerprint
from sophon_hf.hub.claim import Claim
from sophon_hf.models.backbone import is_backbone
from sophon_hf.utils import write_atomically

logger = logging.getLogger(__name__)

CARD = "README.md"
# How a card begins that holds no attack: an audit looks for it where the claim holds some.
NOT_EVALUATED = "**Not evaluated**"

_CURVES = "plots/curves.png"
_MARK = re.compile(r"\n<!-- Written by sophon_hf; ([0-9a-f]{16}) -->\s*$")
_TASKS = {
    "ImageClassification": "image-classification",
    "SequenceClassification": "text-classification",
    "AudioClassification": "audio-classification",
    "UNet2DModel": "unconditional-image-generation",
    "UNet2DConditionModel": "text-to-image",
}
_SCORE = "Recovered transfer (1: the protection does nothing; 0: pre-training is worth nothing)"


def update_card(folder: str | os.PathLike, claim: Claim, repo_id: str, original: str | None = None) -> bool:
    """Write the card beside the saved model, or bring it up to date.

    A text that was edited is left as it is; metadata that were added are kept.

    Args:
        folder: What the model is saved in.
        claim: Its claim.
        repo_id: What the card says to load.
        original: Hub id or folder of the model before protection, whose card gives license and base model.

    Returns:
        False where the card was edited and left as it is.
    """
    path, known, source = Path(folder) / CARD, {}, original or claim.base_model
    if path.exists():
        earlier = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True)
        if not is_unedited(earlier.text):
            return False
        known = earlier.data.to_dict()
    elif source is not None:
        known = inherited_metadata(source)
    write_atomically(path, str(make_card(folder, claim, repo_id, known)))
    return True


def make_card(folder: str | os.PathLike, claim: Claim, repo_id: str, known: dict[str, Any] | None = None) -> ModelCard:
    """Return the card of the model in `folder`, with license, base model and further metadata from `known`."""
    folder, report, scores, space = Path(folder), claim.attacks, claim.scores, claim.method.strategy_space
    found = {model: scores.best(model) for model in dict.fromkeys(attack.model for attack in scores.attacks)}
    training = None if report is None else report.data.get("training")
    template = _environment().get_template("card.md.jinja")
    text = template.render(
        claim=claim,
        title=repo_id.split("/")[-1],
        repo_id=repo_id,
        not_evaluated=NOT_EVALUATED,
        untrained=UNTRAINED,
        highest={m: attack.highest for m in found if (attack := scores.highest(m)) is not None},
        best={model: attack for model, attack in found.items() if attack is not None},
        # One that did not come to an end has tried nothing.
        tried=sum(a.model == "protected" and a.applicable and bool(a.seeds) for a in scores.attacks),
        examples="an unknown number of examples" if training is None else f"{training.examples} training examples",
        space=vars(space) | {"examples": ["all" if count is None else count for count in space.examples]},
        curves=_CURVES if report is not None and (folder / _CURVES).exists() else None,
        library=_library(folder),
        # A backbone has no task, and its architecture is named by its configuration.
        auto_class=next((f"AutoModelFor{part}" for part in _TASKS if part in claim.model), None)
        or ("AutoModel" if is_backbone(claim.model) else None),
        pipeline=_read(folder / "model_index.json").get("_class_name"),
        figure=lambda value: _figure(value, claim.greater_is_better),
        mean=np.mean,
        deviation=lambda values: np.std(values, ddof=1),
        describe_interval=describe_interval,
    )
    metadata = ModelCardData(**_metadata(folder, claim, repo_id, known or {}))
    card = ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{text}")
    card.text = f"{card.text.rstrip()}\n\n<!-- Written by sophon_hf; {_digest(card.text)} -->\n"
    return card


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"text": _escape, "words": _words}
    return environment


def is_unedited(text: str) -> bool:
    """Return whether a card's text is as it was written here; the mark can be forged, so this proves nothing."""
    mark = _MARK.search(text)
    return mark is not None and _digest(text[: mark.start()]) == mark[1]


def _digest(text: str) -> str:
    # Of the words alone: an editor or git may change line ends.
    return hashlib.sha256("\n".join(text.split()).encode()).hexdigest()[:16]


def inherited_metadata(original: str) -> dict[str, Any]:
    """Return license and base model from the original's own card, as far as they have the form that the Hub asks for.

    Args:
        original: Its Hub id or folder.
    """
    is_folder, data = os.path.isdir(original), {}
    try:
        source = Path(original) / CARD if is_folder else original
        if not isinstance(source, Path) or source.exists():
            data = ModelCard.load(source, ignore_metadata_errors=True).data.to_dict()
    except Exception as error:
        # A card is a stranger's text, and the Hub may be out of reach; neither may cost the save.
        logger.warning(
            "The card of the original model cannot be read (%s), so its license is not known: add it to %s before "
            "publishing.",
            type(error).__name__,
            CARD,
        )
    known = {}
    for name in ("license", "license_name", "language"):
        value = data.get(name)
        if isinstance(value, str) and re.fullmatch(r"\w[\w.+-]{0,99}", value):
            known[name] = value
    link = data.get("license_link")
    if isinstance(link, str) and re.fullmatch(r"(https://[\w./%~-]+|LICENSE[\w.-]*)", link):
        known["license_link"] = link
    base = data.get("base_model") if is_folder else original
    if isinstance(base, str) and _is_repo_id(base):
        known["base_model"] = base
    return known


def evaluation_results(claim: Claim) -> list[EvalResult]:
    """Return the figures for `model-index`: `.eval_results/` takes only tasks that a benchmark has registered."""
    report, best = claim.attacks, claim.scores.best("protected")
    test = None if report is None else report.data.get("test")
    figures: list[tuple[DataFingerprint | None, str, float, str]] = []
    if claim.intactness is not None:
        name = f"{claim.metric} in the original domain, after protection"
        figures.append((claim.intactness_data, claim.metric, claim.intactness[1], name))
    if best is not None and math.isfinite(best.mean):
        name = f"{claim.metric} in the restricted domain, after the strongest attack found"
        figures.append((test, claim.metric, best.mean, name))
    if report is not None and report.recovered_transfer.value is not None:
        figures.append((test, "recovered_transfer", report.recovered_transfer.value, _SCORE))
    results = []
    for data, metric, value, name in figures:
        identity, _, configuration = ("" if data is None else data.name or "").partition(":")
        results.append(
            EvalResult(
                task_type=_pipeline_tag(claim) or "other",
                # A folder's name could be that of somebody's data set on the Hub.
                dataset_type=identity if _is_repo_id(identity) else "unknown",
                dataset_name="not named" if data is None else data.name or "not named",
                dataset_split=None if data is None else data.split,
                dataset_revision=None if data is None else data.revision,
                dataset_config=configuration or None,
                metric_type=metric,
                metric_value=value,
                metric_name=name,
            )
        )
    return results


def _metadata(folder: Path, claim: Claim, repo_id: str, known: dict[str, Any]) -> dict[str, Any]:
    kept = {n: v for n, v in known.items() if n not in ("model-index", "metrics", "datasets", "pipeline_tag")}
    results, own = evaluation_results(claim), ["sophon"]
    if any(result.metric_type == "recovered_transfer" for result in results):
        own.append("non-fine-tunable")  # Untested, or with a void score, it would be a claim.
    added = [tag for tag in known.get("tags") or [] if isinstance(tag, str)]
    names = dict.fromkeys((data.name or "").split(":")[0] for data in claim.data.values())
    return {
        **kept,
        "library_name": _library(folder) or kept.get("library_name"),
        "pipeline_tag": _pipeline_tag(claim),
        "datasets": [name for name in names if _is_repo_id(name)] or None,
        "metrics": [claim.metric],
        "tags": own + [tag for tag in added if tag not in ("sophon", "non-fine-tunable")],
        "model_name": repo_id.split("/")[-1] if results else None,
        "eval_results": results or None,
    }


def _library(folder: Path) -> str | None:
    if (folder / "model_index.json").exists():
        return "diffusers"
    if not (folder / "config.json").exists():
        return None
    return "diffusers" if "_diffusers_version" in _read(folder / "config.json") else "transformers"


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _pipeline_tag(claim: Claim) -> str | None:
    return next((tag for part, tag in _TASKS.items() if part in claim.model), None)


def _is_repo_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def _figure(value: float, greater_is_better: bool) -> str:
    """Return a metric as text: a share in percent, since such a metric lies in [0, 1], an error as it is."""
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.1%}" if greater_is_better else f"{value:.4g}"


def _escape(text: str) -> str:
    """Return text from outside as text: no Markdown, no HTML, no new cell of a table."""
    return re.sub(r"([\\`*_{}\[\]<>|&#~$])", r"\\\1", " ".join(text.split()))


def _words(value: Any) -> str:
    """Return a value, or those of a list, in words."""
    if isinstance(value, (list, tuple)):
        return ", ".join(_words(inner) for inner in value)
    if value is None:
        return "none"
    return _escape(f"{value:g}" if isinstance(value, float) else str(value).replace("_", " "))

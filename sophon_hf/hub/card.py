"""The model card: what was measured of a protected model, from its claim alone, so that it cannot say more."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from sophon_hf.attacks.score import UNTRAINED, describe_interval
from sophon_hf.hub.claim import AttackFigures, AttackReport, Claim
from sophon_hf.utils import write_atomically

logger = logging.getLogger(__name__)

CARD = "README.md"
CURVES = "plots/curves.png"
NOT_EVALUATED = (
    "**Not evaluated**: no attack was run on this model, so how much of it fine-tuning recovers is not known."
)
_TEMPLATE = Path(__file__).with_name("card.md")
_MARK = re.compile(r"\n<!-- Written by sophon_hf; ([0-9a-f]{16}) -->\s*$")

_TASKS = {
    "ImageClassification": "image-classification",
    "SequenceClassification": "text-classification",
    "AudioClassification": "audio-classification",
    "UNet2DModel": "unconditional-image-generation",
}
_STATUS = {
    "not protected": "This model is NOT protected: no evaluated state was suppressed and kept the original domain "
    "within the tolerance. It is the last one that kept it.",
    "not measured": "Whether this model still works in its original domain was not measured while it was protected.",
    "in progress": "This is a checkpoint of a protection that has not ended: nothing was measured of this state.",
}
_REMOTE_CODE = (
    "The original model was loaded with `trust_remote_code=True`, at its publisher's word: its class is code in a "
    "repository, which is not part of this one. Loading this model needs that code: read it first."
)


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
    path, known = Path(folder) / CARD, {}
    if path.exists():
        earlier = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True)
        if not is_unedited(earlier.text):
            return False
        known = earlier.data.to_dict()
    elif original is not None or claim.base_model is not None:
        known = inherited_metadata(original or claim.base_model)
    write_atomically(path, str(make_card(folder, claim, repo_id, known)))
    return True


def make_card(folder: str | os.PathLike, claim: Claim, repo_id: str, known: dict[str, Any] | None = None) -> ModelCard:
    """The card of the model in `folder`, with license, base model and further metadata from `known`."""
    text = {
        "title": _escape(repo_id.split("/")[-1]),
        "repo_id": repo_id,
        "claim": claim,
        "metric": claim.metric,
        "first_paragraph": _first_paragraph(claim),
        "warnings": _warnings(claim),
        "threat": _threat(claim),
        "method": _escape(claim.method.name),
        "K": _listed(claim.method.hyper_parameters.get("K")),
        "space": "; ".join(f"{k.replace('_', ' ')} {_listed(v)}" for k, v in claim.method.strategy_space.items()),
        "intactness": _intactness(claim),
        "simulated": _simulated(claim),
        "attacks": None if claim.attacks is None else _attack_section(claim, claim.attacks),
        "curves": CURVES if (Path(folder) / CURVES).exists() and claim.attacks is not None else None,
        "loading": _loading(Path(folder), claim, repo_id),
        "data": _data_rows(claim),
        "cost": f"{claim.compute.seconds:.0f} seconds and {claim.compute.simulated_passes:,} simulated passes",
    }
    data = ModelCardData(**_metadata(Path(folder), claim, repo_id, known or {}))
    card = ModelCard.from_template(data, template_path=str(_TEMPLATE), **text)
    card.text = f"{card.text.rstrip()}\n\n<!-- Written by sophon_hf; {_digest(card.text)} -->\n"
    return card


def _digest(text: str) -> str:
    return hashlib.sha256("\n".join(text.split()).encode()).hexdigest()[:16]


def is_unedited(text: str) -> bool:
    """Whether a card's text is as it was written here; the mark can be forged, so it is no proof."""
    mark = _MARK.search(text)
    return mark is not None and _digest(text[: mark.start()]) == mark[1]


# ---- Metadata ----


def inherited_metadata(original: str) -> dict[str, Any]:
    """License and base model, from the original's own card; what does not have the Hub's form is left out.

    Args:
        original: Its Hub id or folder.
    """
    is_folder, data = os.path.isdir(original), {}
    try:
        source = Path(original) / CARD if is_folder else original
        if not is_folder or source.exists():
            data = ModelCard.load(source, ignore_metadata_errors=True).data.to_dict()
    except (
        Exception
    ) as error:  # A card is a stranger's text, and the Hub may be out of reach; neither may cost the save.
        logger.warning(
            "The card of the original model cannot be read (%s), so its license is not known: add it to %s before "
            "publishing.",
            type(error).__name__,
            CARD,
        )
    known = {n: data[n] for n in ("license", "license_name", "language") if _is_identifier(data.get(n))}
    link = data.get("license_link")
    if isinstance(link, str) and re.fullmatch(r"(https://[\w./%~-]+|LICENSE[\w.-]*)", link):
        known["license_link"] = link
    base = data.get("base_model") if is_folder else original
    if isinstance(base, str) and _is_repo_id(base):
        known["base_model"] = base
    return known


def _is_identifier(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[\w][\w.+-]{0,99}", value) is not None


def _is_repo_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def _metadata(folder: Path, claim: Claim, repo_id: str, known: dict[str, Any]) -> dict[str, Any]:
    kept = {n: v for n, v in known.items() if n not in ("model-index", "metrics", "datasets", "pipeline_tag")}
    tags = [
        tag for tag in known.get("tags") or [] if isinstance(tag, str) and tag not in ("sophon", "non-fine-tunable")
    ]
    names = dict.fromkeys((d.name or "").split(":")[0] for d in claim.data.values())
    results = evaluation_results(claim)
    return {
        **kept,
        "library_name": _library(folder) or kept.get("library_name"),
        "pipeline_tag": _pipeline_tag(claim),
        "datasets": [name for name in names if _is_repo_id(name)] or None,
        "metrics": [claim.metric],
        # Untested, or with a void score, it would be a claim.
        "tags": ["sophon", *(["non-fine-tunable"] if _has_score(claim) else []), *tags],
        "model_name": repo_id.split("/")[-1] if results else None,
        "eval_results": results or None,
    }


def _has_score(claim: Claim) -> bool:
    return claim.attacks is not None and claim.attacks.recovered_transfer.value is not None


def _library(folder: Path) -> str | None:
    if (folder / "model_index.json").exists():
        return "diffusers"
    return "transformers" if (folder / "config.json").exists() else None


def _pipeline_tag(claim: Claim) -> str | None:
    return next((tag for part, tag in _TASKS.items() if part in claim.model), None)


def evaluation_results(claim: Claim) -> list[EvalResult]:
    """As `model-index`: `.eval_results/` takes only tasks that a benchmark on the Hub has registered."""
    task, results, report = _pipeline_tag(claim) or "other", [], claim.attacks

    def add(data, metric: str, value: float, name: str) -> None:
        source = {"dataset_type": "unknown", "dataset_name": "not named"}
        if data is not None:
            identity, _, configuration = (data.name or "").partition(":")
            source = {
                # A folder's name could be that of somebody's data set on the Hub.
                "dataset_type": identity if _is_repo_id(identity) else "unknown",
                "dataset_name": data.name or "not named",
                "dataset_split": data.split,
                "dataset_revision": data.revision,
                "dataset_config": configuration or None,
            }
        results.append(EvalResult(task_type=task, metric_type=metric, metric_value=value, metric_name=name, **source))

    if claim.intactness is not None:
        add(
            claim.intactness_data,
            claim.metric,
            claim.intactness[1],
            f"{claim.metric} in the original domain, after protection",
        )
    best = None if report is None else report.strongest("protected", claim.greater_is_better)
    if best is not None and math.isfinite(best.mean):
        name = f"{claim.metric} in the restricted domain, after the strongest attack found"
        add(report.data.get("test"), claim.metric, best.mean, name)
    if _has_score(claim):
        name = "Recovered transfer (1: the protection does nothing; 0: pre-training is worth nothing)"
        add(report.data.get("test"), "recovered_transfer", report.recovered_transfer.value, name)
    return results


# ---- Text ----


def _escape(text: str) -> str:
    """Text from outside, as text: no Markdown, no HTML, no new cell of a table."""
    return re.sub(r"([\\`*_{}\[\]<>|&#~$])", r"\\\1", " ".join(text.split()))


def _listed(values: Any) -> str:
    values = values if isinstance(values, list) else [values]
    return _escape(", ".join(_word(value) for value in values))


def _word(value: Any) -> str:
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value).replace("_", " ")


def _figure(claim: Claim, value: float) -> str:
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.1%}" if claim.metric == "accuracy" else f"{value:.4g}"


def _spread(claim: Claim, values: list[float | None]) -> str:
    numbers = [v for v in values if v is not None]
    if not numbers:
        return "not finite" if values else "no result"
    spread = f" ± {_figure(claim, float(np.std(numbers, ddof=1)))}" if len(numbers) > 1 else ""
    lost = f" ({len(numbers)} of {len(values)} seeds are finite)" if len(numbers) < len(values) else ""
    return _figure(claim, float(np.mean(numbers))) + spread + lost


def _warnings(claim: Claim) -> list[str]:
    status = _STATUS.get(claim.protection.status)
    return ([] if status is None else [status]) + ([_REMOTE_CODE] if claim.remote_code else [])


def _first_paragraph(claim: Claim) -> str:
    report = claim.attacks
    if report is None:
        return NOT_EVALUATED
    transfer, best = report.recovered_transfer, report.strongest("protected", claim.greater_is_better)
    if transfer.value is None:
        score = f"**Recovered transfer: void** ({_escape(transfer.void)})."
    else:
        score = f"**Recovered transfer: {transfer.value:.0%}** ({describe_interval(transfer.interval)})."
    if best is None:
        return f"{score} No attack on the protected model came to an end."
    others = [
        f"{_figure(claim, found.mean)} {words}"
        for model, words in (("original", "from the original model"), ("scratch", "from scratch"))
        if (found := report.strongest(model, claim.greater_is_better)) is not None
    ]
    against = f", against {' and '.join(others)}" if others else ""
    return (
        f"{score} The strongest of {_count(report)} found, *{_escape(best.name)}*, reaches {claim.metric} "
        f"{_figure(claim, best.mean)} in the restricted domain{against}. 100 % means that the protection does nothing, "
        "0 % "
        "that pre-training is worth nothing to the adversary."
    )


def _count(report: AttackReport) -> str:
    """How many attacks on the protected model came to an end; one that did not has tried nothing."""
    count = len([a for a in report.attacks if a.model == "protected" and a.applicable and a.seeds])
    return f"{count} attack{'s' * (count != 1)}"


def _examples(report: AttackReport) -> str:
    training = report.data.get("training")
    return f"{training.examples} training examples" if training is not None else "an unknown number of examples"


def _threat(claim: Claim) -> str:
    if claim.attacks is None:
        return "No such adversary was tried on these weights."
    return (
        f"Here the adversary has {_examples(claim.attacks)} and tries {_count(claim.attacks)}. An adversary with more "
        "data, more patience or an attack of another kind is outside of "
        "what was measured."
    )


def _intactness(claim: Claim) -> str:
    if claim.intactness is None:
        return f"The original domain's {claim.metric} was not measured."
    before, after = (_figure(claim, value) for value in claim.intactness)
    where = (
        "its test split" if claim.measured_on_test else "data held out of the defender's, by which the state was chosen"
    )
    return f"Original domain, {claim.metric}: {before} before protection, {after} after ({where})."


def _simulated(claim: Claim) -> str | None:
    before, after = claim.protection.simulated_before, claim.protection.simulated_after
    if before is None or after is None:
        return None
    return (
        f"The defender's own simulated adversaries, who are weaker than attacks, reach {claim.metric} "
        f"{_figure(claim, before)} in the "
        f"restricted domain before protection, and {_figure(claim, after)} after."
    )


def _attack_section(claim: Claim, report: AttackReport) -> dict[str, Any]:
    models = list(dict.fromkeys(attack.model for attack in report.attacks))
    best = {m: found for m in models if (found := report.strongest(m, claim.greater_is_better)) is not None}
    checks = [f"{c.name}: {c.message}{' (voids the score)' * c.voids}" for c in report.failed_checks]
    return {
        "sweep": _escape(report.sweep),
        "count": _count(report),
        "examples": _examples(report),
        "seeds": f"{len(report.seeds)} seed{'s' * (len(report.seeds) != 1)}",
        "strongest": [
            [_escape(m), _escape(a.name), f"{a.epoch:g}", _spread(claim, a.test), str(len(a.seeds))]
            for m, a in best.items()
        ],
        "all": [_attack_row(claim, attack) for attack in report.attacks],
        "failed_checks": [_escape(text) for text in checks],
        "untrained": UNTRAINED if UNTRAINED in models else None,
    }


def _attack_row(claim: Claim, attack: AttackFigures) -> list[str]:
    start = [_escape(attack.model), _escape(attack.name)]
    if not attack.applicable:
        return [*start, "not applicable, which is no resistance", "", "", "0"]
    failed = f" ({attack.failed} failed)" if attack.failed else ""
    epoch = "" if attack.epoch is None else f"{attack.epoch:g}"
    return [*start, epoch, _spread(claim, attack.test), _spread(claim, attack.final), f"{len(attack.seeds)}{failed}"]


def _data_rows(claim: Claim) -> list[list[str]]:
    parts = {f"defender: {name.replace('_', ' ')}": data for name, data in claim.data.items()}
    if claim.attacks is not None:
        parts |= {f"adversary: {name.replace('_', ' ')}": data for name, data in claim.attacks.data.items()}
    return [
        [
            _escape(part),
            _escape(d.name or "not named"),
            _escape(d.revision or ""),
            _escape(d.split or ""),
            f"{d.examples:,}",
        ]
        for part, d in parts.items()
    ]


def _loading(folder: Path, claim: Claim, repo_id: str) -> str:
    library, auto = _library(folder), next((f"AutoModelFor{p}" for p in _TASKS if p in claim.model), None)
    if library == "diffusers":
        code = [
            "from diffusers import DDPMPipeline",
            "",
            f'image = DDPMPipeline.from_pretrained("{repo_id}")().images[0]',
        ]
    elif library == "transformers" and auto is not None:
        code = [f"from transformers import {auto}", "", f'model = {auto}.from_pretrained("{repo_id}")']
    else:
        return (
            f"The weights are those of a class of its publisher's, `{claim.model}`, which is not part of this "
            "repository: it "
            "is needed to load them.\n\n```python\nfrom huggingface_hub import load_torch_model, snapshot_download\n\n"
            f'model = {claim.model}(...)\nload_torch_model(model, snapshot_download("{repo_id}"), strict=True)\n```'
        )
    return "\n".join(["```python", *code, "```"])

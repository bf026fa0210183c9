"""A small published model with a true claim, made in seconds: what audits are tried on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import torch
from transformers import ResNetConfig, ResNetForImageClassification

from sophon_hf import AttackSuite, FineTuningStrategy
from sophon_hf.attacks.results import AttackResults
from sophon_hf.auditing.audit import audit as audit_model
from sophon_hf.data.batches import Stream
from sophon_hf.data.domain import build_domain
from sophon_hf.finetuning.loop import FineTuning
from sophon_hf.finetuning.strategy import StrategySpace
from sophon_hf.hub.card import make_card
from sophon_hf.hub.claim import SCHEMA, AttackReport, Claim, Compute, Method, Protection, hash_weights
from sophon_hf.models.loading import hash_state
from sophon_hf.tasks.base import infer_task

CLASSES, SIZE = 4, 8
# Few enough that scratch learns little, so the transfer is large and an audit's interval narrow.
EXAMPLES = 36
SWEEP = [FineTuningStrategy(start, learning_rate=5e-3, batch_size=12, epochs=4) for start in ("direct", "new_head")]


def make_images(seed: int, examples: int, shift: int = 0) -> datasets.Dataset:
    """Grey images of four patterns under noise; `shift` numbers the patterns in another order."""
    patterns = np.random.default_rng(0).uniform(60, 200, (CLASSES, SIZE, SIZE))
    generator = np.random.default_rng(seed)
    kinds = np.arange(examples) % CLASSES
    images = patterns[kinds] + generator.normal(0, 60, (examples, SIZE, SIZE))
    features = datasets.Features(
        {"image": datasets.Image(mode="L"), "label": datasets.ClassLabel(names=[f"c{i}" for i in range(CLASSES)])}
    )
    return datasets.Dataset.from_dict(
        {"image": list(images.clip(0, 255).astype(np.uint8)), "label": ((kinds + shift) % CLASSES).tolist()},
        features=features,
    )


def make_data() -> dict[str, datasets.Dataset]:
    """Both domains: the restricted one has the same patterns under other names."""
    return {
        "original": make_images(1, 400),
        "original_test": make_images(2, 800),
        "adversary": make_images(3, 300, shift=1),
        "test": make_images(4, 800, shift=1),
    }


def small_classifier() -> ResNetForImageClassification:
    return ResNetForImageClassification(
        ResNetConfig(
            num_channels=1,
            embedding_size=8,
            hidden_sizes=[8, 16],
            depths=[1, 1],
            layer_type="basic",
            num_labels=CLASSES,
        )
    )


def pretrained(data: dict[str, datasets.Dataset]) -> ResNetForImageClassification:
    """A classifier of the original domain."""
    torch.manual_seed(0)
    model = small_classifier()
    task = infer_task(model)
    domain = build_domain(data["original"], task.inputs(model), name="original")
    strategy = FineTuningStrategy(learning_rate=1e-2, batch_size=40)
    batches = Stream(domain, task.collate, 0).batches(strategy.batch_size)
    for _ in FineTuning(model, task, strategy, batches, 120, structure=task.structure(model, next(batches))):
        pass
    return model


def perturbed(model: ResNetForImageClassification) -> ResNetForImageClassification:
    """Nearly the same model, in the place of a protected one."""
    changed = small_classifier()
    changed.load_state_dict(model.state_dict())
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(1.001)
    return changed


def run_attacks(folder: Path, protected, original, data: dict[str, datasets.Dataset]) -> AttackResults:
    return AttackSuite(SWEEP, folder, examples=EXAMPLES, measured_epochs=(0, 1, 4.0, 5, 10, 15, 20)).run(
        protected=protected,
        original=original,
        restricted_dataset=data["adversary"],
        eval_dataset=data["test"],
        original_eval_dataset=data["original_test"],
    )


def make_claim(folder: Path, model: torch.nn.Module, results: AttackResults | None, **changes) -> Claim:
    """A claim about the model saved in `folder`."""
    space = StrategySpace()
    values = {
        "schema": SCHEMA,
        "method": Method("SOPHON, Algorithm 1", {}, space),
        "model": type(model).__name__,
        "base_model": "original",
        "base_revision": None,
        "remote_code": False,
        "versions": {},
        "data": {},
        "weights": hash_weights(folder),
        "state_hash": hash_state(model),
        "metric": "accuracy",
        "greater_is_better": True,
        "protection": Protection("protected", 1, 0.9, 0.9, 50, 0.8, 0.5, 0.4, 0, 0),
        "compute": Compute(1.0, 1, 1),
        "attacks": None if results is None else AttackReport.from_results(results),
    }
    return Claim(**{**values, **changes})


def publish_folder(folder: Path, model: torch.nn.Module, results: AttackResults | None, **changes) -> Claim:
    """Save the model, its claim and its card."""
    model.save_pretrained(folder)
    claim = make_claim(folder, model, results, **changes)
    claim.write(folder / "sophon.json")
    (folder / "README.md").write_text(str(make_card(folder, claim, "alice/model")))
    return claim


def publish_truth(root: Path) -> dict:
    """Data, the model before protection, the published folder with a true claim, and where its attacks lie."""
    data = make_data()
    original = pretrained(data)
    protected = perturbed(original)
    results = run_attacks(root / "attacks", protected, original, data)
    claim = publish_folder(root / "model", protected, results)
    original.save_pretrained(root / "original")
    return {
        "data": data,
        "original": original,
        "folder": root / "model",
        "root": root,
        "claim": claim,
        "results": results,
    }


def edit_claim(folder: Path, **changes) -> None:
    """Change fields of sophon.json, as a forger would: "a.b" names a field inside another."""
    path = folder / "sophon.json"
    values = json.loads(path.read_text())
    for name, value in changes.items():
        inside, parts = values, name.split("__")
        for part in parts[:-1]:
            inside = inside[part]
        inside[parts[-1]] = value
    path.write_text(json.dumps(values))


def as_parts(data: dict[str, datasets.Dataset], folder: Path) -> dict[str, str]:
    """Both domains as folders that `load_dataset` reads, for the command line."""
    for name, parts in {"restricted": ("adversary", "test"), "original": ("original", "original_test")}.items():
        (folder / name).mkdir(parents=True)
        for split, part in zip(("train", "test"), parts, strict=True):
            data[part].to_parquet(folder / name / f"{split}.parquet")
    return {name: str(folder / name) for name in ("restricted", "original")}


def verdict_of(audit, claim: str) -> str:
    return next(v.verdict for v in audit.verdicts if v.claim == claim)


def why_of(audit, claim: str) -> str:
    return next(v.why for v in audit.verdicts if v.claim == claim)


def full_audit(truth, folder, output_dir, fresh: bool = False, **changes):
    """An audit with all data; unless it is to be fresh, what its attacks share with those before is not run again."""
    data = truth["data"]
    if not fresh:
        shutil.copytree(truth["root"] / "attacks" / "runs", output_dir / "runs", dirs_exist_ok=True)
    arguments = {
        "unprotected": truth["original"],
        "restricted_dataset": data["adversary"],
        "eval_dataset": data["test"],
        "original_eval_dataset": data["original_test"],
        "sweep": SWEEP,
    }
    return audit_model(folder, output_dir, **{**arguments, **changes})

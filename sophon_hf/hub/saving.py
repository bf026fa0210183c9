"""What a protected model is saved as: what its own library loads, `sophon.json`, and a card; whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_model
from safetensors import SafetensorError
from torch import nn

from sophon_hf.hub.card import CARD, update_card
from sophon_hf.hub.claim import FILE_NAME, AttackReport, Claim
from sophon_hf.tasks.base import Task
from sophon_hf.tasks.diffusion import DiffusionTask

MAX_SHARD_SIZE = "5GB"


def save_protected(
    folder: Path,
    model: nn.Module,
    task: Task,
    processing_class: Any | None,
    claim_for: Callable[[Path], Claim],
    repository_name: str,
) -> None:
    """Save model, processor, `sophon.json` and card; a card that was edited is left as it is.

    Args:
        folder: Where to.
        model: The whole model.
        task: What it learned.
        processing_class: What prepares its raw inputs, or None.
        claim_for: Returns the claim of the model that lies in a folder; what attacks found on the same weights is kept.
        repository_name: What the card says to load.

    Raises:
        OSError: The folder cannot be written (a full disk, say); what was saved there before is whole.
    """
    with replaced_together(folder) as beside:
        save_model_files(model, beside, task)
        if processing_class is not None:
            processing_class.save_pretrained(beside)
        claim = claim_for(beside)
        claim = replace(claim, attacks=_earlier_attacks(folder, claim.state_hash))
        if (folder / CARD).exists():
            shutil.copyfile(folder / CARD, beside / CARD)
        config = getattr(model, "config", None)
        original = getattr(config, "_name_or_path", None) or getattr(model, "name_or_path", None) or None
        update_card(beside, claim, repository_name, original=original)
        claim.write(beside)


def _earlier_attacks(folder: Path, state_hash: str) -> AttackReport | None:
    """What attacks found on these very weights, where they were saved here before."""
    try:
        earlier = Claim.read(folder)
    except (OSError, ValueError):
        return None
    return earlier.attacks if earlier.state_hash == state_hash else None


def save_model_files(model: nn.Module, folder: Path, task: Task) -> None:
    """Save as the model's own library does, so that `from_pretrained` loads it; a UNet as a whole pipeline."""
    if isinstance(task, DiffusionTask) and hasattr(model, "save_pretrained"):
        from diffusers import DDPMPipeline

        # A copy, since saving writes into the configuration of what is saved.
        scheduler = type(task.noise_scheduler).from_config(task.noise_scheduler.config)
        pipeline = DDPMPipeline(unet=model, scheduler=scheduler)
        pipeline.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
        for config in folder.rglob("config.json"):
            _forget_path(config)
    elif hasattr(model, "save_pretrained"):
        model.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
    else:
        save_torch_model(model, folder, max_shard_size=MAX_SHARD_SIZE)


def _forget_path(config: Path) -> None:
    # diffusers notes where a model was loaded from, which may be a folder under the user's name.
    values = json.loads(config.read_text(encoding="utf-8"))
    values.pop("_name_or_path", None)
    config.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


@contextmanager
def replaced_together(folder: Path) -> Iterator[Path]:
    """Yield a new folder, whose files take their places in `folder` when the block has ended well.

    Raises:
        OSError: The disk is full, or the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        yield beside
        names = [path.relative_to(beside) for path in beside.rglob("*") if path.is_file()]
        stale = [name for name in _saved_before(folder) if name not in names]
        # Should the process die in between, the hashes of the claim tell: it comes last.
        for name in sorted(names, key=lambda name: (name.name == FILE_NAME, name)):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(beside / name, folder / name)
        for name in stale:
            (folder / name).unlink(missing_ok=True)
    except SafetensorError as error:
        raise OSError(f"{folder} cannot be written: {error}. What was saved there before is whole.") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _saved_before(folder: Path) -> list[Path]:
    """The weights that an earlier save left here, and their indexes; other models may lie in the folder too."""
    try:
        weights = [Path(name) for name in Claim.read(folder).weights]
    except (OSError, ValueError):
        return []
    parents = {name.parent for name in weights}
    indexes = [
        path.relative_to(folder) for parent in parents for path in (folder / parent).glob("*.safetensors.index.json")
    ]
    return weights + indexes


def load_weights(model: nn.Module, folder: str | os.PathLike) -> None:
    """Load in place what `save_model_files` saved of a model of transformers or diffusers.

    Through its own library, since what a file calls a weight need not be its name in the model.
    """
    subfolder = {"subfolder": "unet"} if (Path(folder) / "model_index.json").exists() else {}
    model.load_state_dict(type(model).from_pretrained(folder, **subfolder).state_dict())

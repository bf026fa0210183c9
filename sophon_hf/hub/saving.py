"""What a protected model is saved as: what its own library loads, `sophon.json`, and a card; whole or not at all."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_model
from safetensors import SafetensorError
from torch import nn

from sophon_hf.hub.card import CARD, update_card
from sophon_hf.hub.claim import FILE_NAME, Claim
from sophon_hf.models.backbone import library_model
from sophon_hf.models.loading import pipeline_parts
from sophon_hf.tasks.base import Task
from sophon_hf.tasks.diffusion import DiffusionTask

# As transformers and diffusers split weights by default.
_SHARD_SIZE = "5GB"
_LARGEST_TRIAL = 2 * 2**30


def save_protected(
    folder: Path,
    model: nn.Module,
    task: Task,
    processing_class: Any | None,
    claim_for: Callable[[Path], Claim],
    repository_name: str,
    max_shard_size: int | str = _SHARD_SIZE,
) -> None:
    """Save model, processor, `sophon.json` and card; a card that was edited is left as it is.

    Args:
        folder: Where to.
        model: The whole model.
        task: What it learned.
        processing_class: What prepares its raw inputs, or None.
        claim_for: Returns the claim of the model that lies in a folder, whose weights it hashes.
        repository_name: What the card says to load.
        max_shard_size: Larger weights are split into several files.

    Raises:
        OSError: The folder cannot be written (a full disk, say); what was saved there before is whole.
    """
    with replaced_together(folder) as beside:
        _save_model_files(model, beside, task, max_shard_size)
        if processing_class is not None:
            processing_class.save_pretrained(beside)
        claim = claim_for(beside)
        earlier = _claim_of(folder)
        if earlier is not None and earlier.state_hash == claim.state_hash:
            # What attacks found on these very weights still holds.
            claim = replace(claim, attacks=earlier.attacks)
        if (folder / CARD).exists():
            shutil.copyfile(folder / CARD, beside / CARD)
        # transformers remembers where a model came from in its configuration, diffusers on the model.
        original: Any = getattr(getattr(model, "config", None), "_name_or_path", None)
        update_card(beside, claim, repository_name, original or getattr(model, "name_or_path", None) or None)
        claim.write(beside)


def _save_model_files(model: nn.Module, folder: Path, task: Task, max_shard_size: int | str) -> None:
    """Save as the model's own library does, so that `from_pretrained` loads it."""
    saved: Any = library_model(model)
    if not hasattr(saved, "save_pretrained"):
        save_torch_model(saved, folder, max_shard_size=max_shard_size)
    elif isinstance(task, DiffusionTask):
        _save_denoiser(saved, folder, task, max_shard_size)
    else:
        saved.save_pretrained(folder, max_shard_size=max_shard_size)


def _save_denoiser(model: Any, folder: Path, task: DiffusionTask, max_shard_size: int | str) -> None:
    """Save a denoiser in the whole pipeline that it comes from; else in DDPM's, or beside its scheduler."""
    from diffusers import DDPMPipeline, DiffusionPipeline, UNet2DModel

    # A copy, since saving writes into the configuration of what is saved.
    scheduler: Any = type(task.noise_scheduler).from_config(task.noise_scheduler.config)
    saved = model
    if task.pipeline is not None:
        part = next(name for name, cls in pipeline_parts(task.pipeline).items() if cls == type(model).__name__)
        saved = DiffusionPipeline.from_pretrained(task.pipeline, **{part: model})
    elif isinstance(model, UNet2DModel):
        saved = DDPMPipeline(unet=model, scheduler=scheduler)
    else:
        scheduler.save_pretrained(folder / "scheduler")
    saved.save_pretrained(folder, max_shard_size=max_shard_size)
    # diffusers notes where a model was loaded from, which may be a folder under the user's name.
    for config in [*folder.rglob("config.json"), *folder.glob("model_index.json")]:
        values = json.loads(config.read_text(encoding="utf-8"))
        values.pop("_name_or_path", None)
        config.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


@contextmanager
def replaced_together(folder: Path) -> Iterator[Path]:
    """Yield a new folder, whose files take their places in `folder` when the block has ended well.

    Weights that an earlier save left there are removed; other models may lie in the folder too.

    Raises:
        OSError: The disk is full, or the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        yield beside
        names = [path.relative_to(beside) for path in beside.rglob("*") if path.is_file()]
        earlier = _claim_of(folder)
        stale = [] if earlier is None else [Path(name) for name in earlier.weights]
        for parent in {name.parent for name in stale}:
            stale += [path.relative_to(folder) for path in (folder / parent).glob("*.safetensors.index.json")]
        # Should the process die in between, the hashes of the claim tell: it comes last.
        for name in sorted(names, key=lambda name: (name.name == FILE_NAME, name)):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(beside / name, folder / name)
        for name in stale:
            if name not in names:
                (folder / name).unlink(missing_ok=True)
    except SafetensorError as error:
        raise OSError(f"{folder} cannot be written: {error}. What was saved there before is whole.") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _claim_of(folder: Path) -> Claim | None:
    try:
        return Claim.read(folder)
    except (OSError, ValueError):
        return None


def load_weights(model: nn.Module, folder: str | os.PathLike) -> None:
    """Load in place what `_save_model_files` saved of a model of transformers or diffusers.

    Through its own library, since what a file calls a weight need not be its name in the model.
    """
    model = library_model(model)
    library_class: Any = type(model)
    parts = {cls: name for name, cls in pipeline_parts(folder).items()}
    subfolder = {"subfolder": parts[library_class.__name__]} if parts else {}
    model.load_state_dict(library_class.from_pretrained(folder, **subfolder).state_dict())


def check_loads_back(model: nn.Module) -> None:
    """Save the model as its library does, and load what was saved.

    Of a model of more than 2 GB, names and shapes are compared with what its configuration makes, without a second copy
    in memory or on the disk.

    Raises:
        ValueError: It does not load, or what is loaded is another model.
    """
    saved: Any = library_model(model)
    if not hasattr(saved, "save_pretrained"):
        return
    state = saved.state_dict()
    small = sum(t.nbytes for t in state.values()) <= _LARGEST_TRIAL
    try:
        if small:
            with tempfile.TemporaryDirectory() as folder:
                saved.save_pretrained(folder)
                loaded = type(saved).from_pretrained(folder).state_dict()
        else:
            with torch.device("meta"):
                loaded = getattr(saved, "from_config", type(saved))(copy.deepcopy(saved.config)).state_dict()
    except Exception as error:
        if not small:
            return  # Its constructor computes with weights, which have no values here.
        raise ValueError(
            f"This {type(saved).__name__} cannot be loaded back after it is saved, so nobody could use it: {error}"
        ) from error
    other = [
        name
        for name, tensor in state.items()
        if name not in loaded
        or loaded[name].shape != tensor.shape
        or (small and not torch.equal(loaded[name], tensor.cpu()))
    ]
    if other or len(loaded) != len(state):
        raise ValueError(
            f"This {type(saved).__name__} was changed after it was made: what its library loads of it after saving "
            f"differs ({', '.join([*other, *(n for n in loaded if n not in state)][:3])}). Make the change in its "
            "configuration, or wrap the model in a module of your own."
        )

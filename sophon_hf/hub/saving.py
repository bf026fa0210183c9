"""What a protected model is saved as: what its own library loads, `sophon.json`, and a card; whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import save_torch_model
from safetensors import SafetensorError
from torch import nn

from sophon_hf.data.fingerprint import is_base_name_or_hub_id
from sophon_hf.hub.card import CARD, update_card
from sophon_hf.hub.claim import FILE_NAME, SCHEMA, AttackReport, Claim, Compute, Method, Protection
from sophon_hf.hub.weights import hash_weights
from sophon_hf.models.loading import hash_state
from sophon_hf.models.sharding import is_sharded
from sophon_hf.protection.checkpoints import HYPER_PARAMETERS, as_json
from sophon_hf.protection.suppression import last_evaluated
from sophon_hf.tasks.base import Task
from sophon_hf.tasks.diffusion import DiffusionTask
from sophon_hf.utils import finite_or_none

if TYPE_CHECKING:
    from sophon_hf.protection.config import SophonConfig
    from sophon_hf.protection.trainer import SophonTrainer

# Fields of `SophonConfig` that go beyond the paper.
ADDITIONS = ("probe_depths", "num_persistent", "distillation", "mixup", "keep_norms")
MAX_SHARD_SIZE = "5GB"
_PACKAGES = ("torch", "transformers", "diffusers", "accelerate", "datasets", "safetensors")


def save_protected(trainer: SophonTrainer, model: nn.Module, folder: str | os.PathLike) -> None:
    """Save model, processor, `sophon.json` and card; a card that was edited is left as it is.

    Args:
        trainer: Whose model it is.
        model: The whole model, where the trainer's own is sharded.
        folder: Where to.

    Raises:
        OSError: The folder cannot be written (a full disk, say); what was saved there before is whole.
    """
    folder = Path(folder)
    with replaced_together(folder) as beside:
        save_model_files(model, beside, trainer.task)
        if trainer.processing_class is not None:
            trainer.processing_class.save_pretrained(beside)
        claim = claim_of(trainer, model, beside)
        claim = replace(claim, attacks=_earlier_attacks(folder, claim.state_hash))
        if (folder / CARD).exists():
            shutil.copyfile(folder / CARD, beside / CARD)
        update_card(beside, claim, trainer.repository_name, original=_name_or_path(model))
        claim.write(beside)


def _earlier_attacks(folder: Path, state_hash: str) -> AttackReport | None:
    """What attacks found on these very weights, where they were saved here before."""
    try:
        earlier = Claim.read(folder)
    except (OSError, ValueError):
        return None
    return earlier.attacks if earlier.state_hash == state_hash else None


def save_model_files(model: nn.Module, folder: Path, task: Task) -> None:
    """Save as the model's own library does, so that its stock `from_pretrained` loads it; a UNet as a whole pipeline."""
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
    """A new folder, whose files take their places in `folder` when the block has ended well; else nothing changes there.

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


def claim_of(trainer: SophonTrainer, model: nn.Module, folder: Path) -> Claim:
    """What is claimed of the model that lies in `folder`; of attacks, nothing."""
    args = trainer.args
    hyper_parameters = {name: getattr(args, name) for name in HYPER_PARAMETERS if name != "strategy_space"}
    hyper_parameters["suppression_loss"] = args.suppression_loss or next(iter(trainer.task.suppression_losses))
    hyper_parameters["reinforcement_loss"] = getattr(trainer.reinforcement_loss, "__qualname__", None)
    name = _name_or_path(model)
    base = name and os.path.basename(os.path.abspath(name)) if name and os.path.isdir(name) else name
    return Claim(
        schema=SCHEMA,
        method=Method(
            name=_method_name(args),
            hyper_parameters=as_json(hyper_parameters),
            strategy_space=trainer.space.to_dict(),
        ),
        model=type(model).__name__,
        base_model=base if base and is_base_name_or_hub_id(base) else None,
        base_revision=getattr(model, "hub_revision", None),
        remote_code=type(model).__module__.startswith("transformers_modules"),
        versions={package: version(package) for package in _PACKAGES},
        data=trainer.data_fingerprints,
        weights=hash_weights(folder),
        state_hash=hash_state(model),
        metric=trainer.task.metric,
        greater_is_better=trainer.task.greater_is_better,
        protection=_protection(trainer),
        compute=_compute(trainer),
        attacks=None,
    )


def _method_name(args: SophonConfig) -> str:
    added = [name.replace("_", " ") for name in ADDITIONS if getattr(args, name)]
    return "SOPHON, Algorithm 1" + (f" with {', '.join(added)}" if added else "")


def _name_or_path(model: nn.Module) -> str | None:
    config = getattr(model, "config", None)
    return getattr(config, "_name_or_path", None) or getattr(model, "name_or_path", None) or None


def _protection(trainer: SophonTrainer) -> Protection:
    state, step = trainer.guard.state, trainer.state.global_step
    after = simulated = None
    if trainer.is_in_train:
        status = "in progress"
    elif state.start is None:
        status = "not measured"
    elif state.best_step is not None:
        status, step, after, simulated = "protected", state.best_step, state.best_original, state.best_score
    else:
        status, step = "not protected", state.good_step
    measured = (finite_or_none(value) for value in (state.start, after, state.start_simulated, simulated))
    return Protection(status, step, *measured, state.rollbacks, state.dropped)


def _compute(trainer: SophonTrainer) -> Compute:
    args, iterations = trainer.args, trainer.state.global_step
    processes = 1 if is_sharded(trainer.model) else args.world_size  # Those of a sharded model share a pass.
    # Each simulated step is a pass for the adversary's update, and one for the suppression loss where its weight is not 0.
    passes = sum(last_evaluated(row) + sum(weight != 0 for weight in row) for row in args.step_weights)
    return Compute(
        seconds=round(trainer.seconds(), 1),
        iterations=iterations,
        simulated_passes=iterations * args.l_FTS * processes * passes,
    )

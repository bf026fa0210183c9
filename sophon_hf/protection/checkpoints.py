"""What a checkpoint holds beside the Trainer's own files, and which checkpoint a run may go on from."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sophon_hf.models.sharding import is_sharded, local, with_local

if TYPE_CHECKING:
    from sophon_hf.protection.trainer import SophonTrainer

logger = logging.getLogger(__name__)

STATE_FILE = "sophon_state.pt"

HYPER_PARAMETERS = (
    "alpha", "beta", "K", "N", "l_FTS", "l_NTR", "gamma", "mu", "tolerance", "slack", "after_rollback", "suppression_loss",
    "strategy_space", "second_order", "probe_depths", "distillation", "mixup", "keep_norms", "num_persistent", "horizon", "seed",
    "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "max_grad_norm", "world_size", "eval_strategy", "eval_steps", "eval_delay", "warmup_steps", "lr_scheduler_type",
    "lr_scheduler_kwargs", "optim", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon",
)  # fmt: skip


def run_facts(trainer: SophonTrainer) -> dict[str, Any]:
    """What must be the same for a checkpoint to be this run's, as JSON knows it."""
    args, task = trainer.args, trainer.task
    facts = {name: getattr(args, name) for name in HYPER_PARAMETERS}
    if args.num_persistent:
        for name in ("save_steps", "save_strategy", "save_only_model"):  # Where adversaries start anew.
            facts[name] = getattr(args, name)
    if args.distillation:
        facts["base model"] = trainer.base_state  # What is distilled.
    facts["model"] = type(trainer.model).__name__
    facts["parameters"] = sum(p.numel() for p in trainer.model.parameters())
    facts["head"] = getattr(task, "head", None)
    facts |= {f"{name} data": domain.fingerprint for name, domain in trainer.domains.items()}
    if hasattr(task, "noise_scheduler"):
        # What begins with "_" tells how it was saved.
        facts["noise_scheduler"] = {k: v for k, v in task.noise_scheduler.config.items() if not k.startswith("_")}
    facts["mixed_precision"] = trainer.accelerator.mixed_precision
    facts["reinforcement_loss"] = getattr(trainer.reinforcement_loss, "__qualname__", None)
    return as_json(facts)


def as_json(values: dict[str, Any]) -> dict[str, Any]:
    """Values as JSON would give them back: enumerations by their value, what it does not know as text."""
    return json.loads(json.dumps(values, default=lambda value: getattr(value, "value", str(value))))


def checkpoint_to_resume(trainer: SophonTrainer, wanted: str | os.PathLike | bool | None) -> str | None:
    """The checkpoint to go on from, or None for a new run.

    Args:
        trainer: Not trained yet.
        wanted: A checkpoint folder, True for the last complete one in `output_dir`, or nothing.

    Raises:
        ValueError: It is another run's, or there is none; or a new run would overwrite another one, or begin where one ended.
    """
    if not wanted:
        if trainer.seconds():
            raise ValueError(
                "This trainer has begun to train already: its model is not the one from before protection any more. Make a new "
                "trainer of the unprotected model, or go on by train(resume_from_checkpoint=True)."
            )
        check_fresh_folder(trainer.args.output_dir)
        return None
    checkpoint = last_complete_checkpoint(trainer.args.output_dir) if wanted is True else os.fspath(wanted)
    check_same_run(checkpoint, run_facts(trainer))
    return checkpoint


def check_same_run(checkpoint: str, facts: dict[str, Any]) -> None:
    """Whether a checkpoint is this run's.

    Raises:
        ValueError: It is not, and what differs.
    """
    path = os.path.join(checkpoint, STATE_FILE)
    if not os.path.exists(path):
        raise ValueError(f"{checkpoint} is no checkpoint of a SophonTrainer: it has no {STATE_FILE}.")
    saved = load_state(checkpoint)["facts"]
    for name, value in facts.items():
        if saved.get(name) != value:
            raise ValueError(
                f"{checkpoint} belongs to another run: its {name} is {saved.get(name)!r}, now it is {value!r}. "
                "Resume with the same settings and data, or start in another output_dir."
            )


def check_fresh_folder(output_dir: str) -> None:
    """Whether a folder is free for a new run.

    Raises:
        ValueError: It holds another one.
    """
    if not os.path.isdir(output_dir):
        return
    made = ("checkpoint-", "model_index.json", "sophon.json")
    found = [n for n in os.listdir(output_dir) if n.startswith(made) or n.endswith(".safetensors")]
    if found:
        raise ValueError(
            f"{output_dir!r} holds another run ({sorted(found)[0]}). Go on with it by train(resume_from_checkpoint=True) "
            "if it has a complete checkpoint; else empty the folder, or choose another output_dir."
        )


def save_state(trainer: SophonTrainer, checkpoint: str) -> None:
    """Write the state file, in full or not at all; every process writes its own where the model is sharded."""
    if not (trainer.args.should_save or is_sharded(trainer.model)):
        return
    optimizer, schedule = trainer.suppression_optimizer, trainer.suppression_scheduler.state_dict()
    state = {
        "optimizer": _with_moments(optimizer, optimizer.state_dict(), lambda moment, _: local(moment)),
        "scheduler": {name: value for name, value in schedule.items() if name != "lr_lambdas"},
        "guard": trainer.guard.state_dict(),
        "seconds": trainer.seconds(),
        "facts": run_facts(trainer),
    }
    name = _own_file(trainer)
    temporary = os.path.join(checkpoint, f".{name}")
    torch.save(state, temporary)
    os.replace(temporary, os.path.join(checkpoint, name))
    if is_sharded(trainer.model):
        trainer.accelerator.wait_for_everyone()  # The checkpoint is complete when the main process says so.


def restore_state(trainer: SophonTrainer, checkpoint: str) -> float:
    """Put back what the state file holds, and return the seconds spent until then."""
    state = load_state(checkpoint, _own_file(trainer))
    optimizer = trainer.suppression_optimizer
    optimizer.load_state_dict(_with_moments(optimizer, state["optimizer"], with_local))
    trainer.suppression_scheduler.__dict__.update(state["scheduler"])
    trainer.guard.load_state_dict(state["guard"])
    return state["seconds"]


def load_state(checkpoint: str, name: str = STATE_FILE) -> dict[str, Any]:
    """Read a state file; it holds tensors and plain values only."""
    return torch.load(os.path.join(checkpoint, name), weights_only=True, map_location="cpu")


def _with_moments(
    optimizer: torch.optim.Optimizer, state: dict[str, Any], change: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, Any]:
    """An optimizer's state with its moments changed by `change(moment, parameter)`; the counts of steps stay."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        number: {name: change(value, parameters[number]) if value.ndim else value for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": moments}


def _own_file(trainer: SophonTrainer) -> str:
    process = trainer.args.process_index if is_sharded(trainer.model) else 0
    return STATE_FILE.replace(".", f"_{process}.") if process else STATE_FILE


def last_complete_checkpoint(output_dir: str) -> str:
    """The newest checkpoint that was written to its end: a killed process may leave a torn one behind.

    Raises:
        ValueError: There is none.
    """
    checkpoints = []
    for name in os.listdir(output_dir) if os.path.isdir(output_dir) else []:
        path = os.path.join(output_dir, name)
        number = name.removeprefix("checkpoint-")
        if name.startswith("checkpoint-") and number.isdigit() and _is_complete(path):
            checkpoints.append((int(number), path))
    if not checkpoints:
        raise ValueError(
            f"There is no complete checkpoint in {output_dir!r} to resume from: empty the folder or choose another one, "
            "and train without resuming."
        )
    return max(checkpoints)[1]


def _is_complete(checkpoint: str) -> bool:
    # The Trainer writes its state last.
    try:
        with open(os.path.join(checkpoint, "trainer_state.json"), encoding="utf-8") as file:
            json.load(file)
    except (OSError, ValueError):
        logger.warning("%s was not written to its end and is passed over.", checkpoint)
        return False
    return os.path.exists(os.path.join(checkpoint, STATE_FILE))

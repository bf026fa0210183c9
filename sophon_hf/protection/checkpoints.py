"""Checkpoint contents beside the Trainer's own files, which checkpoint a run may go on from, and the run's claim."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sophon_hf.data.domain import Domain
from sophon_hf.data.fingerprint import DataFingerprint, fingerprint_domain, is_base_name_or_hub_id
from sophon_hf.finetuning.strategy import StrategySpace
from sophon_hf.hub.claim import SCHEMA, Claim, Compute, Method, Protection, hash_weights
from sophon_hf.models.backbone import library_model
from sophon_hf.models.loading import hash_state
from sophon_hf.models.sharding import is_sharded, local, with_local
from sophon_hf.protection.config import SophonConfig
from sophon_hf.protection.guard import Guard, GuardState
from sophon_hf.protection.optimizers import SuppressionOptimizer
from sophon_hf.protection.suppression import last_evaluated
from sophon_hf.tasks.base import Task
from sophon_hf.utils import finite_or_none

logger = logging.getLogger(__name__)

_STATE_FILE = "sophon_state.pt"

# What a run follows from: a checkpoint of other values belongs to another run, and the claim states them.
_HYPER_PARAMETERS = (
    *("alpha", "beta", "K", "N", "l_FTS", "l_NTR", "gamma", "mu", "tolerance", "on_violation", "suppression_loss"),
    *("strategy_space", "second_order", "probe_depths", "distillation", "mixup", "keep_norms", "num_persistent"),
    *("horizon", "seed", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "max_grad_norm"),
    *("world_size", "eval_strategy", "eval_steps", "eval_delay", "warmup_steps", "lr_scheduler_type"),
    *("lr_scheduler_kwargs", "optim", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
)
# Fields of `SophonConfig` that go beyond the paper.
_ADDITIONS = ("probe_depths", "num_persistent", "distillation", "mixup", "keep_norms")
_PACKAGES = ("torch", "transformers", "diffusers", "accelerate", "datasets", "safetensors")


@dataclass
class Run:
    """What checkpoint and claim tell of a run.

    Attributes:
        args: Its hyper-parameters.
        task: What is learned.
        space: Phi.
        domains: The four domains.
        guard: What it sees goes into claim and checkpoint, and back.
        base_state: Hash of the model that is distilled; None without distillation.
        mixed_precision: As accelerate has it.
        reinforcement_loss: Name of a loss of the user's own, or None.
    """

    args: SophonConfig
    task: Task
    space: StrategySpace
    domains: dict[str, Domain]
    guard: Guard
    base_state: str | None
    mixed_precision: str
    reinforcement_loss: str | None
    _seconds: float = 0.0
    _started: float | None = None

    def begin(self, model: nn.Module, wanted: str | os.PathLike | bool | None) -> str | None:
        """Start the clock, and return the checkpoint to go on from, or None for a new run.

        Args:
            model: As it is before the run.
            wanted: A checkpoint folder, True for the last complete one in `output_dir`, or nothing.

        Raises:
            ValueError: The checkpoint is another run's, or there is none; or a new run would overwrite another one, or
                begin where one ended.
        """
        checkpoint = _checkpoint_to_resume(self.args.output_dir, wanted, self._facts(model), self.seconds() > 0)
        self._started, self._seconds = time.monotonic(), 0.0
        return checkpoint

    def end(self, measure: Callable[[], float]) -> None:
        """Let the guard choose the state that the model is left in, as `Guard.finish` does, and stop the clock."""
        self.guard.finish(measure)
        self._started, self._seconds = None, self.seconds()

    def seconds(self) -> float:
        """Return the wall-clock time spent on protection, in the runs before a resumption too."""
        return self._seconds + (time.monotonic() - self._started if self._started is not None else 0.0)

    def save(self, checkpoint: str, model: nn.Module, optimizer: SuppressionOptimizer) -> None:
        """Write the state file, in full or not at all; every process writes its own where the model is sharded."""
        name = _own_file(model, self.args.process_index)
        state = {
            "optimizer": _with_moments(optimizer, optimizer.state_dict(), lambda moment, _: local(moment)),
            "scheduler": optimizer.scheduler.state_dict(),
            "guard": self.guard.state_dict(),
            "seconds": self.seconds(),
            "facts": self._facts(model),
        }
        temporary = os.path.join(checkpoint, f".{name}")
        torch.save(state, temporary)
        os.replace(temporary, os.path.join(checkpoint, name))

    def restore(self, checkpoint: str, model: nn.Module, optimizer: SuppressionOptimizer, iteration: int) -> None:
        """Put back what `save` wrote after an iteration."""
        state = _read(checkpoint, _own_file(model, self.args.process_index))
        optimizer.load_state_dict(_with_moments(optimizer, state["optimizer"], with_local))
        optimizer.scheduler.load_state_dict(state["scheduler"])
        self.guard.load_state_dict(state["guard"])
        self.guard.state.seen = iteration
        self._seconds = state["seconds"]

    def _facts(self, model: nn.Module) -> dict[str, Any]:
        """Return what must be the same for a checkpoint to be this run's, as JSON knows it."""
        facts = {name: getattr(self.args, name) for name in _HYPER_PARAMETERS}
        if self.args.num_persistent:
            # Adversaries that live on are forgotten at every checkpoint, so it matters when these are.
            facts |= {name: getattr(self.args, name) for name in ("save_steps", "save_strategy", "save_only_model")}
        if self.base_state is not None:
            facts["base model"] = self.base_state
        facts["model"] = type(model).__name__
        facts["parameters"] = sum(p.numel() for p in model.parameters())
        facts["head"] = getattr(self.task, "head", None)
        facts["metric"] = self.task.metric
        facts |= {f"{name} data": domain.fingerprint for name, domain in self.domains.items()}
        scheduler = getattr(self.task, "noise_scheduler", None)
        if scheduler is not None:
            # What begins with "_" tells how it was saved.
            facts["noise_scheduler"] = {k: v for k, v in scheduler.config.items() if not k.startswith("_")}
        facts["mixed_precision"] = self.mixed_precision
        facts["reinforcement_loss"] = self.reinforcement_loss
        return _as_json(facts)

    @cached_property
    def _fingerprints(self) -> dict[str, DataFingerprint]:
        return {name: fingerprint_domain(domain) for name, domain in self.domains.items()}

    def claim(self, model: nn.Module, folder: Path, iteration: int, in_progress: bool, sharded: bool) -> Claim:
        """Return what is claimed of the model that lies in `folder`; of attacks, nothing."""
        names = [name for name in _HYPER_PARAMETERS if name != "strategy_space"]
        hyper_parameters = {name: getattr(self.args, name) for name in names}
        hyper_parameters["suppression_loss"] = self.args.suppression_loss or next(iter(self.task.suppression_losses))
        hyper_parameters["reinforcement_loss"] = self.reinforcement_loss
        added = [name.replace("_", " ") for name in _ADDITIONS if getattr(self.args, name)]
        method = "SOPHON, Algorithm 1" + (f" with {', '.join(added)}" if added else "")
        base = getattr(getattr(model, "config", None), "_name_or_path", None) or getattr(model, "name_or_path", None)
        if base and os.path.isdir(base):
            base = os.path.basename(os.path.abspath(base))
        return Claim(
            schema=SCHEMA,
            method=Method(method, _as_json(hyper_parameters), self.space),
            model=type(library_model(model)).__name__,
            base_model=base if base and is_base_name_or_hub_id(base) else None,
            base_revision=getattr(model, "hub_revision", None),
            remote_code=type(library_model(model)).__module__.startswith("transformers_modules"),
            versions={package: version(package) for package in _PACKAGES},
            data=self._fingerprints,
            weights=hash_weights(folder),
            state_hash=hash_state(model),
            metric=self.task.metric,
            greater_is_better=self.task.greater_is_better,
            protection=_protection_of(self.guard.state, self.args.simulated_examples, iteration, in_progress),
            compute=self._compute(iteration, sharded),
            attacks=None,
        )

    def _compute(self, iterations: int, sharded: bool) -> Compute:
        processes = 1 if sharded else self.args.world_size  # Those of a sharded model share a pass.
        # A step is a pass for the adversary's update, and one for the suppression loss where its weight is not 0.
        rows = self.args.step_weights
        passes = sum(last_evaluated(row) + sum(weight != 0 for weight in row) for row in rows)
        suppressed = min(iterations, self.args.suppressed_steps)
        return Compute(round(self.seconds(), 1), iterations, suppressed * self.args.l_FTS * processes * passes)


def _protection_of(state: GuardState, examples: int, iteration: int, in_progress: bool) -> Protection:
    after = simulated = None
    if in_progress:
        status = "in progress"
    elif state.start is None:
        status = "not measured"
    elif state.best_step is not None:
        status, iteration, after, simulated = "protected", state.best_step, state.best_original, state.best_score
    else:
        status, iteration = "not protected", state.good_step
    return Protection(
        status=status,
        iteration=iteration,
        original_before=finite_or_none(state.start),
        original_after=finite_or_none(after),
        simulated_examples=examples,
        simulated_before=finite_or_none(state.start_simulated),
        simulated_after=finite_or_none(simulated),
        simulated_scratch=finite_or_none(state.scratch),
        rollbacks=state.rollbacks,
        dropped=state.dropped,
    )


def _as_json(values: dict[str, Any]) -> dict[str, Any]:
    # Enumerations by their value, what JSON does not know as text.
    return json.loads(json.dumps(values, default=lambda value: getattr(value, "value", str(value))))


def _checkpoint_to_resume(
    output_dir: str, wanted: str | os.PathLike | bool | None, facts: dict[str, Any], begun: bool
) -> str | None:
    if not wanted and begun:
        raise ValueError(
            "This trainer has begun to train already: its model is not the one from before protection any more. "
            "Make a new trainer of the unprotected model, or go on by train(resume_from_checkpoint=True)."
        )
    checkpoint = checkpoint_in(output_dir, wanted)
    saved = facts if checkpoint is None else _read(checkpoint, _STATE_FILE)["facts"]
    for name, value in facts.items():
        if saved.get(name) != value:
            raise ValueError(
                f"{checkpoint} belongs to another run: its {name} is {saved.get(name)!r}, now it is {value!r}. Resume "
                "with the same settings and data, or start in another output_dir."
            )
    return checkpoint


def checkpoint_in(output_dir: str, wanted: str | os.PathLike | bool | None) -> str | None:
    """Return the checkpoint folder that a run goes on from, None for a new run; arguments as of `Run.begin`.

    Raises:
        ValueError: There is no such checkpoint, or a new run would overwrite another one.
    """
    if not wanted:
        names = os.listdir(output_dir) if os.path.isdir(output_dir) else []
        made = ("checkpoint-", "model_index.json", "sophon.json")
        found = [name for name in names if name.startswith(made) or name.endswith(".safetensors")]
        if found:
            raise ValueError(
                f"{output_dir!r} holds another run ({min(found)}). Go on with it by "
                "train(resume_from_checkpoint=True), or --resume on the command line, if it has a complete checkpoint; "
                "else empty the folder, or choose another output_dir."
            )
        return None
    checkpoint = _last_complete_checkpoint(output_dir) if wanted is True else os.fspath(wanted)
    if not os.path.exists(os.path.join(checkpoint, _STATE_FILE)):
        raise ValueError(f"{checkpoint} is no checkpoint of a SophonTrainer: it has no {_STATE_FILE}.")
    return checkpoint


def _last_complete_checkpoint(output_dir: str) -> str:
    """Return the newest checkpoint that was written to its end: a killed process may leave a torn one behind."""
    checkpoints = []
    for name in os.listdir(output_dir) if os.path.isdir(output_dir) else []:
        number = name.removeprefix("checkpoint-")
        if not name.startswith("checkpoint-") or not number.isdigit():
            continue
        path = os.path.join(output_dir, name)
        try:
            # The Trainer writes its state last.
            with open(os.path.join(path, "trainer_state.json"), encoding="utf-8") as file:
                json.load(file)
        except (OSError, ValueError):
            logger.warning("%s was not written to its end and is passed over.", path)
            continue
        if os.path.exists(os.path.join(path, _STATE_FILE)):
            checkpoints.append((int(number), path))
    if not checkpoints:
        raise ValueError(
            f"There is no complete checkpoint in {output_dir!r} to resume from: empty the folder or choose another "
            "one, and train without resuming."
        )
    return max(checkpoints)[1]


def _read(checkpoint: str, name: str) -> dict[str, Any]:
    # It holds tensors and plain values only, so that no pickle can run.
    return torch.load(os.path.join(checkpoint, name), weights_only=True, map_location="cpu")


def _own_file(model: nn.Module, process: int) -> str:
    return _STATE_FILE.replace(".", f"_{process}.") if process and is_sharded(model) else _STATE_FILE


def _with_moments(
    optimizer: torch.optim.Optimizer, state: dict[str, Any], change: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, Any]:
    """Return an optimizer's state with its moments changed by `change(moment, parameter)`; step counts stay."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        number: {name: change(value, parameters[number]) if value.ndim else value for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": moments}

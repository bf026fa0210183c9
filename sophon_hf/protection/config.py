"""`SophonConfig`: the hyper-parameters of Algorithm 1 beside those of the Hugging Face Trainer."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import TrainingArguments

from sophon_hf.finetuning.strategy import StrategySpace
from sophon_hf.protection.libraries import try_libraries
from sophon_hf.protection.presets import PRESETS
from sophon_hf.utils import check_choice, refuse_unwritable

_FP16 = (
    "fp16 needs a loss scaler that the suppression gradient does not pass through, and full half-precision evaluation "
    "rounds the weights: use bf16=True or full precision."
)
# Fields of the Trainer's that nothing here reads, and what does what they are for.
_WITHOUT_EFFECT = {
    "num_train_epochs": "`max_steps` is the number of iterations",
    "data_seed": "`seed` decides the order of the data too",
    "train_sampling_strategy": "batches are drawn at random, by the seed",
    "dataloader_drop_last": "batches run on over the end of the data, and all are full",
    "prediction_loss_only": "`eval_strategy='no'` leaves metrics out",
    "eval_accumulation_steps": "scores are no larger than the labels",
    "batch_eval_metrics": "pass a `metric` to the trainer",
    "metric_for_best_model": "the guard keeps the best state inside the tolerance",
    "use_liger_kernel": "put its kernels in the model before protection",
}


@dataclass
class SophonConfig(TrainingArguments):
    """Arguments of `SophonTrainer`; every default that the paper states is the paper's (section 5.1.1).

    `max_steps` is the paper's Iter: one step of the Trainer is one iteration of Algorithm 1.
    """

    output_dir: str = field(default="sophon-output", metadata={"help": "Where checkpoints and the protected model go."})
    max_steps: int = field(default=800, metadata={"help": "Iter: iterations of Algorithm 1."})
    alpha: float = field(default=3e-4, metadata={"help": "alpha: learning rate of the suppression loop's Adam."})
    beta: float = field(default=5e-4, metadata={"help": "beta: learning rate of the reinforcement loop's Adam."})
    K: int = field(default=50, metadata={"help": "K: fine-tuning updates of each simulated adversary."})
    N: int = field(default=1, metadata={"help": "N: simulated adversaries a suppression loop, on each process."})
    l_FTS: int = field(default=1, metadata={"help": "l_FTS: suppression loops an iteration."})
    l_NTR: int = field(default=1, metadata={"help": "l_NTR: reinforcement loops an iteration."})
    gamma: list | str | None = field(
        default=None,
        metadata={
            "help": "gamma: K weights of the adversaries' steps, or one such list for each of the N adversaries "
            "(JSON); each is divided by N. Left out, every step weighs 1 / K. A step of weight 0 costs no evaluation."
        },
    )
    mu: float = field(
        default=1.0,
        metadata={
            "help": "mu of eq. 2: weight of the reinforcement loss. Adam divides a constant weight out again, so it "
            "matters together with max_grad_norm; alpha and beta set the balance."
        },
    )
    tolerance: float = field(
        default=0.05,
        metadata={
            "help": "lambda of eq. 1: how far the original metric may fall below its start, as a share of accuracy "
            "(0.05 = 5 points) or, for diffusion, as a relative rise of the MSE."
        },
    )
    on_violation: str = field(
        default="halve_alpha",
        metadata={
            "help": "What follows where the original metric fell by more than the tolerance. halve_alpha, continue and "
            "stop put the last good state back first, with both optimizers' states cleared. adapt_alpha lets the "
            "metric fall further early (6 tolerances at first, 1 from six tenths of the iterations on), and halves "
            "alpha where it stays beyond that. Inside the tolerance it doubles alpha while simulated adversaries "
            "recover something, early up to 16 times its schedule. Only a lost original domain makes it put a state "
            "back. A state outside the tolerance is never the protected model.",
            "choices": ["halve_alpha", "continue", "stop", "adapt_alpha"],
        },
    )
    suppression_loss: str | None = field(
        default=None,
        metadata={
            "help": "L_alpha: inverse_cross_entropy (the default for classifiers), kl_from_uniform, denial_of_service "
            "(the default for diffusion), or the unstable negated_cross_entropy and negated_mse.",
            "choices": [
                "inverse_cross_entropy",
                "kl_from_uniform",
                "denial_of_service",
                "negated_cross_entropy",
                "negated_mse",
            ],
        },
    )
    strategy_space: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Phi: the simulated strategies, as the fields of StrategySpace (JSON); default: the paper's."
        },
    )
    num_persistent: int = field(
        default=0,
        metadata={
            "help": "How many simulated adversaries live on over the iterations, taken in turn, K updates at a time; "
            "0: every one starts from theta, as published. Each holds about three copies of the model."
        },
    )
    preconditioning: float = field(
        default=0.0,
        metadata={
            "help": "Weight c of the reinforcement gradient's second moment in the suppression step, alpha m / "
            "sqrt(v + c w): parameters that the original domain minds move less; 0: Adam, as published."
        },
    )
    recovery_ratio: float = field(
        default=0.0,
        metadata={
            "help": "Share of the iterations, at the end, that are reinforcement alone: alpha is zero there, and the "
            "original metric comes back."
        },
    )
    simulated_examples: int = field(
        default=50,
        metadata={
            "help": "How many restricted examples the guard's fixed adversaries have. Choose what a real adversary "
            "would have; with all data, a protected and an unprotected model can look alike."
        },
    )
    horizon: int = field(
        default=128, metadata={"help": "Updates after which a persistent adversary is replaced by a new one."}
    )
    probe_depths: int = field(
        default=0,
        metadata={
            "help": "Depths of the model at which a closed-form probe, what a new head with a hidden layer could do, "
            "is suppressed too; 0: none, as published. For classifiers."
        },
    )
    distillation: float = field(
        default=0.0,
        metadata={
            "help": "Weight in L_beta of the distance to what the unprotected model predicts (KL, or MSE for "
            "diffusion); holds a second copy of the model."
        },
    )
    mixup: bool = field(
        default=False,
        metadata={
            "help": "Distil on mixtures too: half of each batch of O is replaced by convex mixtures of two examples, "
            "images mirrored at random, for which only the unprotected model's prediction counts. Needs distillation; "
            "left out where inputs are not continuous."
        },
    )
    keep_norms: bool = field(
        default=False,
        metadata={
            "help": "Hold layers whose scale does not matter at the norm of a fresh initialisation, so that no "
            "protection rests on the scale of weights, and re-scaling them gains an adversary nothing."
        },
    )
    second_order: bool = field(
        default=False,
        metadata={"help": "Exact gradient of eq. 5 instead of the first-order one; for small, smooth models."},
    )
    validation_share: float = field(
        default=0.1, metadata={"help": "Share of each domain held out for evaluation where no eval_dataset is given."}
    )
    learning_rate: float | None = field(default=None, metadata={"help": "Leave out: set beta (and alpha) instead."})
    lr_scheduler_type: str = field(
        default="constant", metadata={"help": "Schedule of both alpha and beta over the iterations."}
    )
    per_device_train_batch_size: int = field(default=128, metadata={"help": "Examples of O a reinforcement loop."})
    per_device_eval_batch_size: int = field(default=256, metadata={"help": "Examples a forward pass in evaluation."})
    max_grad_norm: float = field(
        default=0.0, metadata={"help": "Clip the suppression and the reinforcement gradient to this norm; 0: never."}
    )
    eval_strategy: str = field(
        default="steps", metadata={"help": "When to evaluate; the guard acts at every evaluation."}
    )
    eval_steps: float | None = field(default=20, metadata={"help": "Iterations between evaluations."})
    eval_on_start: bool = field(default=True, metadata={"help": "The guard measures the start; leave it on."})
    logging_steps: float = field(default=1, metadata={"help": "Iterations between log entries."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Leave off: it hides NaN losses."})
    save_steps: float = field(default=100, metadata={"help": "Iterations between checkpoints."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})

    def __post_init__(self) -> None:
        self._refuse_unsupported()
        if "LOCAL_RANK" in os.environ and not torch.accelerator.is_available():
            self.use_cpu = True  # Else accelerate would start every process of a machine without a GPU on its own.
        super().__post_init__()
        if getattr(self, "mixed_precision", None) == "fp16":
            raise ValueError(_FP16)
        if self.fsdp and self.world_size < 2:
            raise ValueError("fsdp shards a model over several processes, but there is one: use `accelerate launch`.")
        if self.eval_strategy == "no":
            self.eval_on_start = False  # No guard: a start that is never compared must not be put back either.
        elif not self.eval_on_start:
            raise ValueError(
                "eval_on_start is off, but the guard has to measure the model before protection: leave it on, or "
                "switch the guard off by eval_strategy='no'."
            )
        if self.learning_rate is not None and self.learning_rate != self.beta:
            raise ValueError(
                f"learning_rate is {self.learning_rate}, but SOPHON has two rates: set `beta` (reinforcement, now "
                f"{self.beta}) and `alpha` (suppression, now {self.alpha}), and leave learning_rate None."
            )
        self._refuse_numbers()
        if self.preconditioning and not str(getattr(self.optim, "value", self.optim)).startswith("adam"):
            raise ValueError(
                f"preconditioning needs the second moment that beta's optimizer keeps, and optim {self.optim!r} keeps "
                "none: use an Adam, or leave preconditioning 0."
            )
        if self.num_persistent and self.second_order:
            raise ValueError("The exact gradient does not reach through earlier iterations: leave `num_persistent` 0.")
        if self.num_persistent and self.num_persistent < self.N * self.l_FTS:
            raise ValueError(
                f"num_persistent is {self.num_persistent}, but an iteration simulates N x l_FTS = "
                f"{self.N * self.l_FTS} adversaries."
            )
        if self.mixup and not self.distillation:
            raise ValueError("mixup is on, but mixtures have no label, only distillation: set `distillation` too.")
        field_of = type(self).__dataclass_fields__
        check_choice(self.on_violation, field_of["on_violation"].metadata["choices"], "on_violation")
        self.gamma = self._parse_gamma()
        if isinstance(self.strategy_space, StrategySpace):
            self.strategy_space = self.strategy_space.to_dict()
        elif self.strategy_space is not None:
            self.strategy_space = StrategySpace.from_dict(_from_json(self.strategy_space, "strategy_space")).to_dict()
        if self.second_order and any(self.space.preparations):
            raise ValueError(
                "The exact gradient does not reach through preparations: leave `second_order` off, or 'warm_up' and "
                "'shrink_and_perturb' out."
            )
        if "warm_up" in self.space.preparations:
            self._check_warm_up()
        try_libraries(self)
        refuse_unwritable(self.output_dir)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> SophonConfig:
        """Hyper-parameters that belong together, under a name.

        Args:
            name: "paper" (Algorithm 1 as published, which the plain defaults are too) or "representation" (suppresses
                what new heads could do with the features; see docs/defences.md).
            changes: Other fields, which win over the preset's.

        Raises:
            ValueError: An unknown name, or a value out of range.
        """
        check_choice(name, PRESETS, "preset")
        return cls(**{**PRESETS[name], **changes})

    def _refuse_numbers(self) -> None:
        sizes = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
        whole = dict.fromkeys(("max_steps", "K", "N", "l_NTR", "horizon", "simulated_examples", *sizes), 1)
        whole |= dict.fromkeys(("l_FTS", "probe_depths", "num_persistent", "seed", "dataloader_num_workers"), 0)
        for name, least in whole.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} is {value!r}, but must be a whole number of at least {least}.")
        for name in ("alpha", "beta", "validation_share"):
            if not _is_number(getattr(self, name)) or not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}, but must be a number between 0 and 1.")
        for name in ("mu", "tolerance", "max_grad_norm", "distillation", "preconditioning", "weight_decay"):
            if not _is_number(getattr(self, name)) or not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)!r}, but must be a number that is not negative.")
        for name in ("eval", "save", "logging"):
            every = getattr(self, f"{name}_steps")
            if getattr(self, f"{name}_strategy") == "steps" and not (_is_number(every) and every > 0):
                raise ValueError(f"{name}_steps is {every!r}, but must be a number above 0.")
        if not _is_number(self.recovery_ratio) or not 0 <= self.recovery_ratio < 1:
            raise ValueError(f"recovery_ratio is {self.recovery_ratio!r}, but must be a number from 0 to below 1.")

    def _check_warm_up(self) -> None:
        if not self.probe_depths:
            raise ValueError(
                "While an adversary warms up on original data only probes are suppressed, and there are none: set "
                "`probe_depths`, or leave 'warm_up' out of the strategy space."
            )
        if not self.num_persistent or not self.l_FTS or self.save_strategy != "steps":
            return
        iterations = self.save_steps if self.save_steps >= 1 else self.save_steps * self.max_steps
        updates = iterations * self.N * self.l_FTS * self.K / self.num_persistent
        if iterations < self.max_steps and updates <= self.horizon / 2:
            raise ValueError(
                f"save_steps is {self.save_steps:g}: persistent adversaries start again at every checkpoint, after "
                f"{updates:g} updates, and one that warms up would never end its warm-up of {self.horizon // 2}. Save "
                "less often, or lower `horizon`."
            )

    def _parse_gamma(self) -> list | None:
        gamma = _from_json(self.gamma, "gamma")
        if gamma is None:
            return None
        asked = f"give K = {self.K} finite weights, none below 0, or N = {self.N} lists of them."
        try:
            weights = np.asarray(gamma, dtype=float)
        except (TypeError, ValueError) as error:
            raise ValueError(f"gamma is {gamma!r}: {asked}") from error
        if weights.shape not in ((self.K,), (self.N, self.K)):
            raise ValueError(f"gamma has shape {weights.shape}: {asked}")
        if not np.isfinite(weights).all() or (weights < 0).any():
            raise ValueError(f"gamma is {gamma!r}: {asked}")
        if not weights.any():
            raise ValueError("Every gamma is 0: no simulated step would be suppressed.")
        return weights.tolist()

    def _refuse_unsupported(self) -> None:
        if self.fp16 or self.fp16_full_eval or self.bf16_full_eval:
            raise ValueError(_FP16)
        if self.deepspeed:
            raise ValueError(
                "DeepSpeed shards the parameters that a simulated adversary changes in place; it is not supported. Use "
                "`accelerate launch --num_processes N`, or FSDP2 for a model that does not fit on one GPU."
            )
        if str(getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type)) in ("reduce_lr_on_plateau", "greedy"):
            raise ValueError(
                f"lr_scheduler_type {self.lr_scheduler_type!r} waits for one metric, but there are two losses: use "
                "constant, linear or cosine."
            )
        if self.hub_token is not None:
            raise ValueError(
                "hub_token would be kept with the arguments: leave it out, and run `hf auth login` instead."
            )
        if str(getattr(self.hub_strategy, "value", self.hub_strategy)) in ("checkpoint", "all_checkpoints"):
            raise ValueError(
                f"hub_strategy {self.hub_strategy!r} would publish optimizer states, which let anyone go on from here: "
                "use every_save or end."
            )
        if self.save_strategy == "best":
            raise ValueError(
                "save_strategy 'best' knows of one metric: use steps; the guard keeps the best state anyway."
            )
        if self.ignore_data_skip:
            raise ValueError("ignore_data_skip would resume with other batches than the run had: leave it off.")
        for name, instead in _WITHOUT_EFFECT.items():
            if getattr(self, name) not in (None, False, type(self).__dataclass_fields__[name].default):
                given = getattr(self, name)
                raise ValueError(f"{name} is {given!r}, but would change nothing: leave it out; {instead}.")
        if self.torch_compile or self.torch_compile_backend or self.torch_compile_mode:
            raise ValueError(
                "torch_compile compiles what the Trainer wraps, which no simulated adversary runs: leave it out, and "
                "call `compile()` of the model's blocks before protection."
            )
        for name in ("label_smoothing_factor", "neftune_noise_alpha", "auto_find_batch_size", "load_best_model_at_end"):
            if getattr(self, name):
                raise ValueError(
                    f"{name} has no place in Algorithm 1 and would not reach the simulation: leave it out."
                )

    @property
    def space(self) -> StrategySpace:
        """Phi."""
        return StrategySpace() if self.strategy_space is None else StrategySpace.from_dict(self.strategy_space)

    @property
    def suppressed_steps(self) -> int:
        """How many iterations have suppression loops; the others, at the end, are reinforcement alone."""
        return max(1, round((1 - self.recovery_ratio) * self.max_steps))

    @property
    def step_weights(self) -> list[list[float]]:
        """gamma_{i,k} of this process: N rows of K weights."""
        weights = np.asarray(self.gamma if self.gamma is not None else [1 / self.K] * self.K)
        return (np.broadcast_to(weights, (self.N, self.K)) / self.N).tolist()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _from_json(value: Any, name: str) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError(f"{name} is not JSON ({error}): {value!r}.") from error

"""Short protections, and an observer of them."""

from __future__ import annotations

import torch
from torch import nn
from transformers import TrainerCallback

from sophon_hf import SophonConfig

SPACE = {"learning_rates": [1e-2, 1e-3], "batch_sizes": [8, 16]}


def config(tmp_path, **changes) -> SophonConfig:
    """Three iterations with a small simulation, and no evaluation or saving unless asked for."""
    settings = {
        "max_steps": 3,
        "K": 3,
        "simulated_examples": 3,
        "strategy_space": SPACE,
        "per_device_train_batch_size": 16,
        "eval_strategy": "no",
        "eval_on_start": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 3,
        "use_cpu": True,
    }
    return SophonConfig(str(tmp_path / "output"), **{**settings, **changes})


def guarded(tmp_path, **changes) -> SophonConfig:
    """A configuration whose guard looks at every iteration."""
    settings = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "tolerance": 0.05}
    return config(tmp_path, **{**settings, **changes})


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


class Observer(TrainerCallback):
    """Writes down every log entry, and the model and its metrics after every evaluation."""

    def __init__(self):
        self.logs, self.evaluations = [], []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))

    def on_evaluate(self, args, state, control, metrics=None, model=None, optimizer=None, **kwargs):
        seen = {"step": state.global_step, "model": state_of(model), "optimizer": len(optimizer.state), **metrics}
        self.evaluations.append(seen)

    @property
    def steps(self) -> list[dict]:
        return [entry for entry in self.logs if "loss" in entry]

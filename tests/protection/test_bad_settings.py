"""Settings that make no sense are refused when a configuration is made, by a message that says what to do."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sophon_hf import SophonConfig


def config(tmp_path, **changes) -> SophonConfig:
    settings = {"K": 2, "max_steps": 1, "save_strategy": "no", "use_cpu": True}
    return SophonConfig(str(tmp_path / "output"), **{**settings, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"K": 0}, "K is 0, but must be a whole number of at least 1"),
        ({"N": 0}, "N is 0, but must be a whole number of at least 1"),
        ({"K": 2.5}, "K is 2.5"),
        ({"N": 1.5}, "N is 1.5"),
        ({"max_steps": -1}, "max_steps is -1, but must be a whole number of at least 1"),
        ({"l_FTS": -1}, "l_FTS is -1, but must be a whole number of at least 0"),
        ({"l_NTR": 0}, "l_NTR is 0.*at least 1"),
        ({"alpha": 0}, "alpha is 0, but must be a number between 0 and 1"),
        ({"alpha": float("nan")}, "alpha is nan, but must be a number between 0 and 1"),
        ({"beta": 1.5}, "beta is 1.5, but must be a number between 0 and 1"),
        ({"mu": -1}, "mu is -1, but must be a number that is not negative"),
        ({"tolerance": -0.1}, "tolerance is -0.1, but must be a number that is not negative"),
        ({"tolerance": float("nan")}, "tolerance is nan"),
        ({"max_grad_norm": -1.0}, "max_grad_norm is -1"),
        ({"validation_share": 1.0}, "validation_share is 1.0, but must be a number between 0 and 1"),
        (
            {"per_device_train_batch_size": 0},
            "per_device_train_batch_size is 0, but must be a whole number of at least 1",
        ),
        (
            {"per_device_eval_batch_size": 0},
            "per_device_eval_batch_size is 0, but must be a whole number of at least 1",
        ),
        (
            {"gradient_accumulation_steps": 0},
            "gradient_accumulation_steps is 0, but must be a whole number of at least 1",
        ),
        ({"learning_rate": 1e-4}, "two rates: set `beta`.*and `alpha`"),
        ({"on_violation": "halve"}, "on_violation is 'halve'.*Did you mean 'halve_alpha'"),
        ({"gamma": [1, 1, 1]}, r"gamma has shape \(3,\): give K = 2 finite weights"),
        ({"gamma": [1, float("nan")]}, "finite weights"),
        ({"gamma": [0, 0]}, "Every gamma is 0"),
        ({"gamma": "[1, 2"}, "gamma.*JSON"),
        ({"gamma": [1, -1]}, "none below 0"),
        ({"gamma": [[1, 2], [3]]}, "gamma is .*give K = 2 finite weights"),
        ({"gamma": '["a", 1]'}, "gamma is .*give K = 2 finite weights"),
        ({"log_level": "loud"}, "log_level is 'loud', but must be one of detail, debug"),
        ({"report_to": "wandbb"}, r"report_to is \['wandbb'\], which cannot be used: wandbb is not supported"),
        ({"adam_beta1": 2.0}, "optim is .*cannot be used: Invalid beta parameter at index 0: 2.0"),
        ({"optim_args": "foo"}, "optim is .*cannot be used"),
        ({"seed": -1}, "seed is -1, but must be a whole number of at least 0"),
        ({"eval_steps": -3}, "eval_steps is -3, but must be a number above 0"),
        ({"metric_for_best_model": "f1"}, "metric_for_best_model is 'f1', but would change nothing"),
        ({"save_strategy": "best"}, "save_strategy 'best' knows of one metric"),
        ({"K": True}, "K is True"),
        ({"alpha": True}, "alpha is True"),
        ({"strategy_space": {"learning_rates": None}}, "learning_rates is None: give a non-empty list"),
        ({"strategy_space": '{"optimizers": ["adam"'}, "strategy_space.*JSON"),
        ({"strategy_space": {"optimizer": ["adam"]}}, "no field 'optimizer'. Did you mean 'optimizers'"),
        ({"strategy_space": {"optimizers": ["adm"]}}, "optimizer is 'adm'.*Did you mean 'adam'"),
        ({"strategy_space": {"optimizers": []}}, "optimizers is .*: give a non-empty list"),
        ({"strategy_space": {"batch_sizes": [0]}}, "batch_size is 0"),
        ({"strategy_space": {"learning_rates": [-1.0]}}, "learning_rate is -1.0, but must be positive"),
        ({"strategy_space": {"initializations": ["scratch"]}}, "cannot hold 'scratch'"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "reduce_lr_on_plateau"),
        ({"fp16": True}, "use bf16=True or full precision"),
        ({"fsdp": True}, "several processes, but there is one: use `accelerate launch`"),
        (
            {"deepspeed": {"zero_optimization": {"stage": 3}}},
            "DeepSpeed shards.*not supported. Use `accelerate launch.*or FSDP2",
        ),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor has no place in Algorithm 1.*leave it out"),
        (
            {"torch_compile": True},
            "no simulated adversary runs: leave it out, and call `compile\\(\\)` of the model's blocks",
        ),
        (
            {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 20},
            "load_best_model_at_end has no place in Algorithm 1",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_hyper_parameter_that_makes_no_sense_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)


def test_fp16_from_the_launcher_is_refused_too(tmp_path, monkeypatch):
    """`accelerate launch --mixed_precision fp16` sets it by this variable."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match="use bf16"):
        config(tmp_path)


def test_a_rate_can_be_replaced_in_a_configuration(tmp_path):
    assert replace(config(tmp_path), beta=1e-3).beta == 1e-3

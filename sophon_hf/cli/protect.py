"""`sophon-hf protect`: Algorithm 1."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile

from sophon_hf.cli.loading import columns, load_half, load_metric, load_split, look_for
from sophon_hf.cli.timing import DryRunEnd, TellTime
from sophon_hf.protection.checkpoints import checkpoint_in
from sophon_hf.protection.config import SophonConfig
from sophon_hf.protection.trainer import SophonTrainer


def build_config(options: argparse.Namespace) -> SophonConfig:
    """Return the hyper-parameters of the preset, and over them those that were named."""
    fields = {field.name for field in dataclasses.fields(SophonConfig)}
    return SophonConfig.preset(options.preset, **{n: value for n, value in vars(options).items() if n in fields})


def run(options: argparse.Namespace) -> None:
    """Protect as the options say, and leave the protected model in `output_dir`."""
    if not options.dry_run:
        _protect(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        nothing = {"output_dir": folder, "report_to": "none", "disable_tqdm": True, "push_to_hub": False}
        _protect(argparse.Namespace(**{**vars(options), **nothing, "resume": False}))


def _protect(options: argparse.Namespace) -> None:
    # What can be told at once comes before data are read.
    config, metric = build_config(options), load_metric(options)
    checkpoint_in(config.output_dir, options.resume)
    look_for(options.model, on_hub=True)
    trainer = SophonTrainer(
        options.model,
        load_half(options, defender=True),
        load_split(options, "original"),
        config,
        metric=metric,
        **columns(options),
        callbacks=[TellTime(options.dry_run)],
    )
    try:
        trainer.train(resume_from_checkpoint=options.resume or None)
    except DryRunEnd:
        if trainer.is_world_process_zero():
            print(trainer.guard.outlook)
        return
    if config.save_strategy == "no":
        trainer.save_model()  # `save_strategy` is about checkpoints; the command is run for the model.
    state = trainer.guard.state
    if state.best_step is None and state.start is not None:
        # The guard's warning has said so already.
        sys.exit(f"sophon-hf protect: there is no protected model in {config.output_dir}; the warning above says why.")
    if trainer.is_world_process_zero():
        which = "not evaluated" if state.best_step is None else f"iteration {state.best_step}"
        print(f"Protected model ({which}) saved in {config.output_dir}.")

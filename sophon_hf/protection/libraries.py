"""What only other libraries can tell to be wrong with the Trainer's arguments, asked before any work."""

from __future__ import annotations

import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.training_args import trainer_log_levels

from sophon_hf.utils import check_choice


def try_libraries(args: TrainingArguments) -> None:
    """Make once what only other libraries can tell to be wrong: loggers, optimizer and schedule.

    Raises:
        ValueError: One of them cannot be made.
    """
    for name in ("log_level", "log_level_replica"):
        check_choice(getattr(args, name), trainer_log_levels, name)
    made, layer = "report_to", torch.nn.LayerNorm(1)  # It draws no random numbers.
    try:
        for callback in get_reporting_integration_callbacks(args.report_to):
            callback()
        made = "optim"
        kind, arguments = Trainer.get_optimizer_cls_and_kwargs(args, layer)
        optimizer = kind(layer.parameters(), **{**arguments, "lr": 1e-3})
        made = "lr_scheduler_type"
        steps = {"num_warmup_steps": args.get_warmup_steps(args.max_steps), "num_training_steps": args.max_steps}
        get_scheduler(args.lr_scheduler_type, optimizer, scheduler_specific_kwargs=args.lr_scheduler_kwargs, **steps)
    except Exception as error:  # They raise what they like.
        raise ValueError(f"{made} is {getattr(args, made)!r}, which cannot be used: {error}") from error

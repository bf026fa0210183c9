"""Before any work: build the domains, and find out whether data, model and strategies fit one another."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import datasets
import numpy as np
import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy

from sophon_hf.data.domain import Domain, Source, build_domain, load_domain
from sophon_hf.data.labels import label_column, split_indices
from sophon_hf.finetuning.initialization import preserved
from sophon_hf.finetuning.loop import FineTuning
from sophon_hf.finetuning.strategy import FineTuningStrategy, StrategySpace
from sophon_hf.models.loading import evaluation_mode
from sophon_hf.models.sharding import is_sharded
from sophon_hf.models.structure import ModelStructure
from sophon_hf.protection.config import SophonConfig
from sophon_hf.protection.environment import held_out_examples
from sophon_hf.protection.probes import Probes
from sophon_hf.protection.reinforcement import Distillation
from sophon_hf.tasks.base import Task
from sophon_hf.tasks.evaluation import first_rows

logger = logging.getLogger(__name__)

FEWEST_EXAMPLES = 4
FEWEST_WITH_BATCH_NORM = 20


def refuse_arguments(model: nn.Module | str | os.PathLike, args: SophonConfig, reinforcement_loss: Any) -> None:
    """What cannot be protected, or does not go together, whatever the data are.

    Raises:
        ValueError: Several GPUs in one process, a loss of one's own beside distillation, a model that is sharded already, or
            batch norm that is synchronised over processes.
    """
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible to one process: start with `accelerate launch`, or set CUDA_VISIBLE_DEVICES."
        )
    if reinforcement_loss is not None and args.distillation:
        raise ValueError(
            "reinforcement_loss takes the place of the task's loss, and with it of distillation and mixing: leave "
            "`distillation` 0, or add the distance to your own loss."
        )
    if isinstance(model, nn.Module) and is_sharded(model):
        raise ValueError("The model is sharded already: give it whole, and let accelerate's FSDP plugin shard it.")
    modules = model.modules() if isinstance(model, nn.Module) else ()
    if args.world_size > 1 and any(isinstance(module, nn.SyncBatchNorm) for module in modules):
        raise ValueError(
            "The model has SyncBatchNorm, which would mix the statistics of the processes' different adversaries: leave it "
            "with BatchNorm."
        )


def build_domains(
    model: nn.Module,
    task: Task,
    args: SophonConfig,
    sources: dict[str, Source],
    evaluation: dict[str, Source] | None,
    processing_class: Any | None,
    input_columns: dict[str, str],
    label_columns: dict[str, str],
) -> dict[str, Domain]:
    """The four domains: "original", "restricted", and "eval_..." of each, held out where `evaluation` is None."""
    if evaluation is not None and (not isinstance(evaluation, dict) or set(evaluation) != set(sources)):
        what = f"the keys {sorted(evaluation)}" if isinstance(evaluation, dict) else f"type {type(evaluation).__name__}"
        raise ValueError(f"eval_dataset has {what}: give a dict with the keys 'original' and 'restricted'.")
    for argument, columns in (("input_columns", input_columns), ("label_columns", label_columns)):
        unknown = set(columns) - set(sources)
        if unknown:
            raise ValueError(f"{argument} has the keys {sorted(unknown)}: it takes 'original' and 'restricted'.")
    domains, needs = {}, task.inputs(model)
    for name, source in sources.items():
        dataset, label = load_domain(source), label_columns.get(name)
        if len(dataset) < FEWEST_EXAMPLES:
            raise ValueError(f"The {name} domain has {len(dataset)} examples: it takes at least {FEWEST_EXAMPLES}.")
        rows = held_rows = None
        if evaluation is not None:
            held_out = load_domain(evaluation[name], "validation")
        else:
            held_rows, rows = _hold_out(dataset, args, label_column(dataset, label) if needs.labelled else None)
            held_out, dataset = dataset.select(held_rows), dataset.select(rows)
        for key, part, numbers in ((name, dataset, rows), (f"eval_{name}", held_out, held_rows)):
            domains[key] = build_domain(
                part, needs, processing_class, name=name, input_column=input_columns.get(name), label=label,
                row_numbers=numbers,
            )  # fmt: skip
    _check_apart(domains)
    batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    if batch_norm and len(domains["restricted"]) < FEWEST_WITH_BATCH_NORM:
        raise ValueError(
            f"The restricted domain has {len(domains['restricted'])} examples to protect with: a model with batch norm "
            f"needs at least {FEWEST_WITH_BATCH_NORM}, so that a simulated adversary can be evaluated on a tenth of them."
        )
    return domains


def _check_apart(domains: dict[str, Domain]) -> None:
    if domains["original"].fingerprint == domains["restricted"].fingerprint:
        raise ValueError(
            "The original domain and the restricted domain are the same data: one is to be kept, the other not."
        )
    for name in ("original", "restricted"):
        if domains[name].fingerprint == domains[f"eval_{name}"].fingerprint:
            raise ValueError(
                f"eval_dataset[{name!r}] is the data that the model is protected with: the guard would take memory for skill. "
                "Give held-out data, or leave eval_dataset out."
            )


def _hold_out(dataset: datasets.Dataset, args: SophonConfig, label: str | None) -> tuple[np.ndarray, np.ndarray]:
    share = max(args.validation_share, 1 / math.floor(len(dataset) / 2))
    return split_indices(dataset, args.seed, share, label)


def check_labels(domains: dict[str, Domain], outputs: int, model: nn.Module) -> None:
    """Labels against features, the head, and the order of classes that the model names.

    Raises:
        ValueError: They do not fit.
    """
    for name, domain in domains.items():
        highest = int(domain.labels.max())
        if "original" in name and highest >= outputs:
            raise ValueError(
                f"The original domain has label {highest}, but the model's head has {outputs} outputs (0 to "
                f"{outputs - 1}): number the classes as the model does (`select_classes`)."
            )
        if highest >= domain.num_classes:
            raise ValueError(
                f"The {name} domain has label {highest}, but its features name {domain.num_classes} classes: repair "
                "the features or the labels."
            )
    if len(domains["restricted"].labels.unique()) < 2:
        raise ValueError(
            "The restricted domain has one class only: there is nothing to learn, and nothing to suppress."
        )
    _check_class_order(domains["original"].class_names, model)


def _check_class_order(given: list[str], model: nn.Module) -> None:
    names = getattr(getattr(model, "config", None), "id2label", None) or {}
    known = [str(names[index]) for index in sorted(names)]
    if given == known or all(name.startswith("LABEL_") for name in known) or given[0] == "class 0":
        return
    if set(given) <= set(known):
        raise ValueError(
            f"The original domain numbers its classes {given[:5]}..., the model {known[:5]}...: labels would be wrong. "
            "Number them as the model does: select_classes(dataset, list(model.config.id2label.values()))."
        )
    logger.warning(
        "The original domain names its classes %s, the model %s: make sure that label 0 means the same for both, and so on.",
        given[:5], known[:5],
    )  # fmt: skip


def try_domain(task: Task, model: nn.Module, name: str, domain: Domain) -> Tensor:
    """The model's prediction for a domain's first examples, so that what does not fit is found before any work.

    Raises:
        ValueError: The model cannot take them.
    """
    needs, rows = task.inputs(model), first_rows(task, domain, next(model.parameters()).device)
    main, shapes = rows.get(needs.main), {n: tuple(v.shape[1:]) for n, v in rows.items() if n != "labels"}
    if main is not None and main.ndim == 4:
        expected = (needs.channels or main.shape[1], *(needs.image_size or main.shape[2:]))
        if tuple(main.shape[1:]) != expected:
            raise ValueError(
                f"The {name} domain's examples are {tuple(main.shape[1:])} (channels, height, width), but the model "
                f"takes {expected}: resize or convert them, or pass raw images."
            )
    try:
        with torch.no_grad(), evaluation_mode(model):
            prediction = task.predict(model, rows)
    except Exception as error:
        raise ValueError(
            f"The model cannot take the {name} domain's examples, which have {shapes}: {error}. Give it the inputs "
            "that it was trained with, or raw columns and a `processing_class`."
        ) from error
    if not prediction.isfinite().all():
        raise ValueError(
            f"The model's prediction for the {name} domain is not finite: look at its weights and its inputs."
        )
    return prediction


def choose_loss(task: Task, name: str | None) -> Callable[[Tensor, Tensor], Tensor]:
    """L_alpha by its name; the task's first one where None.

    Raises:
        ValueError: The task has no such loss.
    """
    losses = task.suppression_losses
    name = name or next(iter(losses))
    if name not in losses:
        raise ValueError(f"suppression_loss {name!r} does not fit the task: choose one of {', '.join(losses)}.")
    return losses[name]


@dataclass(frozen=True)
class Fit:
    """How strategies and model fit.

    Attributes:
        structure: Head and blocks of the model.
        space: Phi, without what cannot be carried out.
        outputs: How many outputs the model's own head has; None without labels.
    """

    structure: ModelStructure
    space: StrategySpace
    outputs: int | None


def fit_strategies(task: Task, model: nn.Module, domains: dict[str, Domain], args: SophonConfig) -> Fit:
    """Run every domain once, find the head, check labels against it, and settle on Phi.

    Raises:
        ValueError: Data, head and strategies do not fit one another.
    """
    predictions = {name: try_domain(task, model, name, domain) for name, domain in domains.items()}
    structure = task.structure(model, first_rows(task, domains["original"], args.device))
    space, outputs, classes = args.space, None, domains["restricted"].num_classes
    if domains["original"].labels is not None:
        if args.tolerance > 1:
            raise ValueError(f"tolerance is {args.tolerance:g}, but it is a share of accuracy: 0.05 means 5 points.")
        outputs = predictions["original"].shape[1]
        check_labels(domains, outputs, model)
    elif args.strategy_space is None:
        # "The usual practice for fine-tuning generative models is to directly fine-tune the whole model" (table 2).
        space = replace(space, initializations=("direct",))
    if outputs is not None and classes > outputs and "direct" in space.initializations:
        if "new_head" not in space.initializations:
            raise ValueError(
                f"The restricted domain has {classes} classes and the model's head {outputs} outputs, so a direct "
                "strategy has no output for some labels. Add initialization 'new_head' to the strategy space, or "
                "select at most as many classes (`select_classes`)."
            )
        logger.warning(
            "The restricted domain has %d classes and the model's head %d outputs: direct strategies are left out, "
            "every simulated adversary brings a new head.", classes, outputs,
        )  # fmt: skip
        space = space.without_original_head()
    if is_sharded(model):
        _check_shares(model, space, domains["restricted"], args.world_size)
    try_strategies(task, model, structure, space, classes or None)
    return Fit(structure, space, outputs)


def try_strategies(
    task: Task, model: nn.Module, structure: ModelStructure, space: StrategySpace, num_classes: int | None
) -> None:
    """Set up each kind of strategy once.

    Raises:
        ValueError: One of them cannot be carried out on this model.
    """
    kinds = product(space.initializations, space.reinitialized_blocks, space.transfers)
    for start, blocks, transfer in dict.fromkeys(kinds):
        blocks = blocks if start == "new_head" else 0
        strategy = FineTuningStrategy(initialization=start, reinitialized_blocks=blocks, transfer=transfer)
        with preserved(model, structure.head):
            FineTuning(model, task, strategy, [], 1, structure=structure, num_classes=num_classes)


def refuse_launcher_settings(accelerator: Any, args: SophonConfig) -> None:
    """What `accelerate launch` or its config file asks for does not show in the arguments.

    Raises:
        ValueError: fp16, or a sharding other than what FSDP2 can do here.
    """
    if accelerator.mixed_precision == "fp16":
        raise ValueError(
            "accelerate is set to fp16, whose loss scaler the suppression gradient does not pass: use bf16 or no."
        )
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"accelerate is set to {accelerator.distributed_type.value}, which is not supported: use plain processes, or "
            "FSDP2 for a model that does not fit on one GPU."
        )
    if accelerator.distributed_type == DistributedType.FSDP:
        _refuse_sharding(accelerator, args)
    elif args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ValueError(
            f"FSDP is asked for, but accelerate runs {accelerator.distributed_type.value} on {accelerator.device.type}, where "
            "it does not shard: start one process for each GPU, or leave FSDP out."
        )


def _refuse_sharding(accelerator: Any, args: SophonConfig) -> None:
    plugin = accelerator.state.fsdp_plugin
    refused = (
        (plugin.fsdp_version != 2, "FSDP1 flattens the parameters: set fsdp_version to 2"),
        (
            plugin.state_dict_type.name != "FULL_STATE_DICT",
            "a protected model is saved whole: set fsdp_state_dict_type to FULL_STATE_DICT",
        ),
        (
            isinstance(plugin.cpu_offload, CPUOffloadPolicy),
            "offloaded parameters are not where the batches are: leave fsdp_offload_params off",
        ),
        (
            plugin.activation_checkpointing,
            "FSDP's activation checkpointing would wrap what is sharded already: use gradient_checkpointing",
        ),
        (
            getattr(accelerator.parallelism_config, "total_size", 1) > 1,
            "it does not go with another parallelism: leave parallelism_config out",
        ),
        (args.second_order, "the exact gradient does not reach through sharded parameters: leave second_order off"),
    )
    for found, reason in refused:
        if found:
            raise ValueError(f"The model cannot be sharded like this; {reason}.")


def _check_shares(model: nn.Module, space: StrategySpace, restricted: Domain, processes: int) -> None:
    """Whether the processes of a sharded model can share every batch of a simulated adversary."""
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        raise ValueError(
            "A sharded model with batch norm would normalise each process's part of a batch by itself: it is not supported. "
            "Use plain processes."
        )
    smallest = min(*space.batch_sizes, held_out_examples(len(restricted)))
    if smallest < processes:
        raise ValueError(
            f"The smallest batch of a simulated adversary has {smallest} examples, but the {processes} processes of a sharded "
            "model share each batch: give more restricted data or larger batch_sizes in the strategy space, or use fewer "
            "processes."
        )


def make_probes(
    model: nn.Module, task: Task, structure: ModelStructure, restricted: Domain, args: SophonConfig
) -> Probes | None:
    """The probes that the arguments ask for; None where they ask for none.

    Raises:
        ValueError: The task has no labels, T_i too few examples, or the model too few blocks.
    """
    if not args.probe_depths:
        return None
    if restricted.labels is None:
        raise ValueError("A probe predicts labels, and this task has none: leave `probe_depths` 0.")
    if held_out_examples(len(restricted)) < 2:
        raise ValueError(
            f"The restricted domain has {len(restricted)} examples to protect with, a tenth of which is T_i: a probe predicts "
            "each example of T_i from the others, so T_i needs 2. Give at least 15, or leave `probe_depths` 0."
        )
    loss = choose_loss(task, args.suppression_loss)
    return Probes(model, structure, args.probe_depths, restricted.num_classes, loss)


def make_distillation(
    unprotected: nn.Module | None, task: Task, original: Domain, args: SophonConfig
) -> Distillation | None:
    """The distillation that the arguments ask for, from a copy of the model; None where they ask for none.

    Mixing is left out, and the arguments say so from then on, where examples cannot be mixed.
    """
    if not args.distillation:
        return None
    if args.mixup:
        main = task.inputs(unprotected).main
        values = first_rows(task, original, args.device).get(main)
        if original.labels is None or not values.is_floating_point():
            what = "the task has no labels" if original.labels is None else f"{main!r} holds {values.dtype}"
            logger.warning("mixing is for classifiers of continuous inputs, such as pixels, but %s: left out.", what)
            args.mixup = False
    return Distillation(unprotected, task, args.distillation, args.mixup)

"""Refuse, before any work, what would fail later or end in something wrong. A check changes nothing."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any, NoReturn

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy

from sophon_hf.data.domain import Domain
from sophon_hf.finetuning.initialization import preserved
from sophon_hf.finetuning.loop import FineTuning
from sophon_hf.finetuning.strategy import FineTuningStrategy, StrategySpace
from sophon_hf.hub.saving import check_loads_back
from sophon_hf.models.backbone import library_model
from sophon_hf.models.loading import refuse_weights
from sophon_hf.models.sharding import is_sharded
from sophon_hf.models.structure import ModelStructure
from sophon_hf.protection.config import SophonConfig
from sophon_hf.protection.simulation import held_out_examples
from sophon_hf.tasks.base import Task
from sophon_hf.tasks.evaluation import first_rows, try_domain
from sophon_hf.tasks.metrics import refuse_two_metrics

logger = logging.getLogger(__name__)

_FEWEST_WITH_BATCH_NORM = 20
# Of domains that are not kept in memory.
_COMPARED_EXAMPLES = 2000


def refuse_arguments(args: SophonConfig, reinforcement_loss: Any, task: Task | None, metric: Any) -> None:
    """Refuse what does not go together with any model.

    Raises:
        TypeError: No SophonConfig.
        ValueError: Several GPUs in one process, a loss of one's own beside distillation, or a metric beside a task.
    """
    if not isinstance(args, SophonConfig):
        raise TypeError(
            f"args is a {type(args).__name__}: give a SophonConfig, which has all fields of TrainingArguments."
        )
    refuse_two_metrics(task, metric)
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible to one process: start with `accelerate launch`, or set "
            "CUDA_VISIBLE_DEVICES."
        )
    if reinforcement_loss is not None and args.distillation:
        raise ValueError(
            "reinforcement_loss takes the place of the task's loss, and with it of distillation and mixup: leave "
            "`distillation` 0, or add the distance to your own loss."
        )


def refuse_model(model: nn.Module, args: SophonConfig) -> None:
    """Refuse a model that cannot be protected on any data.

    Raises:
        ValueError: It is sharded already, frozen, in half precision or not finite, or mixes batch norm over processes.
    """
    refuse_weights(model, "given")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("Every parameter of the model is frozen: nothing can be protected. Set requires_grad.")
    if is_sharded(model):
        raise ValueError("The model is sharded already: give it whole, and let accelerate's FSDP plugin shard it.")
    if args.world_size > 1 and any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
        raise ValueError(
            "The model has SyncBatchNorm, which would mix the statistics of the processes' different adversaries: "
            "leave it with BatchNorm."
        )
    if args.gradient_checkpointing and not getattr(library_model(model), "supports_gradient_checkpointing", False):
        spelled = getattr(model, "enable_gradient_checkpointing", None)
        how = "call its `enable_gradient_checkpointing()`, and leave" if spelled else "leave"
        raise ValueError(
            f"The Trainer cannot switch gradient checkpointing on in a {type(model).__name__}: {how} "
            "`gradient_checkpointing` off."
        )
    if args.process_index == 0:  # The libraries save on the first process alone.
        check_loads_back(model)


def refuse_method(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
    """Stand for methods of the Trainer that do not know of two domains.

    Raises:
        NotImplementedError: Always.
    """
    raise NotImplementedError(
        "predict, get_eval_dataloader, get_test_dataloader and hyperparameter_search of the Trainer know of one data "
        "set and one loss: `evaluate(eval_dataset={...})` measures any data, `task.predict(model, batch)` predicts, "
        "and a search makes a trainer for each trial."
    )


def check_domains(domains: dict[str, Domain], model: nn.Module) -> None:
    """Refuse domains that are the same data or hold one example only, and too few restricted examples for batch norm.

    Domains that are not kept in memory are compared by a part of their examples.

    Raises:
        ValueError: They are.
    """
    compared = [domains[name] for name in ("restricted", "original", "eval_original")]
    raw = any(domain.hashes is None for domain in compared)
    if raw and max(map(len, compared)) > _COMPARED_EXAMPLES:
        logger.warning(
            "The domains are not kept in memory, so only %d examples of each are looked at for what both hold: see to "
            "it that no example is in both.",
            _COMPARED_EXAMPLES,
        )
    restricted, *originals = (domain.example_hashes(raw, _COMPARED_EXAMPLES) for domain in compared)
    kept = set().union(*originals)
    shared = sum(digest in kept for digest in restricted)
    same = domains["original"].fingerprint == domains["restricted"].fingerprint
    if same or (shared and shared == len(restricted)):
        raise ValueError(
            "The original domain and the restricted domain are the same data: one is to be kept, the other not."
        )
    if shared:
        logger.warning(
            "%d of the %d restricted examples are in the original domain too, which is to be kept: drop them.",
            shared,
            len(restricted),
        )
    for name in ("original", "restricted"):
        domains[name].refuse_constant()
        if domains[name].fingerprint == domains[f"eval_{name}"].fingerprint:
            raise ValueError(
                f"eval_dataset[{name!r}] is the data that the model is protected with: the guard would take memory for "
                "skill. Give held-out data, or leave eval_dataset out."
            )
    batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    if batch_norm and len(domains["restricted"]) < _FEWEST_WITH_BATCH_NORM:
        raise ValueError(
            f"The restricted domain has {len(domains['restricted'])} examples to protect with: a model with batch norm "
            f"needs at least {_FEWEST_WITH_BATCH_NORM}, so that a simulated adversary can be evaluated on a tenth of "
            "them."
        )


def _check_labels(domains: dict[str, Domain], outputs: int | None, task: Task) -> None:
    """Labels against the head, and whether there is a task to learn.

    Raises:
        ValueError: They do not fit.
    """
    for name, domain in domains.items():
        labels = domain.labels
        assert labels is not None, "a classifier's domains have labels"
        if "original" in name and outputs is not None and not task.fits(labels, outputs):
            found = f"label {int(labels.max())}" if labels.ndim == 1 else f"{labels.shape[1]} labels"
            raise ValueError(
                f"The original domain has {found}, but the model's head has {outputs} outputs (0 to {outputs - 1}): "
                "number the classes as the model does (`select_classes`)."
            )
        if name == "restricted" and len(labels.unique(dim=0)) < 2:
            raise ValueError(
                "The restricted domain has one class only: there is nothing to learn, and nothing to suppress."
            )


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


def fit_strategies(
    task: Task, model: nn.Module, domains: dict[str, Domain], args: SophonConfig
) -> tuple[ModelStructure, StrategySpace, int | None]:
    """Run every domain once, find the head, check labels against it, and settle on Phi.

    Raises:
        ValueError: Data, head and strategies do not fit one another.
    """
    for name, domain in domains.items():
        try_domain(task, model, name, domain)
    structure = task.structure(model, first_rows(task, domains["original"], args.device))
    if args.probe_depths:
        _check_probes(domains["restricted"])
    space, outputs, classes = args.space, None, domains["restricted"].num_classes
    if domains["original"].labels is not None:
        outputs = structure.outputs
        _check_labels(domains, outputs, task)
    elif args.strategy_space is None:
        # "The usual practice for fine-tuning generative models is to directly fine-tune the whole model" (table 2).
        space = replace(space, initializations=("direct",))
    fits = task.fits(domains["restricted"].labels, outputs) and classes <= (outputs or classes)
    if not fits and "direct" in space.initializations:
        if "new_head" not in space.initializations:
            raise ValueError(
                f"The restricted domain has {classes} classes and the model's head {outputs or 'no'} outputs, so a "
                "direct strategy has no output for some labels. Add initialization 'new_head' to the strategy space, "
                "or select at most as many classes (`select_classes`)."
            )
        logger.warning(
            "The restricted domain has %d classes and the model's head %s outputs: direct strategies are left out, "
            "every simulated adversary brings a new head.",
            classes,
            "no" if outputs is None else outputs,
        )
        space = space.without_original_head()
    if is_sharded(model):
        _check_shares(model, space, domains["restricted"], args.world_size)
    _try_strategies(task, model, structure, space, domains, args)
    return structure, space, outputs


def _try_strategies(
    task: Task,
    model: nn.Module,
    structure: ModelStructure,
    space: StrategySpace,
    domains: dict[str, Domain],
    args: SophonConfig,
) -> None:
    """Take one step in training mode by each kind of strategy, with its smallest batch, and one of the reinforcement.

    Raises:
        ValueError: One of them cannot be carried out on this model, or takes over nothing that can be trained.
    """
    restricted, inside = domains["restricted"], tuple(f"{name}." for name in structure.heads)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if "new_head" in space.initializations and all(name.startswith(inside) for name in trained):
        raise ValueError(
            f"Only the head {structure.head!r} of the model is trainable, and an adversary that brings a new head "
            "takes over nothing of it: set requires_grad of the layers before it, or leave 'new_head' out of the "
            "strategy space."
        )
    examples = max(1, len(restricted) - held_out_examples(len(restricted)))
    batch = first_rows(task, restricted, args.device, min(*space.batch_sizes, examples))
    kinds = product(space.initializations, space.reinitialized_blocks, space.transfers)
    for start, blocks, transfer in dict.fromkeys(kinds):
        blocks = blocks if start == "new_head" else 0
        strategy = FineTuningStrategy(initialization=start, reinitialized_blocks=blocks, transfer=transfer)
        classes = restricted.num_classes or None
        with preserved(model, structure.heads):
            steps = FineTuning(model, task, strategy, [batch], 1, structure=structure, num_classes=classes)
            _try(partial(list, steps), f"a step of '{strategy.name}' in training mode", batch)
    batch = first_rows(task, domains["original"], args.device, args.per_device_train_batch_size)
    with preserved(model, structure.heads), torch.no_grad():
        model.train()
        _try(partial(task.predict, model, batch), "a reinforcement step in training mode", batch)


def _try(step: Callable[[], Any], what: str, batch: dict[str, Tensor]) -> None:
    try:
        step()
    except Exception as error:  # A model's own code may raise anything.
        size = len(next(iter(batch.values())))
        raise ValueError(f"The model fails at {what}, with a batch of {size} examples: {error}") from error


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
            f"accelerate is set to {accelerator.distributed_type.value}, which is not supported: use plain processes, "
            "or FSDP2 for a model that does not fit on one GPU."
        )
    if accelerator.distributed_type == DistributedType.FSDP:
        _refuse_sharding(accelerator, args)
    elif args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ValueError(
            f"FSDP is asked for, but accelerate runs {accelerator.distributed_type.value} on "
            f"{accelerator.device.type}, where it does not shard: start one process for each GPU, or leave FSDP out."
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
            "A sharded model with batch norm would normalise each process's part of a batch by itself: it is not "
            "supported. Use plain processes."
        )
    smallest = min(*space.batch_sizes, held_out_examples(len(restricted)))
    if smallest < processes:
        raise ValueError(
            f"The smallest batch of a simulated adversary has {smallest} examples, but the {processes} processes of a "
            "sharded model share each batch: give more restricted data or larger batch_sizes in the strategy space, or "
            "use fewer processes."
        )


def _check_probes(restricted: Domain) -> None:
    """Refuse probes on a domain that they cannot be fitted on.

    Raises:
        ValueError: The task has no labels, or T_i too few examples.
    """
    if restricted.labels is None:
        raise ValueError("A probe predicts labels, and this task has none: leave `probe_depths` 0.")
    if held_out_examples(len(restricted)) < 2:
        raise ValueError(
            f"The restricted domain has {len(restricted)} examples to protect with, a tenth of which is T_i: a probe "
            "predicts each example of T_i from the others, so T_i needs 2. Give at least 15, or leave `probe_depths` 0."
        )


def can_mix(task: Task, model: nn.Module, original: Domain, device: torch.device) -> bool:
    """Return whether examples can be mixed; where not, a warning says that mixup is left out."""
    main = task.inputs(model).main
    values = first_rows(task, original, device).get(main)
    if original.labels is not None and values is not None and values.is_floating_point():
        return True
    what = "the task has no labels" if original.labels is None else f"{main!r} holds {getattr(values, 'dtype', None)}"
    logger.warning("mixup is for classifiers of continuous inputs, such as pixels, but %s: left out.", what)
    return False

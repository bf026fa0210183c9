"""What the trainer measures: both domains, and while protecting what fixed simulated adversaries reach."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from accelerate.utils import broadcast, broadcast_object_list

from sophon_hf.data.batches import Stream, derive_seed
from sophon_hf.data.domain import Domain, Source, build_domain, load_domain
from sophon_hf.finetuning.strategy import FineTuningStrategy, StrategySpace
from sophon_hf.protection.environment import sample_environment
from sophon_hf.protection.suppression import MEASURED_EXAMPLES, Suppression
from sophon_hf.tasks.base import Task
from sophon_hf.tasks.evaluation import evaluate_model

if TYPE_CHECKING:
    from sophon_hf.protection.trainer import SophonTrainer

PROBE_RATE = 1e-3
PROBE_BATCH = 50


def measure_domains(trainer: SophonTrainer, sources: dict[str, Source | Domain], prefix: str) -> dict[str, float]:
    """Metric and loss of the trainer's model on each domain, as `{prefix}_{name}_{metric}` and `{prefix}_{name}_loss`."""
    if not isinstance(sources, dict):
        raise ValueError(
            f"eval_dataset is a {type(sources).__name__}: give a dict of name and data set, such as "
            "{'original': ..., 'restricted': ...}."
        )
    args, task = trainer.args, trainer.task
    # DDP sends batch-norm statistics along only before a forward pass, and all processes must measure one model.
    for buffer in trainer.model.buffers() if args.world_size > 1 else ():
        broadcast(buffer)
    metrics: dict[str, float] = {}
    for name, source in sources.items():
        domain = source if isinstance(source, Domain) else _build(trainer, source, name)
        result = evaluate_model(
            task, trainer.model, domain, args.per_device_eval_batch_size, rank=args.process_index,
            world_size=args.world_size, autocast=trainer.accelerator.autocast,
            with_loss=domain.labels is None or int(domain.labels.max()) < trainer.outputs,
        )  # fmt: skip
        metrics[f"{prefix}_{name}_{task.metric}"] = result.metric
        metrics[f"{prefix}_{name}_loss"] = result.loss
    return metrics


def _build(trainer: SophonTrainer, source: Source, name: str) -> Domain:
    known = trainer.domains[name if name in trainer.domains else "restricted"]
    dataset, column = load_domain(source, "test"), trainer.input_columns.get(name)
    return build_domain(
        dataset, trainer.task.inputs(trainer.model), trainer.processing_class, name=name,
        label=known.preprocessor.label_column, input_column=column if column in dataset.column_names else None,
    )  # fmt: skip


def simulated_metric(
    suppression: Suppression,
    space: StrategySpace,
    restricted: Domain,
    held_out: Domain,
    steps: int,
    seed: int,
    batch_size: int,
) -> float:
    """The task's metric on held-out restricted data, over one adversary for each initialization of Phi.

    Args:
        suppression: Runs the adversaries; the model is put back.
        space: Phi.
        restricted: What the adversaries train on.
        held_out: What they are measured on.
        steps: Updates of each.
        seed: The same adversaries for the same seed.
        batch_size: Examples that are measured at a time.
    """
    task, scores = suppression.task, {}
    for number, start in enumerate(dict.fromkeys(space.initializations)):
        strategy = FineTuningStrategy(initialization=start, learning_rate=PROBE_RATE, batch_size=PROBE_BATCH)
        own_seed = derive_seed(seed, "probe", number)
        environment = sample_environment(restricted, task, strategy, own_seed)
        environment = replace(environment, evaluation=Stream(held_out, task, own_seed))
        for name, values in suppression.measure(environment, steps, batch_size).items():
            scores.setdefault(name, []).extend(values.tolist())
    # One process decides for all: a kernel that is not deterministic must not make them choose differently.
    return broadcast_object_list([task.compute_metric(scores)])[0]


def simulated_error(task: Task, held_out: Domain, space: StrategySpace) -> float:
    """The standard error of `simulated_metric` for an accuracy, at most, as if no two adversaries shared an example; for an MSE 0.

    An MSE's spread is not known.
    """
    examples = min(len(held_out), MEASURED_EXAMPLES) * len(set(space.initializations))
    return 0.5 / math.sqrt(examples) if task.metric == "accuracy" else 0.0

"""Make rows of the leaderboard: models whose score is known, and defences of the field, through the one call.

    python benchmarks/leaderboard.py --pair letters --only unprotected ntl

Each row is a JSON file in benchmarks/results/leaderboard/; `python benchmarks/write_results.py` makes
benchmarks/leaderboard.md of them. Interrupted, it goes on where it was.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from baselines import BASELINES
from condition_number import ConditionNumber
from torch import nn

from sophon_hf import SophonConfig, SophonTrainer, benchmark
from sophon_hf.benchmarking import BUDGETS, PAIRS
from sophon_hf.benchmarking.pairs import Pair, load_pair
from sophon_hf.data.domain import build_domain
from sophon_hf.finetuning.preparations import reestimate_batch_norm
from sophon_hf.protection.ntl import train_ntl
from sophon_hf.protection.presets import PRESETS
from sophon_hf.tasks.base import infer_task
from sophon_hf.utils import write_atomically

RESULTS = Path(__file__).parent / "results" / "leaderboard"


@dataclass
class Defence:
    """A function as a defence."""

    name: str
    protect: Callable[[nn.Module, datasets.DatasetDict, datasets.DatasetDict], nn.Module]


def ntl(model: nn.Module, restricted: datasets.DatasetDict, original: datasets.DatasetDict) -> nn.Module:
    """Non-transferable learning (baseline B3)."""
    task = infer_task(model)
    needs = task.inputs(model)
    domains = [build_domain(d["train"], needs, name=n) for d, n in ((original, "original"), (restricted, "restricted"))]
    train_ntl(model, task, *domains)
    # Its batch-norm statistics are of both domains, which alone would cost a third of the original accuracy.
    reestimate_batch_norm(model, task, domains[0])
    return model


def re_initialised(pair: Pair, model: nn.Module, *_: datasets.DatasetDict) -> nn.Module:
    """A model that was never trained."""
    torch.manual_seed(1)
    return pair.model(model.config.num_labels)


def by_settings(
    fields: dict[str, Any], model: nn.Module, restricted: datasets.DatasetDict, original: datasets.DatasetDict
) -> nn.Module:
    """What the trainer makes of a model by settings of `SophonConfig`."""
    with tempfile.TemporaryDirectory() as folder:
        config = SophonConfig(
            folder,
            **{"save_strategy": "no", "report_to": "none", "use_cpu": not torch.cuda.is_available(), **fields},
        )
        validation = {"original": original["validation"], "restricted": restricted["validation"]}
        # Of the field's, the one without suppression loops.
        loss = None if config.l_FTS else ConditionNumber(model, restricted["train"])
        halves = restricted["train"], original["train"]
        trainer = SophonTrainer(model, *halves, config, eval_dataset=validation, reinforcement_loss=loss)
        trainer.train()
        return trainer.model


def defences(pair: Pair) -> dict[str, Any]:
    """All rows by name, in the order in which they are made."""
    # The budget of Algorithm 1 on the pair, as far as a method has no own.
    given = dict(pair.presets["paper"])
    space = {**given.get("strategy_space", {}), "initializations": ["direct"]}
    rows: list[Any] = [
        Defence("unprotected", lambda model, *_: model),
        Defence("re-initialised", partial(re_initialised, pair)),
        Defence("ntl", ntl),
        Defence("algorithm-1-direct-only", partial(by_settings, {**given, "strategy_space": space})),
        *(
            Defence(name, partial(by_settings, {"simulated_examples": pair.examples[0], **fields}))
            for name, fields in BASELINES.items()
        ),
    ]
    return {preset: preset for preset in PRESETS} | {row.name: row for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", default="letters", choices=PAIRS)
    parser.add_argument("--budget", default="small", choices=BUDGETS)
    parser.add_argument("--only", nargs="+", help="these rows")
    parser.add_argument("--work", default="runs/leaderboard")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    pair = load_pair(options.pair)
    rows = defences(pair)
    if unknown := set(options.only or ()) - set(rows):
        parser.error(f"--only has {sorted(unknown)}; there are {', '.join(rows)}.")
    for name in options.only or rows:
        found = benchmark(rows[name], pair, options.budget, options.work)
        write_atomically(options.results / found.path.name, found.path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()

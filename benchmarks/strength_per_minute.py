"""Strength against time: recovered transfer and original accuracy after fixed budgets of processor seconds.

    python benchmarks/strength_per_minute.py --pair letters --budgets 20 60

Every setting gets as many iterations as fit into the budget at the pace of a short run of it, evaluations included. All
are attacked by the pair's own attacks. Settings and budgets take turns in one process, so their ratios count, not the
seconds. Interrupted, it goes on where it was. Prints a table and, as its last line, one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sophon_hf import SophonTrainer
from sophon_hf.benchmarking import PAIRS
from sophon_hf.benchmarking.benchmark import attack, protect_by_preset
from sophon_hf.benchmarking.pairs import Pair, load_pair
from sophon_hf.models.loading import load_model
from sophon_hf.utils import write_atomically

# The preset, what it is given beside the pair's own fields.
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "Algorithm 1": ("paper", {}),
    "representation": ("representation", {}),
    "2 reinforcement loops": ("representation", {"l_NTR": 2}),
    "half the evaluations": ("representation", {"evaluations": 0.5}),
}


def protect(
    setting: str, pair: Pair, original: nn.Module, folder: Path, steps: int, seed: int
) -> tuple[SophonTrainer, float]:
    """Return the trainer of a finished protection, and the processor seconds that it took."""
    preset, fields = SETTINGS[setting]
    fields = dict(fields)
    evaluations = 15 * fields.pop("evaluations", 1)
    fields |= {"max_steps": steps, "eval_steps": max(1, round(steps / evaluations)), "seed": seed, "disable_tqdm": True}
    start = time.process_time()
    trainer = protect_by_preset(preset, pair, copy.deepcopy(original), folder, **fields)
    return trainer, time.process_time() - start


def pace(setting: str, pair: Pair, original: nn.Module, folder: Path) -> tuple[float, float]:
    """Return the seconds that every protection takes, and those that an iteration adds."""
    short, long = (protect(setting, pair, original, folder / str(steps), steps, seed=0)[1] for steps in (15, 45))
    each = (long - short) / 30
    return max(0.0, short - 15 * each), each


def measure(setting: str, budget: float, pair: Pair, original: nn.Module, options: argparse.Namespace) -> dict:
    """Return the row of a setting and budget, from its file where it is there already.

    Its pace is that of the setting's other budgets, where one is there.
    """
    slug = f"{pair.name}-{setting.replace(' ', '-')}-{budget:g}-{options.seed}"
    file = options.work / f"{slug}.json"
    if file.exists():
        return json.loads(file.read_text())
    folder = options.work / slug
    shutil.rmtree(folder, ignore_errors=True)  # What an interrupted run left.
    known = options.work / f"{pair.name}-{setting.replace(' ', '-')}-pace.json"
    if not known.exists():
        with tempfile.TemporaryDirectory() as short:
            write_atomically(known, json.dumps(pace(setting, pair, original, Path(short))))
    fixed, each = json.loads(known.read_text())
    steps = max(15, int((budget - fixed) / each))
    trainer, seconds = protect(setting, pair, original, folder, steps, options.seed)
    state = trainer.guard.state
    results = attack(
        pair,
        pair.attacks,
        options.work / "attacks",
        options.seeds,
        protected=load_model(folder),
        original=original,
    )
    transfer = results.recovered_transfer()
    row = {
        "setting": setting,
        "budget": budget,
        "iterations": steps,
        "seconds": round(seconds, 1),
        "protected": state.best_step is not None,
        "recovered_transfer": vars(transfer),
        "score": str(transfer),
        "original": {name: results.original_metric[name] for name in ("original", "protected")},
    }
    write_atomically(file, json.dumps(row))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", default="letters", choices=PAIRS)
    parser.add_argument("--budgets", type=float, nargs="+", default=[20, 60], help="processor seconds")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--seed", type=int, default=0, help="of the protections")
    parser.add_argument("--seeds", type=int, nargs="+", help="of the attacks; the pair's by default")
    parser.add_argument("--work", type=Path, default=Path("runs/strength_per_minute"))
    options = parser.parse_args()
    # So that processor seconds are those of one core.
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    pair = load_pair(options.pair)
    pretrained = options.work / f"{pair.name}-pretrained"
    if not (pretrained / "model.safetensors").exists():
        pair.pretrained().save_pretrained(pretrained)
    original = load_model(pretrained)
    rows = []
    for budget in options.budgets:
        for setting in options.settings:
            # The trainer's own lines would stand between those of the table.
            with contextlib.redirect_stdout(io.StringIO()):
                row = measure(setting, budget, pair, original, options)
            rows.append(row)
            before, after = row["original"].values()
            print(
                f"{setting:28} {budget:6g} s {row['iterations']:5} iterations {row['seconds']:7.1f} s  "
                f"original {before:.3f} -> {after:.3f}  recovered transfer {row['score']}"
                f"{'' if row['protected'] else '  (given back unprotected)'}",
                flush=True,
            )
    print(json.dumps({"pair": pair.name, "seed": options.seed, "rows": rows}))


if __name__ == "__main__":
    main()

"""The demo: pre-train on printed letters, protect against handwritten digits, attack, report. Minutes on two cores."""

from __future__ import annotations

import functools
import multiprocessing
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from sophon_hf.attacks.report import write_report
from sophon_hf.attacks.results import AttackResults
from sophon_hf.benchmarking.benchmark import attack, protect_by_preset
from sophon_hf.benchmarking.pairs import Pair, load_pair
from sophon_hf.models.loading import load_model

_MARK = ".sophon-demo"
# The preset, as which model of the report, and in which folder.
_PROTECTIONS = {"representation": ("representation", "protected"), "paper": ("Algorithm 1", "algorithm-1")}


def run(output_dir: str | Path = "demo-output", seed: int = 0, scale: float = 1.0) -> dict[str, Any]:
    """Run the demo.

    Args:
        output_dir: Gets (an earlier demo there makes room) the models, the attacks' results, and the report.
        seed: Of both protections.
        scale: What the iterations and the adversary's seeds are multiplied by: less than 1 for a glance.

    Returns:
        The report's figures, and "algorithm_1": the recovered transfer of Algorithm 1.
    """
    output_dir = Path(output_dir)
    _make_room(output_dir)
    # Models as small as these run faster on one thread than on two that wait for each other.
    torch.set_num_threads(1)
    workers = min(2, os.cpu_count() or 1)
    # What one process does not need the other's result for runs in two; finished attacks are files that both read.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        # The first draws while this process does, the second while it pre-trains: no more than two at once for long.
        pool.submit(_draw)
        pair = _pair()
        if workers > 1:
            pool.submit(_draw)
        pair.pretrained().save_pretrained(output_dir / "original")
        seeds = pair.seeds[: max(1, round(len(pair.seeds) * scale))]
        print(f"Protecting the model twice, by the preset `representation` and by Algorithm 1 (seed {seed}) ...")
        protections = {preset: pool.submit(_protect, output_dir, preset, seed, scale) for preset in _PROTECTIONS}
        protections["paper"].result()
        # Algorithm 1 is done long before the preset. A third of what attacks all models but the preset's fills the gap.
        early = pool.submit(_attack, output_dir, seeds[: -(-len(seeds) // 3)], with_preset=False)
        failures = dict(protection.result() for protection in protections.values())
        early.result()
        print(f"Attacking with {pair.examples[0]} digits: {len(pair.attacks)} attacks, {len(seeds)} seeds ...")
        parts = [seeds[part::workers] for part in range(min(workers, len(seeds)))]
        list(pool.map(_attack, [output_dir] * len(parts), parts))
    results = _attack(output_dir, seeds)
    summary = write_report(results, output_dir / "report")
    for name, failure in failures.items():
        if failure is not None:
            print(f"`{name}` has NOT protected the model: {failure}")
    print(_table(results, pair), f"\nThe whole report: {output_dir}/report/index.html", sep="\n")
    algorithm_1 = results.recovered_transfer(model="Algorithm 1")
    return summary | {"algorithm_1": algorithm_1.value, "algorithm_1_interval": algorithm_1.interval}


@functools.cache  # A process draws the letters once.
def _pair() -> Pair:
    return load_pair("letters")


def _draw() -> None:
    _pair()  # Not returned: it would be sent to the process that asks.


def _protect(output_dir: Path, preset: str, seed: int, scale: float) -> tuple[str, str | None]:
    """Protect the model in a process of its own; return why it failed, or None."""
    torch.set_num_threads(1)
    pair, (name, folder) = _pair(), _PROTECTIONS[preset]
    steps = max(1, round(pair.presets[preset]["max_steps"] * scale))
    trainer = protect_by_preset(
        preset,
        pair,
        load_model(output_dir / "original"),
        output_dir / folder,
        max_steps=steps,
        seed=seed,
        eval_steps=max(1, steps // 15),
        logging_steps=steps,
        use_cpu=True,
        disable_tqdm=preset == "paper",  # One bar is enough for two processes.
    )
    return name, trainer.guard.failure if trainer.guard.state.best_step is None else None


def _attack(output_dir: Path, seeds: Sequence[int], with_preset: bool = True) -> AttackResults:
    """Attack all models, or all but the preset's, with these seeds; what is finished already is read."""
    torch.set_num_threads(1)
    pair = _pair()
    original, algorithm_1 = load_model(output_dir / "original"), load_model(output_dir / "algorithm-1")
    protected = load_model(output_dir / "protected") if with_preset else algorithm_1
    baselines = {"Algorithm 1": algorithm_1} if with_preset else {}
    folder = output_dir / "attacks"
    return attack(pair, pair.attacks, folder, seeds, protected=protected, original=original, baselines=baselines)


def _make_room(output_dir: Path) -> None:
    """Remove an earlier demo, which its mark tells from work under the same names, and nothing else."""
    found = {path.name for path in output_dir.iterdir()} if output_dir.exists() else set()
    made = {"original", "protected", "algorithm-1", "attacks", "report", _MARK}
    others = sorted(found - made if _MARK in found else found)
    if others:
        raise ValueError(f"{output_dir} holds {others[0]!r}, which no demo has made: choose an empty or a new folder.")
    for name in found - {_MARK}:
        shutil.rmtree(output_dir / name)
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / _MARK).touch()


def _table(results: AttackResults, pair: Pair) -> str:
    columns = {"original": "unprotected", "Algorithm 1": "Algorithm 1", "protected": "representation"}
    intact = results.original_metric
    lines = [
        "",
        "Accuracy in the original domain (printed letters): "
        + ", ".join(f"{title} {intact[model]:.1%}" for model, title in columns.items())
        + ".",
        f"Accuracy in the restricted domain (handwritten digits) after fine-tuning on {pair.examples[0]} digits for "
        f"{pair.epochs} epochs,",
        f"mean of {len(results.facts['seeds'])} seeds:",
        "",
        f"{'attack':34}" + "".join(f"{title:>16}" for title in columns.values()),
    ]
    final = {
        model: {
            strategy: sum(curve.test[-1] for curve in curves) / len(curves)
            for strategy, curves in results.curves(model).items()
        }
        for model in columns
    }
    for strategy in pair.attacks:
        values = [accuracies.get(strategy) for accuracies in final.values()]
        cells = "".join(f"{'failed':>16}" if value is None else f"{value:16.1%}" for value in values)
        name = strategy.name.split(", batch")[0].replace(", all", "")
        lines.append(f"{name:34}{cells}")
    scratch, score = results.best("scratch"), results.recovered_transfer()
    assert scratch is not None
    lines += [
        f"{'best training from scratch':34}" + "".join(f"{scratch.mean:16.1%}" for _ in columns),
        "",
        "Recovered transfer, worst case (100 %: the protection does nothing; 0 %: pre-training is worth nothing to the",
        f"adversary): Algorithm 1 {results.recovered_transfer(model='Algorithm 1')}, representation {score}.",
        "",
        "Algorithm 1 suppresses direct fine-tuning, and a new head undoes much of it. The preset `representation`",
        "suppresses what new heads could do with the features. Both raise the cost of misuse; neither prevents it.",
        "These are a few attacks of each kind. Who holds the original data recovers far more (docs/results.md).",
    ]
    return "\n".join(lines)

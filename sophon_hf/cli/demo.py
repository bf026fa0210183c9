"""The demo: pre-train on printed letters, protect against handwritten digits, attack, report. Minutes on two cores."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import torch

from sophon_hf.attacks.report import write_report
from sophon_hf.attacks.results import AttackResults
from sophon_hf.attacks.suite import AttackSuite
from sophon_hf.data.domain import build_domain
from sophon_hf.data.labels import split_domain
from sophon_hf.data.toy import handwritten_digits, printed_letters
from sophon_hf.finetuning.loop import pretrain
from sophon_hf.finetuning.strategy import FineTuningStrategy
from sophon_hf.models.loading import load_model
from sophon_hf.models.toy import small_classifier
from sophon_hf.protection.config import SophonConfig
from sophon_hf.protection.presets import PRESETS
from sophon_hf.protection.trainer import SophonTrainer
from sophon_hf.tasks.base import infer_task

MARK = ".sophon-demo"
ADVERSARY_EXAMPLES, ADVERSARY_EPOCHS, ADVERSARY_SEEDS = 20, 20, 10
SWEEP = [
    FineTuningStrategy(start, blocks, learning_rate=rate, batch_size=10)
    for start, blocks in (("direct", 0), ("new_head", 0), ("new_head", 1))
    for rate in (3e-4, 1e-3, 3e-3)
]

# Both are sized for a model of 0.02 M parameters and a minute of one core. The preset is as it stands, but for fewer
# iterations, and simulated adversaries with as few examples as the real ones have.
_PROTECTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "representation": (
        "representation",
        {
            "max_steps": 300,
            "tolerance": 0.02,
            "simulated_examples": ADVERSARY_EXAMPLES,
            "strategy_space": {
                **PRESETS["representation"]["strategy_space"],
                "batch_sizes": [ADVERSARY_EXAMPLES],
                "examples": [ADVERSARY_EXAMPLES],
            },
        },
    ),
    "Algorithm 1": (
        "paper",
        {
            "max_steps": 60,
            "K": 20,
            "simulated_examples": ADVERSARY_EXAMPLES,
            "l_NTR": 4,
            "alpha": 1e-3,
            "beta": 1e-3,
            "per_device_train_batch_size": 64,
            "strategy_space": {"learning_rates": [1e-3, 3e-3], "batch_sizes": [20]},
        },
    ),
}


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
    letters = _data()[0]
    torch.manual_seed(0)
    original = small_classifier()
    names = letters["train"].features["label"].names
    original.config.id2label, original.config.label2id = dict(enumerate(names)), {n: i for i, n in enumerate(names)}
    task = infer_task(original)
    pretrain(original, task, build_domain(letters["train"], task.inputs(original), name="original"))
    original.save_pretrained(output_dir / "original")

    seeds = list(range(max(1, round(ADVERSARY_SEEDS * scale))))
    workers = min(2, os.cpu_count() or 1)
    # What one process does not need the other's result for runs in two; finished attacks are files that both read.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        print(f"Protecting the model twice, by the preset `representation` and by Algorithm 1 (seed {seed}) ...")
        failures = dict(pool.map(_protect, [output_dir] * 2, _PROTECTIONS, [seed] * 2, [scale] * 2))
        print(f"Attacking with {ADVERSARY_EXAMPLES} digits: {len(SWEEP)} attacks, {len(seeds)} seeds ...")
        list(pool.map(_attack, [output_dir] * workers, [seeds[part::workers] for part in range(workers)]))
    results = _attack(output_dir, seeds)
    summary = write_report(results, output_dir / "report")
    for name, failure in failures.items():
        if failure is not None:
            print(f"`{name}` has NOT protected the model: {failure}")
    print(_table(results), f"\nThe whole report: {output_dir}/report/index.html", sep="\n")
    algorithm_1 = results.recovered_transfer(model="Algorithm 1")
    return summary | {"algorithm_1": algorithm_1.value, "algorithm_1_interval": algorithm_1.interval}


def _data() -> tuple[datasets.DatasetDict, datasets.DatasetDict, datasets.DatasetDict, datasets.Dataset]:
    """Return the letters with a validation split, the defender's digits likewise, all digits, and the adversary's."""
    letters, digits = printed_letters(), handwritten_digits()
    letters["validation"], letters["train"] = split_domain(letters["train"], share=0.1)
    # Not the split on which the settings above were chosen.
    defender, adversary = split_domain(digits["train"], seed=1)
    validation, defender = split_domain(defender, share=0.1)
    return letters, datasets.DatasetDict(train=defender, validation=validation), digits, adversary


def _protect(output_dir: Path, name: str, seed: int, scale: float) -> tuple[str, str | None]:
    """Protect the model in a process of its own; return why it failed, or None."""
    torch.set_num_threads(1)
    letters, defender, _, _ = _data()
    preset, fields = _PROTECTIONS[name]
    folder = output_dir / ("protected" if preset == "representation" else "algorithm-1")
    fields = {**fields, "max_steps": max(1, round(fields["max_steps"] * scale))}
    trainer = SophonTrainer(
        load_model(output_dir / "original"),
        defender["train"],
        letters["train"],
        SophonConfig.preset(
            preset,
            **fields,
            output_dir=str(folder),
            seed=seed,
            eval_steps=max(1, fields["max_steps"] // 15),
            logging_steps=fields["max_steps"],
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=preset == "paper",  # One bar is enough for two processes.
        ),
        eval_dataset={"original": letters["validation"], "restricted": defender["validation"]},
    )
    trainer.train()
    trainer.save_model()
    return name, trainer.guard.failure if trainer.guard.state.best_step is None else None


def _attack(output_dir: Path, seeds: list[int]) -> AttackResults:
    """Attack all models with these seeds; what is finished already is read."""
    torch.set_num_threads(1)
    letters, _, digits, adversary = _data()
    suite = AttackSuite(
        SWEEP,
        output_dir / "attacks",
        seeds=seeds,
        epochs=ADVERSARY_EPOCHS,
        measured_epochs=(0, ADVERSARY_EPOCHS / 2, ADVERSARY_EPOCHS),
        examples=ADVERSARY_EXAMPLES,
    )
    return suite.run(
        protected=load_model(output_dir / "protected"),
        original=load_model(output_dir / "original"),
        baselines={"Algorithm 1": load_model(output_dir / "algorithm-1")},
        restricted_dataset=adversary,
        eval_dataset=digits["test"],
        original_eval_dataset=letters["test"],
    )


def _make_room(output_dir: Path) -> None:
    """Remove an earlier demo, which its mark tells from work under the same names, and nothing else."""
    found = {path.name for path in output_dir.iterdir()} if output_dir.exists() else set()
    made = {"original", "protected", "algorithm-1", "attacks", "report", MARK}
    others = sorted(found - made if MARK in found else found)
    if others:
        raise ValueError(f"{output_dir} holds {others[0]!r}, which no demo has made: choose an empty or a new folder.")
    for name in found - {MARK}:
        shutil.rmtree(output_dir / name)
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / MARK).touch()


def _table(results: AttackResults) -> str:
    columns = {"original": "unprotected", "Algorithm 1": "Algorithm 1", "protected": "representation"}
    intact = results.original_metric
    lines = [
        "",
        "Accuracy in the original domain (printed letters): "
        + ", ".join(f"{title} {intact[model]:.1%}" for model, title in columns.items())
        + ".",
        f"Accuracy in the restricted domain (handwritten digits) after fine-tuning on {ADVERSARY_EXAMPLES} digits for "
        f"{ADVERSARY_EPOCHS} epochs,",
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
    for strategy in SWEEP:
        values = [accuracies.get(strategy) for accuracies in final.values()]
        cells = "".join(f"{'failed':>16}" if value is None else f"{value:16.1%}" for value in values)
        lines.append(f"{strategy.name.split(', all')[0]:21}{f'Adam {strategy.learning_rate:g}':13}{cells}")
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
    ]
    return "\n".join(lines)

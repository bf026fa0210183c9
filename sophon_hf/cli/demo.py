"""The demo: pre-train on printed letters, protect against handwritten digits, attack, report. Minutes on two cores."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from sophon_hf.attacks.report import write_report
from sophon_hf.attacks.results import AttackResults, AttackRun
from sophon_hf.attacks.suite import AttackSuite
from sophon_hf.data.batches import Stream
from sophon_hf.data.domain import Domain, build_domain
from sophon_hf.data.labels import split_domain
from sophon_hf.data.toy import handwritten_digits, printed_letters
from sophon_hf.finetuning.loop import FineTuning
from sophon_hf.finetuning.strategy import FineTuningStrategy
from sophon_hf.protection.config import SophonConfig
from sophon_hf.protection.trainer import SophonTrainer
from sophon_hf.tasks.base import Task, infer_task

MARK = ".sophon-demo"
ADVERSARY_EXAMPLES, ADVERSARY_EPOCHS = 50, 20
SWEEP = [
    FineTuningStrategy(start, learning_rate=rate, batch_size=10)
    for start in ("direct", "new_head")
    for rate in (1e-3, 3e-3)
]


def small_classifier(num_labels: int = 10) -> torch.nn.Module:
    """A small ResNet of transformers for 32x32 grey images, not trained yet."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        num_channels=1, embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 1], layer_type="basic",
        num_labels=num_labels,
    )  # fmt: skip
    return ResNetForImageClassification(config)


def pretrain(
    model: torch.nn.Module, task: Task, domain: Domain, steps: int = 400, seed: int = 0, learning_rate: float = 3e-3
) -> None:
    """Train a model in place with the fine-tuning engine, as its publisher would before protecting it."""
    from tqdm.auto import tqdm

    strategy = FineTuningStrategy(learning_rate=learning_rate, schedule="cosine", warmup_ratio=0.1, batch_size=64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        batches = Stream(domain, task, seed).batches(strategy.batch_size)
        structure = task.structure(model, next(batches))
        training = FineTuning(model, task, strategy, batches, steps, structure=structure)
        for _ in tqdm(training, total=steps, desc="pre-training"):
            pass


def run(output_dir: str | Path = "demo-output", iterations: int = 90) -> dict[str, Any]:
    """Run the demo.

    Args:
        output_dir: Gets (an earlier demo there makes room) the protected model, the attacks' results, and the report.
        iterations: Iter of Algorithm 1.

    Returns:
        The report's figures.
    """
    output_dir = Path(output_dir)
    _make_room(output_dir)
    # Models as small as these run faster on one thread than on two that wait for each other.
    torch.set_num_threads(1)
    letters, digits = printed_letters(), handwritten_digits()
    torch.manual_seed(0)
    original = small_classifier()
    task = infer_task(original)
    needs = task.inputs(original)
    validation, training = split_domain(letters["train"], share=0.1)
    pretrain(original, task, build_domain(training, needs, name="original"))

    defender, adversary = split_domain(digits["train"])
    defender_validation, defender = split_domain(defender, share=0.1)
    protected = small_classifier()
    protected.load_state_dict(original.state_dict())
    trainer = SophonTrainer(
        protected,
        defender,
        training,
        SophonConfig(
            output_dir=str(output_dir / "protected"), max_steps=iterations, K=25, l_NTR=6, alpha=1e-3, beta=2e-3,
            tolerance=0.02, eval_steps=30, save_strategy="no", report_to="none", per_device_train_batch_size=64,
            strategy_space={"initializations": ["direct"], "learning_rates": [1e-3, 3e-3], "batch_sizes": [20]},
            use_cpu=True,
        ),
        eval_dataset={"original": validation, "restricted": defender_validation},
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    if trainer.guard.state.best_step is None:
        print(f"The model is NOT protected, and the attacks will show it: {trainer.guard.failure}")

    suite = AttackSuite(
        SWEEP, output_dir / "attacks", epochs=ADVERSARY_EPOCHS, measured_epochs=(0, 5, 10, 15, ADVERSARY_EPOCHS),
        examples=ADVERSARY_EXAMPLES,
    )  # fmt: skip
    results = suite.run(
        protected=protected, original=original, restricted_dataset=adversary, eval_dataset=digits["test"],
        original_dataset=letters["train"], original_eval_dataset=letters["test"],
    )  # fmt: skip
    summary = write_report(results, output_dir / "report")
    print(_table(results), f"\nThe whole report: {output_dir}/report/index.html", sep="\n")
    return summary


def _make_room(output_dir: Path) -> None:
    """Remove an earlier demo, which its mark tells from work under the same names, and nothing else."""
    found = {path.name for path in output_dir.iterdir()} if output_dir.exists() else set()
    others = sorted(found - {"protected", "attacks", "report", MARK} if MARK in found else found)
    if others:
        raise ValueError(f"{output_dir} holds {others[0]!r}, which no demo has made: choose an empty or a new folder.")
    for name in found - {MARK}:
        shutil.rmtree(output_dir / name)
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / MARK).touch()


def _table(results: AttackResults) -> str:
    intact, transfer = results.original_metric, results.recovered_transfer()
    direct = [s for s, _ in results.by_strategy("protected") if s.initialization == "direct"]
    lines = [
        f"\nOriginal domain (printed letters): accuracy {intact['original']:.1%} before, {intact['protected']:.1%} after "
        "protection.",
        f"Restricted domain (handwritten digits): accuracy after fine-tuning on {ADVERSARY_EXAMPLES} digits for "
        f"{ADVERSARY_EPOCHS} epochs, mean of {len(results.facts['seeds'])} seeds.",
        "",
        f"{'attack':24}{'protected':>11}{'original':>11}",
    ]
    for strategy, cells in results.by_strategy("protected"):
        final = [_final(cells), _final([c for c in results.of("original") if c.strategy == strategy])]
        start = f"{strategy.initialization.replace('_', ' ')}, Adam {strategy.learning_rate:g}"
        lines.append(f"{start:24}" + "".join(f"{value:11.1%}" for value in final))
    lines += [
        f"{'best from scratch':24}{results.best('scratch').mean:11.1%}",
        "",
        "Recovered transfer (100 %: the protection does nothing; 0 %: pre-training is worth nothing to the adversary):",
        f"  direct attacks only: {results.recovered_transfer(direct)}",
        f"  worst case:          {transfer}",
        "",
        "As published, the algorithm suppresses direct fine-tuning; a new head undoes much of it. Protection raises the",
        "cost of misuse and does not prevent it.",
    ]
    return "\n".join(lines)


def _final(cells: list[AttackRun]) -> float:
    return sum(cell.curve.test[-1] for cell in cells) / len(cells)

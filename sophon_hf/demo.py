"""The demo: pre-train on printed letters, protect against handwritten digits, attack, report. Minutes on two cores."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from sophon_hf.attacks.attack import Curve, run_attack
from sophon_hf.config import SophonConfig
from sophon_hf.data import Domain, Stream, build_domain, split_domain
from sophon_hf.data.glyphs import handwritten_digits, printed_letters
from sophon_hf.finetuning import FineTuning, FineTuningStrategy
from sophon_hf.reporting.plots import plot_curves
from sophon_hf.tasks import Task, evaluate_model, infer_task
from sophon_hf.trainer import SophonTrainer

ADVERSARY_EXAMPLES = 150
ATTACKS = {
    "direct, Adam 3e-4": FineTuningStrategy(learning_rate=3e-4, batch_size=25, epochs=10),
    "direct, Adam 1e-3": FineTuningStrategy(learning_rate=1e-3, batch_size=25, epochs=10),
    "new head, Adam 1e-3": FineTuningStrategy("new_head", learning_rate=1e-3, batch_size=25, epochs=10),
}


def small_classifier(num_labels: int = 10) -> torch.nn.Module:
    """A small ResNet of transformers for 32x32 grey images, not trained yet."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        num_channels=1, embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 1], layer_type="basic",
        num_labels=num_labels,
    )  # fmt: skip
    return ResNetForImageClassification(config)


def pretrain(model: torch.nn.Module, task: Task, domain: Domain, steps: int = 400, seed: int = 0) -> None:
    """Train a model in place with the fine-tuning engine, as its publisher would before protecting it."""
    from tqdm.auto import tqdm

    strategy = FineTuningStrategy(learning_rate=3e-3, schedule="cosine", warmup=0.1, batch_size=64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        batches = Stream(domain, task, seed).batches(strategy.batch_size)
        anatomy = task.anatomy(model, next(batches))
        training = FineTuning(model, task, strategy, batches, steps, anatomy=anatomy)
        for _ in tqdm(training, total=steps, desc="pre-training"):
            pass


def run(output_dir: str | Path = "demo-output", iterations: int = 60) -> dict[str, Any]:
    """Run the demo.

    Args:
        output_dir: Is emptied, and gets the protected model, the results as JSON, and a plot.
        iterations: Iter of Algorithm 1.

    Returns:
        Original accuracy before and after, and each attack's final accuracy on each model.
    """
    output_dir = Path(output_dir)
    shutil.rmtree(output_dir, ignore_errors=True)
    letters, digits = printed_letters(), handwritten_digits()
    torch.manual_seed(0)
    original = small_classifier()
    task = infer_task(original)
    needs = task.inputs(original)
    original_test = build_domain(letters["test"], needs, name="original")
    restricted_test = build_domain(digits["test"], needs, name="restricted")
    pretrain(original, task, build_domain(letters["train"], needs, name="original"))

    defender, adversary = split_domain(digits["train"])
    protected = small_classifier()
    protected.load_state_dict(original.state_dict())
    trainer = SophonTrainer(
        protected,
        defender,
        letters["train"],
        SophonConfig(
            output_dir=str(output_dir / "protected"), max_steps=iterations, K=25, l_NTR=4, alpha=1e-3, beta=1e-3,
            tolerance=0.01, eval_steps=10, save_strategy="no", report_to="none", per_device_train_batch_size=64,
            strategy_space={"learning_rates": [3e-4, 1e-3, 3e-3], "batch_sizes": [25, 50]}, use_cpu=True,
        ),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()

    accuracy = {
        name: evaluate_model(task, model, original_test, 500).metric
        for name, model in (("before", original), ("after", protected))
    }
    adversary, _ = split_domain(adversary, share=(ADVERSARY_EXAMPLES + 0.5) / len(adversary))
    attacks = _attack(original, protected, task, build_domain(adversary, needs, name="restricted"), restricted_test)
    lines = {name: {model: (c.epoch, [c.test]) for model, c in curves.items()} for name, curves in attacks.items()}
    plot = plot_curves(lines, output_dir / "curves.png", title=f"{ADVERSARY_EXAMPLES} handwritten digits")
    final = {name: {model: c.test[-1] for model, c in curves.items()} for name, curves in attacks.items()}
    results = {"original_accuracy": accuracy, "restricted_accuracy": final}
    (output_dir / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    print(_table(results), f"\nThe protected model, results.json and {plot.name} are in {output_dir}/.", sep="\n")
    return results


def _attack(original, protected, task, training, test) -> dict[str, dict[str, Curve]]:
    from tqdm.auto import tqdm

    cells = [(name, model) for name in ATTACKS for model in ("protected", "original", "scratch")]
    curves: dict[str, dict[str, Curve]] = {name: {} for name in ATTACKS}
    for name, model in tqdm(cells, desc="attacking"):
        strategy = ATTACKS[name]
        if model == "scratch":
            strategy = strategy.with_changes(initialization="scratch")
        victim = protected if model == "protected" else original
        curves[name][model] = run_attack(victim, task, strategy, training, test, epochs=range(11))
    return curves


def _table(results: dict[str, Any]) -> str:
    accuracy = results["original_accuracy"]
    lines = [
        f"\nOriginal domain (printed letters): accuracy {accuracy['before']:.1%} before, {accuracy['after']:.1%} after "
        "protection.",
        f"Restricted domain (handwritten digits): accuracy after fine-tuning on {ADVERSARY_EXAMPLES} digits.",
        "",
        f"{'attack':24}{'protected':>11}{'original':>11}{'scratch':>11}",
    ]
    for name, final in results["restricted_accuracy"].items():
        lines.append(f"{name:24}" + "".join(f"{final[m]:11.1%}" for m in ("protected", "original", "scratch")))
    lines += [
        "",
        "Protected below scratch: pre-training is worth nothing to this adversary. A new head may undo the paper's",
        "algorithm; docs/results.md measures how far. Protection raises the cost of misuse and does not prevent it.",
    ]
    return "\n".join(lines)

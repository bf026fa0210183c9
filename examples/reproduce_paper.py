"""Tables 1 to 7 of the paper, our figures beside the published ones.

    SOPHON_DATA=DIR python examples/reproduce_paper.py --table 1
    accelerate launch examples/reproduce_paper.py --table 1 --scale paper

`small` takes about an hour a table on one core: a ResNet-20, 500 images for the adversary, and the folders of DIR
(cifar10, mnist, ...) in place of the paper's domains. `paper` downloads the paper's data sets from the Hub and needs a
GPU, the models of timm (`pip install -e '.[timm]'` in a clone), and days. What either changes is written down in
`paper_tables.py` and in the record, which goes to benchmarks/results/. Interrupted, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from paper_tables import SCALES, TABLES, Experiment, Scale
from PIL import ImageOps
from safetensors.torch import load_model, save_model
from torch import nn

from sophon_hf import AttackSuite, DiffusionTask, SophonConfig, SophonTrainer, load_domain, split_domain
from sophon_hf.attacks.results import AttackResults
from sophon_hf.attacks.sweeps import scratch
from sophon_hf.data.domain import build_domain
from sophon_hf.data.labels import at_most, select_classes
from sophon_hf.finetuning.loop import pretrain
from sophon_hf.finetuning.strategy import FineTuningStrategy
from sophon_hf.protection.ntl import train_ntl
from sophon_hf.tasks.base import Task, infer_task
from sophon_hf.utils import write_atomically

METHODS = {"Scratch": "scratch", "Original": "original", "NTL": "ntl", "SOPHON": "protected"}
EPOCHS = (0, 1, 5, 10, 15, 20)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def domain(scale: Scale, name: str, size: int, data: Path) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Training and test images of one of the paper's domains: RGB, cut to a square of `size` pixels a side."""
    source, train, test = scale.domains[name]
    if "/" not in source:
        if not (data / source).is_dir():
            sys.exit(
                f"There is no folder {data / source}: set --data or SOPHON_DATA to a folder with the data that "
                "benchmarks/results/paper_tables.md lists (cifar10/, mnist/, ...)."
            )
        source = str(data / source)
    if test is None:
        measured, training = split_domain(load_domain(source, train), share=0.2)
    else:
        training, measured = load_domain(source, train), load_domain(source, test)
    return _plain(training, size), _plain(measured, size)


def _plain(dataset: datasets.Dataset, size: int) -> datasets.Dataset:
    image = next(name for name, kind in dataset.features.items() if isinstance(kind, datasets.Image))
    label = next((name for name in ("label", "fine_label") if name in dataset.column_names), None)
    dataset = dataset.select_columns([image, label] if label else [image])
    dataset = dataset.rename_columns({image: "image"} | ({label: "label"} if label else {}))
    return dataset.map(lambda row: {"image": ImageOps.fit(row["image"].convert("RGB"), (size, size))})


def pretrained(
    scale: Scale, experiment: Experiment, original: datasets.Dataset, work: Path, data: Path
) -> tuple[nn.Module, Task]:
    """The model of the original domain, from `work` where it is there already."""
    torch.manual_seed(0)
    diffusion = experiment.model == "UNet"
    labels = 0 if diffusion else original.features["label"].num_classes
    model = scale.models[experiment.model](labels).to(DEVICE)
    task = DiffusionTask() if diffusion else infer_task(model)
    file = work / f"{experiment.model}-{experiment.original}.safetensors"
    if experiment.model in scale.weights:
        file = data.parent / scale.weights[experiment.model]
    if file.exists():
        load_model(model, file)
    elif experiment.model in scale.weights:
        sys.exit(f"There is no {file}: benchmarks/results/paper_tables.md says where these weights come from.")
    else:
        steps, rate = scale.pretraining[diffusion], scale.pretraining[2]
        pretrain(model, task, build_domain(original, task.inputs(model), name="original"), steps, learning_rate=rate)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_model(model, str(file))
    return model, task


def protected(
    scale: Scale, experiment: Experiment, parts: dict[str, datasets.Dataset], work: Path, data: Path
) -> tuple[nn.Module, dict[str, Any]]:
    """The model after Algorithm 1, from `work` where it is there already, and what the guard says of it."""
    model, task = pretrained(scale, experiment, parts["original"], work, data)
    folder = work / f"{experiment.model}-{experiment.original}-{experiment.restricted}"
    done = folder / "guard.json"
    if done.exists():
        load_model(model, folder / "protected.safetensors")
        return model, json.loads(done.read_text())
    fields = dict(scale.config)
    if experiment.model == "UNet":
        # A UNet has no head to re-initialise (table 2).
        fields["strategy_space"] = fields.get("strategy_space", {}) | {"initializations": ["direct"]}
    config = SophonConfig(output_dir=str(folder), report_to="none", use_cpu=DEVICE == "cpu", **fields)
    # The guard measures on images that the model was not pre-trained on, so that it does not take memory for skill.
    held_out = {"original": parts["original_validation"], "restricted": parts["defender_validation"]}
    trainer = SophonTrainer(model, parts["defender"], parts["original"], config, task=task, eval_dataset=held_out)
    started = any(folder.glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=started or None)
    save_model(model, str(folder / "protected.safetensors"))
    guard = {"iterations": config.max_steps, "best": trainer.guard.state.best_step}
    write_atomically(done, json.dumps(guard))
    return model, guard


def run(
    scale: Scale, experiment: Experiment, with_ntl: bool, options: argparse.Namespace
) -> tuple[AttackResults, dict]:
    """Protect one model and attack it and its baselines."""
    size = scale.diffusion_size if experiment.model == "UNet" else scale.image_size
    original, original_test = domain(scale, experiment.original, size, options.data)
    restricted, test = domain(scale, experiment.restricted, size, options.data)
    if "label" in restricted.features:
        # A direct attack keeps the model's outputs, so there are no more classes than these.
        names = restricted.features["label"].names[: original.features["label"].num_classes]
        restricted, test = select_classes(restricted, names), select_classes(test, names)
    defender, adversary = split_domain(restricted)
    parts = {"original": original, "defender": defender}
    for name in list(parts):
        parts[f"{name}_validation"], parts[name] = split_domain(parts[name], share=0.1)
    if experiment.model in scale.weights:  # They have seen all training images.
        parts["original_validation"], original_test = split_domain(original_test, share=0.2)
    if scale.examples[1] is not None:
        test, original_test = at_most(test, scale.examples[1]), at_most(original_test, scale.examples[1])
    original, defender = parts["original"], parts["defender"]
    validation, adversary = split_domain(adversary, share=scale.validation_share)
    model, guard = protected(scale, experiment, parts, options.work, options.data)
    before, task = pretrained(scale, experiment, original, options.work, options.data)
    baselines = {}
    if with_ntl:
        baselines["ntl"], _ = pretrained(scale, experiment, original, options.work, options.data)
        needs = task.inputs(before)
        halves = (build_domain(original, needs, name="original"), build_domain(defender, needs, name="restricted"))
        train_ntl(baselines["ntl"], task, *halves, steps=scale.ntl_steps)
    suite = AttackSuite(
        [scale.adapt(attack) for attack in experiment.attacks.values()],
        options.work / "attacks",
        seeds=scale.seeds,
        measured_epochs=EPOCHS,
        examples=scale.examples[0],
        task=task,
        bf16=scale.config.get("bf16", False),
    )
    results = suite.run(
        protected=model,
        original=before,
        restricted_dataset=adversary,
        eval_dataset=test,
        validation_dataset=validation,
        original_eval_dataset=original_test,
        baselines=baselines,
    )
    return results, guard


def rows(results: AttackResults, attacks: dict[str, FineTuningStrategy]) -> list[dict[str, Any]]:
    """One row an attack and method: the original domain's metric, and mean and SD at every epoch."""
    found, seen = [], set()
    for name, attack in attacks.items():
        for method, model in METHODS.items():
            strategy = scratch([attack])[0] if model == "scratch" else attack
            curves = results.curves(model).get(strategy, [])
            # Several attacks share one training from scratch.
            if not curves or (model, strategy) in seen:
                continue
            seen.add((model, strategy))
            values = np.array([curve.test for curve in curves])
            spread = values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1])
            found.append(
                {
                    "attack": name,
                    "method": method,
                    "original": results.original_metric.get(model),
                    "mean": [round(float(v), 4) for v in values.mean(axis=0)],
                    "sd": [round(float(v), 4) for v in spread],
                    "strategy": strategy.name,
                }
            )
    return found


def show(record: dict[str, Any]) -> str:
    """The table as text, each row of ours above the paper's."""
    percent = record["metric"] == "accuracy"
    number = (lambda v: f"{100 * v:.1f}") if percent else (lambda v: f"{v:.3f}")
    lines = [f"Table {record['table']}, {record['scale']}: {record['title']} ({record['metric']})", ""]
    lines.append(f"{'':34}{'original':>12}" + "".join(f"{f'epoch {epoch}':>13}" for epoch in EPOCHS))
    for row in record["rows"]:
        original = "-" if row["original"] is None else number(row["original"])
        ours = [original] + [f"{number(m)}±{number(s)}" for m, s in zip(row["mean"], row["sd"], strict=True)]
        for who, values in (("ours", ours), ("paper", row["paper"])):
            name = f"{row['attack']}, {row['method']}" if who == "ours" else ""
            lines.append(f"{name:26}{who:8}" + f"{values[0]:>12}" + "".join(f"{value:>13}" for value in values[1:]))
    for name, guard in record["guard"].items():
        if guard["best"] is None:
            lines.append(f"{name}: no state kept the original domain, so the SOPHON rows are the unprotected model.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=int, required=True, choices=list(TABLES))
    parser.add_argument("--scale", default="small", choices=list(SCALES))
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("SOPHON_DATA", "data")))
    parser.add_argument("--work", type=Path, help="models and finished attacks; runs/paper/SCALE by default")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent.parent / "benchmarks" / "results")
    parser.add_argument("--seeds", type=int, nargs="+", help="of the attacks; the scale's by default")
    options = parser.parse_args()
    options.work = options.work or Path("runs/paper") / options.scale
    scale, table = SCALES[options.scale], TABLES[options.table]
    scale = scale if options.seeds is None else replace(scale, seeds=options.seeds)
    # Of the code that runs, not of what is checked out when it ends.
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    start = time.time()
    figures, found, guards = table.figures(), [], {}
    for experiment in table.experiments:
        if experiment.restricted not in scale.domains:
            print(f"{options.scale} has no data for {experiment.restricted}: left out.")
            continue
        results, guard = run(scale, experiment, table.with_ntl, options)
        attacks = {name: scale.adapt(attack) for name, attack in experiment.attacks.items()}
        found += [
            row | {"paper": figures.get((row["attack"], row["method"]), ["-"] * 7)} for row in rows(results, attacks)
        ]
        guards[f"{experiment.model}, {experiment.restricted}"] = guard
    record = {
        "table": options.table,
        "scale": options.scale,
        "title": table.title,
        "metric": results.metric,
        "rows": found,
        "domains": {
            n: scale.domains[n][0] for e in table.experiments for n in (e.original, e.restricted) if n in scale.domains
        },
        "adversary_examples": results.facts["training_examples"],
        "validation_examples": results.facts["validation_examples"],
        "test_examples": results.test_examples,
        "config": scale.config,
        "pretraining_steps": scale.pretraining[:2],
        "weights": scale.weights,
        "ntl_steps": scale.ntl_steps,
        "guard": guards,
        "seeds": scale.seeds,
        "seconds": round(time.time() - start),
        "command": "python examples/reproduce_paper.py " + " ".join(sys.argv[1:]),
        "commit": commit,
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {DEVICE}, {torch.get_num_threads()} threads",
        "versions": results.facts["versions"],
    }
    write_atomically(
        options.results / f"paper-table-{options.table}-{options.scale}.json", json.dumps(record, indent=1)
    )
    print(show(record))


if __name__ == "__main__":
    main()

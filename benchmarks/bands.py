"""The denoising MSE of a diffusion pair by bands of timesteps: where is transfer, and where is it suppressed?

    SOPHON_DATA=DIR python benchmarks/bands.py --names paper

Each model (original, scratch, and what benchmarks/protection.py protected under the names given) is measured in both
domains, then fine-tuned directly on 1,000 images of the restricted domain, and measured there again. Prints a table
and, as its last line, one JSON object.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pairs
import torch
from torch import nn

from sophon_hf.attacks.adversary import AdversaryDomains
from sophon_hf.attacks.run import run_attack
from sophon_hf.data.batches import Batch
from sophon_hf.data.domain import Domain, build_domain
from sophon_hf.finetuning.strategy import FineTuningStrategy
from sophon_hf.hub.saving import load_weights
from sophon_hf.tasks.diffusion import DiffusionTask
from sophon_hf.tasks.evaluation import evaluate_model

BANDS = ((0, 100), (100, 250), (250, 500), (500, 1000))
IMAGES = 1000


class Band(DiffusionTask):
    """Denoising at timesteps from `first` up to, but not with, `end`."""

    def __init__(self, first: int, end: int):
        super().__init__()
        self.first, self.end = first, end

    def collate(self, rows: Batch, seeds: list[int]) -> Batch:
        """As a diffusion task, with its timesteps pressed into the band."""
        whole = self.noise_scheduler.config.num_train_timesteps
        batch = super().collate(rows, seeds)
        noise, timesteps = batch["target"], self.first + batch["timestep"] * (self.end - self.first) // whole
        noisy = self.noise_scheduler.add_noise(rows["sample"], noise, timesteps)
        return {"sample": noisy, "timestep": timesteps, "target": noise}


def by_band(model: nn.Module, domain: Domain) -> list[float]:
    """MSE in each band."""
    return [round(evaluate_model(Band(*band), model, domain, 100).metric, 4) for band in BANDS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", default="faces", choices=["faces"])
    parser.add_argument("--names", nargs="*", default=[], help="of protections of seed 0")
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--epochs", type=float, default=20)
    parser.add_argument("--work", type=Path, default=Path("runs/protection"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    pair = getattr(pairs, options.pair)(options.work)
    task = DiffusionTask()
    needs = task.inputs(pair.model)
    training, test = (
        build_domain(d, needs, name="restricted") for d in (pair.adversary_dataset(IMAGES), pair.restricted_test)
    )
    original_test = build_domain(pair.original_test, needs, name="original")
    strategy = FineTuningStrategy(learning_rate=options.learning_rate, epochs=options.epochs)
    rows = {}
    for name in ("original", "scratch", *options.names):
        if name not in ("original", "scratch"):
            load_weights(pair.model, options.work / f"{options.pair}-{name}-0")
        row = {} if name == "scratch" else {"original": by_band(pair.model, original_test)}
        row |= {} if name == "scratch" else {"restricted": by_band(pair.model, test)}
        start = strategy.with_changes(initialization="scratch" if name == "scratch" else "direct")
        run_attack(
            pair.model,
            task,
            start,
            AdversaryDomains(training, test),
            measured=(options.epochs,),
            at_end=lambda model, row=row: row.update(fine_tuned=by_band(model, test)),
        )
        rows[name] = row
        for what, values in row.items():
            print(f"{name:20} {what:12}", *(f"{value:8.4f}" for value in values), flush=True)
    print(json.dumps({"bands": BANDS, "attack": strategy.name, "mse": rows}))


if __name__ == "__main__":
    main()

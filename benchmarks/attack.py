"""Time of an attack against the floor: a bare PyTorch loop with the same steps, without any measuring.

    python benchmarks/attack.py

20 epochs on 500 images with batch 50, measured at the six epochs of the paper's tables on 500 validation and 2,500 test
images, as `strong` does on the pair `animals`. All run in turn; ratios are of pairs, with the bare steps and, for an attack
that measures, with bare steps and bare measuring of the same images. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from loops import make
from torch import nn

from sophon_hf.attacks.attack import EVALUATION_BATCH, PAPER_EPOCHS, run_attack
from sophon_hf.data import Domain
from sophon_hf.finetuning import FineTuningStrategy
from sophon_hf.tasks import infer_task

STRATEGY = FineTuningStrategy(batch_size=50)


@torch.no_grad()
def measure(model: nn.Module, domains: tuple[Domain, ...]) -> None:
    """The forward passes of a measurement, on batches that are already there, and the accuracy."""
    model.eval()
    for domain in domains:
        for rows in torch.arange(len(domain)).split(EVALUATION_BATCH):
            batch = domain.rows(rows)
            (model(batch["pixel_values"]).argmax(dim=1) == batch["labels"]).sum().item()
    model.train()


def floor(model: nn.Module, domain: Domain, measured: tuple[Domain, ...] = ()) -> None:
    """The training steps alone, on one batch that is already there; and what is to be measured along the way."""
    points = {STRATEGY.step_of_epoch(epoch, len(domain)) for epoch in PAPER_EPOCHS[1:]} if measured else ()
    batch = domain.rows(torch.arange(STRATEGY.batch_size))
    optimizer = torch.optim.Adam(model.parameters(), lr=STRATEGY.learning_rate, fused=True)
    model.train()
    if measured:
        measure(model, measured)
    for step in range(1, STRATEGY.total_steps(len(domain)) + 1):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch["pixel_values"]), batch["labels"]).backward()
        optimizer.step()
        if step in points:
            measure(model, measured)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, training = make(examples=500)
    (_, validation), (_, test) = make(seed=1, examples=500), make(seed=2, examples=2500)
    task = infer_task(model)
    ratios = {"steps": [], "with measuring": [], "with measuring, against a bare loop that measures": []}
    for repeat in range(options.repeats + 1):
        seconds = {}
        for name, loop in (
            ("floor", lambda: floor(model, training)),
            ("measuring floor", lambda: floor(model, training, (test, validation))),
            ("steps", lambda: run_attack(model, task, STRATEGY, training, validation, epochs=())),
            ("with measuring", lambda: run_attack(model, task, STRATEGY, training, test, validation=validation)),
        ):
            start = time.perf_counter()
            loop()
            seconds[name] = time.perf_counter() - start
        if repeat:
            for name, values in ratios.items():
                bare = "measuring floor" if name.endswith("measures") else "floor"
                values.append(seconds[name.split(",")[0]] / seconds[bare])
    result = {name: round(statistics.median(values), 3) for name, values in ratios.items()}
    for name, value in result.items():
        print(f"{name:50}{value:8.3f}")
    print(json.dumps({"time_ratio": result, "torch": torch.__version__}))


if __name__ == "__main__":
    main()

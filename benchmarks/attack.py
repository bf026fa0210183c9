"""Time of an attack against the floor: a bare PyTorch loop with the same steps, without any measuring.

    python benchmarks/attack.py

20 epochs on 500 images with batch 50, measured at the six epochs of the paper's tables on 500 validation and 2,500 test
images, as `strong` does on the pair `animals`. Both run in turn; ratios are of pairs. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from loops import make
from torch import nn

from sophon_hf.attacks.attack import run_attack
from sophon_hf.data import Domain
from sophon_hf.finetuning import FineTuningStrategy
from sophon_hf.tasks import infer_task

STRATEGY = FineTuningStrategy(batch_size=50)


def floor(model: nn.Module, domain: Domain) -> None:
    """The training steps alone, on one batch that is already there."""
    batch = domain.rows(torch.arange(STRATEGY.batch_size))
    optimizer = torch.optim.Adam(model.parameters(), lr=STRATEGY.learning_rate, fused=True)
    model.train()
    for _ in range(STRATEGY.total_steps(len(domain))):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch["pixel_values"]), batch["labels"]).backward()
        optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, training = make(examples=500)
    (_, validation), (_, test) = make(seed=1, examples=500), make(seed=2, examples=2500)
    task = infer_task(model)
    ratios = {"steps": [], "with measuring": []}
    for repeat in range(options.repeats + 1):
        seconds = {}
        for name, loop in (
            ("floor", lambda: floor(model, training)),
            ("steps", lambda: run_attack(model, task, STRATEGY, training, validation, epochs=())),
            ("with measuring", lambda: run_attack(model, task, STRATEGY, training, test, validation=validation)),
        ):
            start = time.perf_counter()
            loop()
            seconds[name] = time.perf_counter() - start
        if repeat:
            for name, values in ratios.items():
                values.append(seconds[name] / seconds["floor"])
    result = {name: round(statistics.median(values), 3) for name, values in ratios.items()}
    print(f"{'steps alone':16}{result['steps']:8.3f}\n{'with measuring':16}{result['with measuring']:8.3f}")
    print(json.dumps({"time_ratio": result, "torch": torch.__version__}))


if __name__ == "__main__":
    main()

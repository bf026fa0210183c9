"""Time of an attack against the floor, a bare PyTorch loop with the same steps, and what measuring it costs at least.

    python benchmarks/attack.py

20 epochs on 500 images (or `--examples`) with batch 50, measured at the six epochs of the paper's tables on 500
validation and 2,500 test images, as `strong` does on the pair `animals`. All run in turn on one core, and count the
time that they compute, so that other work on the machine tells less; each ratio is the median of its pairs. The bare
loops that measure less show what an attack without a test curve would save. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from loops import make
from torch import nn

from sophon_hf.attacks.adversary import AdversaryDomains
from sophon_hf.attacks.run import EVALUATION_BATCH, PAPER_EPOCHS, run_attack
from sophon_hf.data.domain import Domain
from sophon_hf.finetuning.strategy import FineTuningStrategy
from sophon_hf.tasks.base import infer_task

STRATEGY = FineTuningStrategy(batch_size=50)
CURVE = "bare loop, validation and test at six epochs"


@torch.no_grad()
def measure(model: nn.Module, domain: Domain) -> None:
    """The forward passes of a measurement, on batches that are already there, and the accuracy."""
    model.eval()
    for rows in torch.arange(len(domain)).split(EVALUATION_BATCH):
        batch = domain.rows(rows)
        (model(batch["pixel_values"]).argmax(dim=1) == batch["labels"]).sum().item()
    model.train()


def floor(model: nn.Module, training: Domain, *measured: tuple[Domain, tuple[float, ...]]) -> None:
    """The training steps alone, on one batch that is already there; and each domain measured at its epochs."""
    at: dict[int, list[Domain]] = {}
    for domain, epochs in measured:
        for epoch in epochs:
            at.setdefault(STRATEGY.step_of_epoch(epoch, len(training)), []).append(domain)
    batch = training.rows(torch.arange(STRATEGY.batch_size))
    optimizer = torch.optim.Adam(model.parameters(), lr=STRATEGY.learning_rate, fused=True)
    model.train()
    for step in range(STRATEGY.total_steps(len(training)) + 1):
        if step:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch["pixel_values"]), batch["labels"]).backward()
            optimizer.step()
        for domain in at.get(step, ()):
            measure(model, domain)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--examples", type=int, default=500, help="the adversary's")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, training = make(examples=options.examples)
    (_, validation), (_, test) = make(seed=1, examples=500), make(seed=2, examples=2500)
    task, chosen, last = infer_task(model), PAPER_EPOCHS[3], PAPER_EPOCHS[-1]
    starts: dict[tuple, float] = {}
    loops = {
        "bare loop": lambda: floor(model, training),
        "attack, measured at its end on validation only": lambda: run_attack(
            model, task, STRATEGY, AdversaryDomains(training, validation), measured=()
        ),
        "attack, validation and test at six epochs": lambda: run_attack(
            model, task, STRATEGY, AdversaryDomains(training, test, validation)
        ),
        CURVE: lambda: floor(model, training, (validation, PAPER_EPOCHS), (test, PAPER_EPOCHS)),
        "attack, the same, where another one has measured its start": lambda: run_attack(
            model, task, STRATEGY, AdversaryDomains(training, test, validation), starts=starts
        ),
        "bare loop, validation at six, test at the chosen and the last": lambda: floor(
            model, training, (validation, PAPER_EPOCHS), (test, (chosen, last))
        ),
        "bare loop, validation at six, test at the chosen": lambda: floor(
            model, training, (validation, PAPER_EPOCHS), (test, (chosen,))
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for repeat in range(options.repeats + 1):
        for name, loop in loops.items():
            start = time.process_time()
            loop()
            if repeat:
                seconds[name].append(time.process_time() - start)

    def ratio(name: str, floor: str) -> float:
        return round(statistics.median(a / b for a, b in zip(seconds[name], seconds[floor], strict=True)), 3)

    names = list(loops)
    result = {name: ratio(name, "bare loop") for name in names[1:]}
    result["attack that measures, against the bare loop that measures the same"] = ratio(names[2], CURVE)
    result["attack whose start another one has measured, against one that measures it"] = ratio(names[4], names[2])
    for name, value in result.items():
        print(f"{name:75}{value:8.3f}")
    print(json.dumps({"time_ratio": result, "torch": torch.__version__}))


if __name__ == "__main__":
    main()

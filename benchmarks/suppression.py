"""Time and memory of a suppression loop against the floor: a bare PyTorch loop that makes the same passes.

    python benchmarks/suppression.py --models resnet-small resnet-18 --K 10 50 200 --repeats 5

One adversary, Adam, every step evaluated. Both loops run in turn in one process; ratios are of pairs, and their median
counts. Memory is how much a fresh process grows over the model that is already there, beside a bound: one stored copy,
two gradients (the sum, and the step's own), the two moments of Adam, and one graph, which is what a bare forward and
backward pass needs beside its gradient. The kernel counts to about 2 MiB, so that the smallest model's bound is within
its error. Prints a table and, as its last line, one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from loops import CASES, adversary, floor, growth_mib, in_fresh_process, make, ours, parameter_mib

from sophon_hf.tasks.base import infer_task

COPIES = 5  # Stored, sum of gradients, gradient of the step, Adam's two moments.


def measure_time(case: str, steps: int, repeats: int) -> dict[str, object]:
    """Seconds of both loops, and the ratios of pairs."""
    model, domain = make(case)
    environment = adversary(model, domain, CASES[case][2])
    seconds: dict[str, list[float]] = {"ours": [], "floor": []}
    for repeat in range(repeats + 1):
        # Whichever comes second finds warmer caches, so they swap places.
        for name, loop in [("ours", ours), ("floor", floor)][:: 1 if repeat % 2 else -1]:
            start = time.perf_counter()
            loop(model, environment, steps if repeat else 2)
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    ratios = [a / b for a, b in zip(seconds["ours"], seconds["floor"], strict=True)]
    return {
        "time_ratio": round(statistics.median(ratios), 3),
        "time_ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "seconds": {name: round(statistics.median(values), 3) for name, values in seconds.items()},
    }


def measure_memory(case: str, steps: int) -> dict[str, float]:
    """Of this process, which must be a fresh one: before and growth in MiB, and the bound of the growth."""
    model, domain = make(case)
    environment = adversary(model, domain, CASES[case][2])
    ours(model, environment, 2)  # Kernels are loaded.
    graph = growth_mib(lambda: one_pass(model, environment))["growth"] - parameter_mib(model)
    return {
        **growth_mib(lambda: ours(model, environment, steps)),
        "parameters": parameter_mib(model),
        "bound": COPIES * parameter_mib(model) + graph,
    }


def one_pass(model: torch.nn.Module, environment) -> None:
    """A bare forward and backward pass."""
    task = infer_task(model)
    simulated = environment(1)
    batch = simulated.R.batch(0, simulated.strategy.batch_size)
    model.train()
    loss = task.loss(task.predict(model, batch), task.target(batch))
    torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--K", nargs="+", type=int, default=[10, 50, 200])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, dict] = {}
    print(f"{'':14}{'K':>5}{'ratio':>8}{'range':>17}{'ours s':>9}{'floor s':>9}{'MiB':>9}{'bound MiB':>11}", flush=True)
    for case in options.models:
        results[case] = {"batch": CASES[case][2], "K": {}}
        for steps in options.K:
            memory = in_fresh_process(f"run.measure_memory({case!r}, {steps})")
            row = measure_time(case, steps, options.repeats)
            row["memory_mib"] = {name: round(value, 1) for name, value in memory.items()}
            results[case]["K"][steps] = row
            spread = "{:.3f} to {:.3f}".format(*row["time_ratio_range"])
            print(
                f"{case:14}{steps:5}{row['time_ratio']:8.3f}{spread:>17}{row['seconds']['ours']:9.3f}"
                f"{row['seconds']['floor']:9.3f}{memory['growth']:9.1f}{memory['bound']:11.1f}",
                flush=True,
            )
        memories = [row["memory_mib"] for row in results[case]["K"].values()]
        peaks = [memory["before"] + memory["growth"] for memory in memories]
        results[case]["peak_last_K_over_first"] = round(peaks[-1] / peaks[0], 3)
        results[case]["growth_last_K_over_first"] = round(memories[-1]["growth"] / memories[0]["growth"], 3)
    print(json.dumps({"models": results, "repeats": options.repeats, "torch": torch.__version__}))


if __name__ == "__main__":
    main()

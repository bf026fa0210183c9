"""Adversaries a second with one process and with two, one thread each.

    python benchmarks/processes.py --models resnet-small resnet-18 --repeats 3

Runs `accelerate launch` on this very file: iterations of `SophonTrainer` on CPUs over gloo, one adversary a process and
iteration, without evaluation. The first iteration, and all that comes before it, is not timed. Needs two idle cores.
Prints a table and, as its last line, one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from loops import CASES, make
from transformers import TrainerCallback

from sophon_hf import SophonConfig, SophonTrainer


class Times(TrainerCallback):
    """When each iteration ended."""

    def __init__(self):
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(time.perf_counter())


def work(case: str, K: int, iterations: int, folder: str) -> None:
    """What each process runs; the first one prints its rate."""
    torch.set_num_threads(1)
    model, restricted = make(case)
    batch, times = CASES[case][2], Times()
    space = {"initializations": ["direct"], "learning_rates": [1e-3], "batch_sizes": [batch]}
    config = SophonConfig(
        folder,
        max_steps=iterations,
        K=K,
        strategy_space=space,
        per_device_train_batch_size=batch,
        eval_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = SophonTrainer(model, restricted.dataset, make(case, seed=1)[1].dataset, config, callbacks=[times])
    trainer.train()
    if trainer.is_world_process_zero():
        rate = config.world_size * (iterations - 1) / (times.ends[-1] - times.ends[0])
        print(json.dumps({"processes": config.world_size, "adversaries_per_second": rate}))


def launch(processes: int, case: str, K: int, iterations: int) -> float:
    """Adversaries a second of a run with so many processes."""
    several = ["--multi_gpu", "--main_process_port", "0"] if processes > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            *several,
            "--num_processes",
            str(processes),
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            __file__,
            "--work",
            folder,
            "--models",
            case,
            "--K",
            str(K),
            "--iterations",
            str(iterations),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        process = subprocess.run(command, capture_output=True, text=True, env=environment)
    if process.returncode:
        raise RuntimeError(f"{processes} processes failed:\n{process.stderr[-2000:]}")
    result = json.loads(process.stdout.splitlines()[-1])
    if result["processes"] != processes:
        raise RuntimeError(f"{result['processes']} processes ran together, not {processes}.")
    return result["adversaries_per_second"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=CASES, default=["resnet-small", "resnet-18"])
    parser.add_argument("--K", type=int, default=50)
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.iterations < 2:
        parser.error("--iterations must be at least 2: the first one is not timed.")
    if options.work:
        return work(options.models[0], options.K, options.iterations, options.work)
    results = {}
    print(f"{'':14}{'1 process':>12}{'2 processes':>14}{'ratio':>8}   adversaries a second", flush=True)
    for case in options.models:
        pairs = [[launch(n, case, options.K, options.iterations) for n in (1, 2)] for _ in range(options.repeats)]
        one, two = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratios = [b / a for a, b in pairs]
        results[case] = {
            "adversaries_per_second": {"1": round(one, 4), "2": round(two, 4)},
            "ratio": round(statistics.median(ratios), 3),
            "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        }
        print(f"{case:14}{one:12.4f}{two:14.4f}{results[case]['ratio']:8.3f}", flush=True)
    print(json.dumps({"models": results, "K": options.K, "cores": os.cpu_count(), "torch": torch.__version__}))


if __name__ == "__main__":
    main()

"""Time and memory of a suppression loop against the floor: a bare PyTorch loop that makes the same passes.

    python benchmarks/suppression.py

Both run in turn in one process, several times; ratios are of medians. Peak memory is that of a fresh process each.
Prints a table and, as its last line, one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from pairs import ResidualNet
from torch import nn

from sophon_hf.data import Domain, build_domain
from sophon_hf.finetuning import FineTuningStrategy, sample_environment
from sophon_hf.suppression import Suppression
from sophon_hf.tasks import Anatomy, infer_task

BATCH = 64


def make(seed: int = 0, examples: int = 2000) -> tuple[nn.Module, Domain]:
    """The `animals` model, and random images of its size."""
    import datasets

    torch.manual_seed(seed)
    pixels = torch.randn(examples, 3, 16, 16).numpy()
    features = datasets.Features(
        {"pixel_values": datasets.Array3D((3, 16, 16), "float32"), "label": datasets.ClassLabel(5)}
    )
    labels = [i % 5 for i in range(len(pixels))]
    dataset = datasets.Dataset.from_dict({"pixel_values": pixels, "label": labels}, features=features)
    model = ResidualNet(5)
    return model, build_domain(dataset.with_format("numpy"), infer_task(model).inputs(model))


def ours(model: nn.Module, domain: Domain, steps: int) -> None:
    """One suppression loop with one adversary."""
    task = infer_task(model)
    strategy = FineTuningStrategy(learning_rate=1e-3, batch_size=BATCH)
    environment = sample_environment(domain, task, strategy, seed=0)
    anatomy = Anatomy("head", ())
    suppression = Suppression(model, task, anatomy, task.suppression_losses["inverse_cross_entropy"])
    suppression([environment], [[1 / steps] * steps])


def floor(model: nn.Module, domain: Domain, steps: int) -> None:
    """The same forward and backward passes and Adam steps, on one batch that is already there."""
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = domain.rows(torch.arange(BATCH))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for _ in range(steps):
        model.train()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch["pixel_values"]), batch["labels"]).backward()
        optimizer.step()
        model.eval()
        for norm in norms:
            norm.train()  # As L_alpha is evaluated: on the statistics of its batch.
        nn.functional.cross_entropy(model(batch["pixel_values"]), batch["labels"]).backward()
    model.load_state_dict(start)


def peak_memory(steps: int) -> dict[str, float]:
    """Of a process that does nothing but one suppression loop: MiB before it, at its peak, and of the model."""
    code = f"import suppression as s; s.measure_memory({steps})"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=sys.path[0])
    return json.loads(output.stdout.splitlines()[-1])


def measure_memory(steps: int) -> None:
    """Print this process's memory around one loop. Linux resets the peak on request, so set-up does not hide it."""
    torch.set_num_threads(1)
    model, domain = make()
    ours(model, domain, 2)  # Allocator and kernels are warm.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    ours(model, domain, steps)
    model_size = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    print(json.dumps({"before": before, "peak": _status("VmHWM"), "model": model_size}))


def _status(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}: peak memory is measured on Linux only.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--K", type=int, default=50)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, domain = make()
    seconds: dict[str, list[float]] = {"ours": [], "floor": []}
    for repeat in range(options.repeats + 1):
        for name, loop in (("ours", ours), ("floor", floor)):
            start = time.perf_counter()
            loop(model, domain, options.K)
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    ratios = [a / b for a, b in zip(seconds["ours"], seconds["floor"], strict=True)]
    memory = {steps: peak_memory(steps) for steps in (10, 200)}
    result = {
        "time_ratio": round(statistics.median(ratios), 3),
        "time_ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "seconds": {name: round(statistics.median(values), 3) for name, values in seconds.items()},
        "memory_mib": {str(steps): {k: round(v, 1) for k, v in value.items()} for steps, value in memory.items()},
        "memory_ratio_200_to_10": round(memory[200]["peak"] / memory[10]["peak"], 3),
        "loop_mib": {str(steps): round(value["peak"] - value["before"], 1) for steps, value in memory.items()},
        "K": options.K,
        "batch": BATCH,
        "torch": torch.__version__,
    }
    print(
        f"{'':8}{'seconds':>10}\n{'ours':8}{result['seconds']['ours']:10.3f}\n{'floor':8}{result['seconds']['floor']:10.3f}"
    )
    print(
        f"ratio {result['time_ratio']} (pairs: {result['time_ratio_range']}); memory K = 200 over K = 10: {result['memory_ratio_200_to_10']}"
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()

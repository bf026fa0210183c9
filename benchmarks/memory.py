"""Peak memory of a whole protection of a large model, beside what docs/performance.md computes.

    python benchmarks/memory.py --models resnet-50 vit-b --presets paper representation

Each in a fresh process on the CPU: three iterations, evaluated at the first and the last, with random weights and data.
To take minutes, images have 64 pixels a side, batches 4, and the presets K = 2, N = 1 and l_NTR = 2, which change no
copy of the parameters. Computed are the copies of the parameters without the model, which is there before, and a graph:
what a bare forward and backward pass needs beside its gradient. What is measured beyond that are the guard's copies,
which lie in the same memory on a CPU. Prints a table and, as its last line, one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from typing import Any

import datasets
import numpy as np
import torch
from loops import growth_mib, in_fresh_process, parameter_mib
from torch import nn

from sophon_hf import SophonConfig, SophonTrainer
from sophon_hf.protection.presets import PRESETS

COPIES = {"paper": 10, "representation": 12}
SIDE, BATCH, CLASSES = 64, 4, 10


def make(name: str) -> nn.Module:
    """A model of transformers with random weights."""
    from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    if name == "vit-b":
        return ViTForImageClassification(ViTConfig(image_size=SIDE, num_labels=CLASSES))
    return ResNetForImageClassification(ResNetConfig(num_labels=CLASSES))


def images(seed: int, count: int = 24) -> datasets.Dataset:
    """Random images, ready for the model."""
    pixels = np.random.default_rng(seed).standard_normal((count, 3, SIDE, SIDE), dtype=np.float32)
    label = datasets.ClassLabel(CLASSES)
    features = datasets.Features({"pixel_values": datasets.Array3D((3, SIDE, SIDE), "float32"), "label": label})
    columns = {"pixel_values": pixels, "label": [i % CLASSES for i in range(count)]}
    return datasets.Dataset.from_dict(columns, features=features).with_format("numpy")


def one_pass(model: nn.Module, examples: int) -> None:
    """A bare forward and backward pass."""
    pixels = torch.randn(examples, 3, SIDE, SIDE)
    torch.autograd.grad(model.train()(pixel_values=pixels).logits.square().mean(), list(model.parameters()))


def measure(name: str, preset: str) -> dict[str, float]:
    """Of this process, which must be a fresh one, in MiB."""
    torch.set_num_threads(1)
    model, (restricted, original, *held_out) = make(name), map(images, range(4))
    # Probes are taken on a batch twice as large.
    examples = BATCH * (2 if PRESETS[preset].get("probe_depths") else 1)
    one_pass(model, examples)  # Kernels are loaded.
    parameters = parameter_mib(model)
    graph = growth_mib(lambda: one_pass(model, examples))["growth"] - parameters
    space = {**PRESETS[preset].get("strategy_space", {}), "batch_sizes": [BATCH]}
    changes: dict[str, Any] = {"K": 2, "N": 1, "l_NTR": 2, "simulated_examples": 8, "max_steps": 3, "eval_steps": 3}
    changes |= {"per_device_train_batch_size": BATCH, "per_device_eval_batch_size": BATCH, "strategy_space": space}
    with tempfile.TemporaryDirectory() as folder:
        config = SophonConfig.preset(
            preset, output_dir=folder, report_to="none", save_strategy="no", use_cpu=True, **changes
        )
        evaluated = dict(zip(("original", "restricted"), held_out, strict=True))
        measured = growth_mib(
            lambda: SophonTrainer(model, restricted, original, config, eval_dataset=evaluated).train()
        )
    growth = measured["growth"]
    return {"parameters": parameters, "graph": graph, "measured": growth}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("resnet-50", "vit-b"), default=["resnet-50", "vit-b"])
    parser.add_argument("--presets", nargs="+", choices=COPIES, default=list(COPIES))
    options = parser.parse_args()
    results = []
    print(f"{'':28}{'parameters':>12}{'graph':>8}{'computed':>10}{'measured':>10}{'beyond, in copies':>19}", flush=True)
    for name in options.models:
        for preset in options.presets:
            row = in_fresh_process(f"run.measure({name!r}, {preset!r})")
            computed = (COPIES[preset] - 1) * row["parameters"] + row["graph"]
            beyond = (row["measured"] - computed) / row["parameters"]
            results.append({"model": name, "preset": preset, **row, "computed": computed, "copies_beyond": beyond})
            figures = f"{row['parameters']:12.0f}{row['graph']:8.0f}{computed:10.0f}{row['measured']:10.0f}"
            print(f"{name:12}{preset:16}{figures}{beyond:19.2f}", flush=True)
    print(json.dumps({"mib": results, "torch": torch.__version__}))


if __name__ == "__main__":
    main()

"""What the speed benchmarks run: models with random data, our suppression loop, and its floor."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import datasets
import torch
from pairs import ResidualNet
from torch import nn

from sophon_hf.data.domain import Domain, build_domain
from sophon_hf.finetuning.strategy import FineTuningStrategy
from sophon_hf.models.structure import ModelStructure
from sophon_hf.protection.simulation import SimulatedAdversary
from sophon_hf.protection.suppression import Suppression
from sophon_hf.tasks.base import infer_task

CLASSES = 5
MIB = 2**20

# Starts a simulated adversary for so many updates.
Environment = Callable[[int], SimulatedAdversary]


def _resnet_small() -> nn.Module:
    return ResidualNet(CLASSES)


def _resnet_18() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic", num_labels=CLASSES)
    return ResNetForImageClassification(config)


def _vit_tiny() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    size = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768}
    return ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, num_labels=CLASSES, **size))


def _unet() -> nn.Module:
    from diffusers import UNet2DModel

    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    return UNet2DModel(sample_size=16, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, **blocks)


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    size = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
    return BertForSequenceClassification(BertConfig(num_labels=CLASSES, **size))


# Name -> model, shape of an example, batch size.
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "resnet-small": (_resnet_small, (3, 16, 16), 64),
    "resnet-18": (_resnet_18, (3, 32, 32), 16),
    "vit-tiny": (_vit_tiny, (3, 32, 32), 8),
    "unet": (_unet, (3, 16, 16), 8),
    "bert": (_bert, (16,), 16),
}


def make(case: str = "resnet-small", seed: int = 0, examples: int = 500) -> tuple[nn.Module, Domain]:
    """A freshly made model, and random examples of its size, both in torch's default precision."""
    build, shape, _ = CASES[case]
    torch.manual_seed(seed)
    model = build()
    task = infer_task(model)
    column = task.inputs(model).main
    label = datasets.ClassLabel(CLASSES)
    if len(shape) == 1:
        columns = {column: torch.randint(1000, 30000, (examples, *shape)).numpy()}
        features = datasets.Features({column: datasets.Sequence(datasets.Value("int64")), "label": label})
    else:
        columns = {column: torch.randn(examples, *shape).numpy()}
        number = str(torch.get_default_dtype()).removeprefix("torch.")
        features = datasets.Features({column: datasets.Array3D(shape, number), "label": label})
    columns["label"] = [i % CLASSES for i in range(examples)]
    # NumPy's format is fast to read, but rounds to float32.
    form = "numpy" if torch.get_default_dtype() == torch.float32 else None
    dataset = datasets.Dataset.from_dict(columns, features=features).with_format(form)
    return model, build_domain(dataset, task.inputs(model))


def adversary(
    model: nn.Module, domain: Domain, batch_size: int, optimizer: str = "adam", rate: float = 1e-3
) -> Environment:
    """What starts the simulated adversary of every loop here, for so many updates: direct, all parameters."""
    strategy = FineTuningStrategy(optimizer=optimizer, learning_rate=rate, batch_size=batch_size)
    return partial(SimulatedAdversary, domain, infer_task(model), strategy, 0)


def ours(model: nn.Module, environment: Environment, steps: int) -> dict[str, torch.Tensor]:
    """One suppression loop with one adversary; every step is evaluated. Returns the suppression gradient."""
    task = infer_task(model)
    # A direct adversary keeps the head, whose name therefore does not matter: any module will do.
    head = next(name for name, _ in model.named_children())
    loss = next(iter(task.suppression_losses.values()))
    return Suppression(model, task, ModelStructure(head, ()), loss)(
        [environment(steps)], [[1 / steps] * steps]
    ).gradient


def floor(model: nn.Module, environment: Environment, steps: int) -> None:
    """The same forward and backward passes and Adam steps, on one batch of R_i and one of T_i."""
    task = infer_task(model)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    simulated = environment(steps)
    size = simulated.strategy.batch_size
    batch = simulated.R.batch(0, size)
    # T_i may hold fewer examples than a batch, and then the loop evaluates so many.
    held_out = simulated.T.distinct_batch(0, size)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for _ in range(steps):
        model.train()
        optimizer.zero_grad()
        task.loss(task.predict(model, batch), task.target(batch)).backward()
        optimizer.step()
        model.eval()
        for norm in norms:
            norm.train()  # As L_alpha is evaluated: on the statistics of its batch.
        task.loss(task.predict(model, held_out), task.target(held_out)).backward()
    model.zero_grad()
    model.load_state_dict(start)


def parameter_mib(model: nn.Module) -> float:
    """Memory of one copy of the parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters()) / MIB


def in_fresh_process(call: str) -> dict[str, float]:
    """What an expression gives in a process of its own, where the benchmark that is run now is the module `run`.

    Every large tensor is mapped by itself there and given back when it is freed, so the process's resident memory is
    that of the tensors that live, and not of what an allocator keeps for later.
    """
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": os.pathsep.join(sys.path)}
    module = Path(sys.argv[0]).stem
    code = f"import json, torch; torch.set_num_threads(1); import {module} as run; print(json.dumps({call}))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    if process.returncode:
        raise RuntimeError(f"A process that measures memory failed:\n{process.stderr[-2000:]}")
    return json.loads(process.stdout.splitlines()[-1])


def growth_mib(loop: Callable[[], object]) -> dict[str, float]:
    """This process's resident memory in MiB before `loop`, and by how much it grows at most while `loop` runs.

    The kernel's figures are exact to about 2 MiB.
    """
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # Linux then counts the peak from here.
    before = _status("VmRSS")
    loop()
    return {"before": before, "growth": _status("VmHWM") - before}


def _status(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}: peak memory is measured on Linux only.")

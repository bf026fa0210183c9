"""A model may be made faster before it is protected: what comes out is the same, and is saved as ever."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
import torch
from points import make_points
from safetensors.torch import load_file
from torch import nn

from sophon_hf import SophonConfig, SophonTrainer

SETTINGS = {
    "max_steps": 2,
    "K": 2,
    "per_device_train_batch_size": 16,
    "eval_strategy": "no",
    "eval_on_start": False,
    "disable_tqdm": True,
    "use_cpu": True,
    "adam_epsilon": 1e-3,
    "strategy_space": {"optimizers": ["sgd"], "learning_rates": [1e-2], "batch_sizes": [16]},
}


class Pictures(nn.Module):
    """A small convolutional network."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))).mean(dim=(2, 3)))


class Block(nn.Module):
    """Two layers with a skip connection."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(torch.tanh(self.first(x)))


class Numbers(nn.Module):
    """A small network of blocks."""

    def __init__(self):
        super().__init__()
        self.body, self.blocks, self.head = nn.Linear(6, 16), nn.ModuleList([Block(), Block()]), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def pictures(seed: int) -> datasets.Dataset:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(60, 3, 8, 8, generator=generator), torch.arange(60) % 3
    return datasets.Dataset.from_dict({"x": x.tolist(), "label": y.tolist()}).with_format("torch")


def protect(model: nn.Module, data, folder: Path, **changes) -> dict[str, torch.Tensor]:
    SophonTrainer(model, data(1), data(2), SophonConfig(str(folder), **{**SETTINGS, **changes})).train()
    return load_file(folder / "model.safetensors")


def test_channels_last_weights_are_protected_and_saved_in_the_plain_layout(tmp_path):
    states = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = Pictures().to(memory_format=layout)
        start = model.second.weight.detach().clone()
        states.append(protect(model, pictures, tmp_path / str(layout)))
        assert model.second.weight.is_contiguous(memory_format=layout)
    torch.testing.assert_close(states[1], states[0], rtol=1e-4, atol=1e-6)
    assert all(tensor.is_contiguous() for tensor in states[1].values())
    assert (states[1]["second.weight"] - start).abs().max() > 1e-4


@pytest.mark.parametrize("changes", [{}, {"probe_depths": 1, "num_persistent": 2}], ids=["paper", "additions"])
def test_compiled_blocks_run_in_the_simulation(tmp_path, changes):
    """They are compiled once for each mode, whatever the number of adversaries and heads, and change nothing."""
    compiled, calls = [], []

    def count(graph: torch.fx.GraphModule, _: list) -> object:
        compiled.append(graph)
        return lambda *inputs: calls.append(graph) or graph.forward(*inputs)

    states = []
    for wanted in (False, True):
        torch.manual_seed(0)
        model = Numbers()
        for block in model.blocks if wanted else ():
            block.compile(backend=count)
        states.append(protect(model, make_points, tmp_path / str(wanted), **changes))
    torch.testing.assert_close(states[1], states[0], rtol=1e-4, atol=1e-6)
    # An iteration: K updates and K evaluations of the adversary, its score before, and a reinforcement step.
    assert len(calls) >= 2 * 2 * (2 + 2 + 1)
    assert len(compiled) <= 8

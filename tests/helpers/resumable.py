"""A run whose weights hang on all that a checkpoint has to hold, and what kills it in the middle."""

from __future__ import annotations

import os
import signal

import datasets
import torch
from torch import nn
from transformers import TrainerCallback

from sophon_hf import SophonConfig, SophonTrainer


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.norm = nn.Linear(6, 16), nn.BatchNorm1d(16)
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.drop(torch.tanh(self.norm(self.body(x)))))


def points(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(80, 6, generator=generator)
    y = (x @ torch.randn(6, 3, generator=generator)).argmax(dim=1)
    return datasets.Dataset.from_dict({"x": x.tolist(), "label": y.tolist()})


def fitted():
    model, data = Net(), points(2)
    x, y = torch.tensor(data["x"]), torch.tensor(data["label"])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


class Kill(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)


def build(output_dir, callbacks=(), **changes):
    torch.manual_seed(0)
    settings = dict(
        max_steps=7,
        K=2,
        simulated_examples=3,
        l_NTR=2,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=8,
        eval_steps=2,
        save_steps=4,
        disable_tqdm=True,
        use_cpu=True,
        lr_scheduler_type="linear",
        tolerance=1.0,
        strategy_space={"learning_rates": [1e-2, 1e-3], "batch_sizes": [8, 16]},
    )
    args = SophonConfig(output_dir, **{**settings, **changes})
    return SophonTrainer(fitted(), points(1), points(2), args, callbacks=list(callbacks))

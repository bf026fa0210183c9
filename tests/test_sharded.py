"""Two processes that hold a shard of the model each (FSDP2) do what one process with the whole model does."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

# The run as a user would write it. Each process saves what it ends with; the test reads `build` from it too.
SCRIPT = """
import os
import sys

import datasets
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from sophon_hf import SophonConfig, SophonTrainer

torch.set_num_threads(1)
if "RANK" in os.environ:
    # accelerate shards on GPUs alone: it is told that the two processes over gloo are such.
    torch.distributed.init_process_group("gloo")
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)

PLAIN = dict(eval_strategy="no", eval_on_start=False, save_strategy="no")
GUARDED = dict(eval_steps=1, save_strategy="steps", save_steps=2, tolerance=1.0)
NEW_HEAD = {"initializations": ["new_head"], "learning_rates": [1e-2], "batch_sizes": [9]}
CASES = {
    "paper": dict(PLAIN, N=2),
    "loops": dict(PLAIN, l_FTS=2, l_NTR=2, gradient_accumulation_steps=2, max_grad_norm=0.5),
    "other_classes": dict(PLAIN, classes=5, strategy_space=NEW_HEAD),
    "new_blocks": dict(PLAIN, strategy_space=dict(NEW_HEAD, reinitialized_blocks=[1], transfers=["all", "head", "norm"]), N=2),
    "optimizers": dict(PLAIN, N=5, strategy_space={"optimizers": ["sgd", "nesterov", "adagrad", "adadelta", "adamw"],
        "learning_rates": [1e-2], "schedules": ["cosine"], "weight_decays": [0.1], "batch_sizes": [8]}),
    "guarded": dict(GUARDED),
    "rollbacks": dict(GUARDED, tolerance=0.0, alpha=0.3),
    "additions": dict(GUARDED, net=True, probes=2, persistent=2, horizon=4, distillation=1.0, keep_norms=True,
        max_grad_norm=1.0, max_steps=4, strategy_space=NEW_HEAD),
}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(16, 24), nn.LayerNorm(24), nn.Linear(24, 16)

    def forward(self, x):
        return x + self.second(torch.tanh(self.norm(self.first(x))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.blocks = nn.Linear(192, 16), nn.Sequential(Block(), Block())
        self.head = nn.Linear(16, 3)

    def forward(self, pixel_values):
        return self.head(self.blocks(self.body(pixel_values.flatten(1))))


def pictures(seed, classes):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(96, 3, 8, 8, generator=generator)
    y = (x.flatten(1) @ torch.randn(192, classes, generator=generator)).argmax(dim=1)
    return datasets.Dataset.from_dict({"pixel_values": x.tolist(), "label": y.tolist()}).with_format("torch")


def fitted(net):
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4,
        num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, qkv_bias=False,
    )
    model, data = Net() if net else ViTForImageClassification(config), pictures(2, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(20):
        optimizer.zero_grad()
        output = model(data[:]["pixel_values"])
        nn.functional.cross_entropy(output if net else output.logits, data[:]["label"]).backward()
        optimizer.step()
    return model


def build(output_dir, net=False, classes=3, sharded=True, **changes):
    settings = dict(
        max_steps=3, K=2, N=1, alpha=1e-3, beta=1e-3, per_device_train_batch_size=8, disable_tqdm=True,
        strategy_space={"learning_rates": [1e-2, 1e-3], "batch_sizes": [8, 16]},
    )
    if sharded:
        layer = "Block" if net else "ViTLayer"
        settings |= {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": [layer]}}
    args = SophonConfig(output_dir, **{**settings, **changes})
    return SophonTrainer(fitted(net), pictures(1, classes), pictures(2, 3), args)


def whole(trainer):
    return {name: getattr(p, "full_tensor", lambda p=p: p)().clone() for name, p in trainer.model.state_dict().items()}


def run(trainer, path, **options):
    trainer.train(**options)
    history = trainer.state.log_history
    result = {
        "model": whole(trainer),
        "held": sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in trainer.model.parameters()),
        "evaluations": [e for e in history if "eval_original_accuracy" in e],
        "rollbacks": max(e.get("rollbacks", 0) for e in history),
        "L_FTS": [e["L_FTS"] for e in history if "L_FTS" in e],
        "moments": [len(group["params"]) for group in trainer.optimizer.param_groups],
    }
    torch.save(result, f"{path}-{trainer.args.process_index}.pt")


if __name__ == "__main__":
    for name, changes in CASES.items():
        trainer = build(f"{sys.argv[1]}/{name}", **changes)
        assert trainer.args.world_size == 2 and type(trainer.model).__name__.startswith("FSDP")
        run(trainer, f"{sys.argv[1]}/{name}")
    for name in ("guarded", "rollbacks", "additions"):
        trainer = build(f"{sys.argv[1]}/{name}-again", **CASES[name])
        run(trainer, f"{sys.argv[1]}/{name}-again", resume_from_checkpoint=f"{sys.argv[1]}/{name}/checkpoint-2")
"""

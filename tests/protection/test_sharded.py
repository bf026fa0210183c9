"""Two processes that hold a shard of the model each (FSDP2) do what one process with the whole model does."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline
from safetensors.torch import load_file
from transformers import ViTForImageClassification
from two_processes import launch, results

from sophon_hf.hub.claim import Claim, hash_weights
from sophon_hf.models.loading import hash_state

# The run as a user would write it. Each process saves what it ends with; the test reads `build` from it too.
SCRIPT = """
import os
import sys

import datasets
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from diffusers import UNet2DModel
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import ViTConfig, ViTForImageClassification

from sophon_hf import SophonConfig, SophonTrainer

torch.set_num_threads(1)
if "RANK" in os.environ:
    # accelerate shards on GPUs alone: it is told that the two processes over gloo are such.
    torch.distributed.init_process_group("gloo")
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)

PLAIN = dict(eval_strategy="no", eval_on_start=False, save_strategy="no")
GUARDED = dict(
    eval_steps=2, save_strategy="steps", save_steps=2, tolerance=1.0, per_device_eval_batch_size=4,
    simulated_examples=3,
)
OWN_HEAD = {"initializations": ["direct"], "learning_rates": [1e-2], "batch_sizes": [8]}
NEW_HEAD = {"initializations": ["new_head"], "learning_rates": [1e-2], "batch_sizes": [9]}
BLOCKS = dict(NEW_HEAD, reinitialized_blocks=[1], transfers=["all", "head", "norm"])
OPTIMIZERS = {
    "optimizers": ["sgd", "nesterov", "adagrad", "adadelta", "adamw"], "learning_rates": [1e-2], "schedules":
    ["cosine"], "weight_decays": [0.1], "batch_sizes": [8],
}
CASES = {
    "paper": dict(PLAIN, N=2),
    "loops": dict(PLAIN, l_FTS=2, l_NTR=2, gradient_accumulation_steps=2, max_grad_norm=0.5),
    "other_classes": dict(PLAIN, classes=5, strategy_space=NEW_HEAD, fsdp={"cpu_ram_efficient_loading": True}),
    "new_blocks": dict(PLAIN, strategy_space=BLOCKS, N=2),
    "optimizers": dict(PLAIN, strategy_space=OPTIMIZERS, N=5),
    "rollbacks": dict(GUARDED, eval_steps=1, tolerance=0.0, alpha=0.3, max_steps=3, strategy_space=OWN_HEAD),
    "additions": dict(
        GUARDED, kind="net", probe_depths=2, num_persistent=2, horizon=4, distillation=1.0, keep_norms=True,
        max_grad_norm=1.0, max_steps=4, strategy_space=NEW_HEAD,
    ),
    # Left to itself Adam makes whole steps of rounding errors, where a gradient is next to zero.
    "diffusion": dict(
        PLAIN, kind="unet", save_strategy="steps", save_steps=1, adam_epsilon=1e-2,
        strategy_space=dict(OWN_HEAD, optimizers=["sgd"], learning_rates=[1e-3]),
    ),
    "bf16": dict(PLAIN, bf16=True, strategy_space=NEW_HEAD),
}
REFUSED = {
    "FSDP1": dict(fsdp={"version": 1, "sync_module_states": False}),
    "pieces": dict(fsdp={"state_dict_type": "SHARDED_STATE_DICT"}),
    "offloaded": dict(fsdp={"cpu_offload": True}),
    "wrapped": dict(fsdp={"activation_checkpointing": True}),
    "exact": dict(second_order=True),
    "batch_norm": dict(kind="batch_norm"),
    "shares": dict(strategy_space={"batch_sizes": [1, 8]}),
    "blocks": dict(kind="net", strategy_space=BLOCKS),
    "sharded": dict(kind="sharded"),
}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(16, 24), nn.LayerNorm(24), nn.Linear(24, 16)

    def forward(self, x):
        return x + self.second(torch.tanh(self.norm(self.first(x))))


class Net(nn.Module):
    def __init__(self, norm=nn.Identity):
        super().__init__()
        self.body, self.blocks = nn.Linear(192, 16), nn.Sequential(Block(), Block())
        self.norm, self.head = norm(16), nn.Linear(16, 3)

    def forward(self, pixel_values):
        return self.head(self.norm(self.blocks(self.body(pixel_values.flatten(1)))))


def vit():
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4,
        num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, qkv_bias=False,
    )
    return ViTForImageClassification(config)


def unet():
    return UNet2DModel(
        sample_size=8, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )


MODELS = {  # and the layers that are sharded one by one
    "vit": (vit, "ViTLayer"),
    "net": (Net, "Block"),
    "unet": (unet, "ResnetBlock2D"),
    "batch_norm": (lambda: Net(nn.BatchNorm1d), "Block"),
    "sharded": (lambda: fully_shard(Net()), "Block"),
}


def pictures(seed, classes, kind="vit"):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(96, 3, 8, 8, generator=generator)
    y = (x.flatten(1) @ torch.randn(192, classes, generator=generator)).argmax(dim=1)
    array = datasets.Array3D((3, 8, 8), "float32")
    if kind == "unet":
        return datasets.Dataset.from_dict({"sample": x.numpy()}, datasets.Features({"sample": array}))
    features = datasets.Features({"pixel_values": array, "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict({"pixel_values": x.numpy(), "label": y.tolist()}, features)


def fitted(kind):
    torch.manual_seed(0)
    model, data = MODELS[kind][0](), pictures(2, 3).with_format("torch")[:]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(20 if kind in ("vit", "net") else 0):
        optimizer.zero_grad()
        output = model(data["pixel_values"])
        nn.functional.cross_entropy(getattr(output, "logits", output), data["label"]).backward()
        optimizer.step()
    return model


def build(output_dir, kind="vit", classes=3, fsdp=None, sharded=True, **changes):
    settings = dict(
        max_steps=2, K=2, N=1, alpha=1e-3, beta=1e-3, per_device_train_batch_size=8, disable_tqdm=True,
        strategy_space={"learning_rates": [1e-2, 1e-3], "batch_sizes": [8, 16]},
    )
    if sharded:
        settings |= dict(fsdp=True, fsdp_config={"transformer_layer_cls_to_wrap": [MODELS[kind][1]], **(fsdp or {})})
    args = SophonConfig(output_dir, **{**settings, **changes})
    return SophonTrainer(fitted(kind), pictures(1, classes, kind), pictures(2, 3, kind), args)


def run(trainer, path, **options):
    trainer.train(**options)
    history, parameters = trainer.state.log_history, trainer.model.state_dict()
    result = {
        "model": {name: getattr(p, "full_tensor", lambda p=p: p)().clone() for name, p in parameters.items()},
        "held": sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in trainer.model.parameters()),
        "evaluations": [{k: v for k, v in e.items() if "runtime" not in k} for e in history if "eval_original_loss" in
        e], "rollbacks": max(e.get("rollbacks", 0) for e in history), "L_FTS": [e["L_FTS"] for e in history if "L_FTS"
        in e],
    }
    torch.save(result, f"{path}-{trainer.args.process_index}.pt")


if __name__ == "__main__":
    folder, rank = sys.argv[1], os.environ["RANK"]
    for name in sys.argv[2:] or CASES:
        trainer = build(f"{folder}/{name}", **CASES[name])
        assert trainer.args.world_size == 2
        run(trainer, f"{folder}/{name}")
        if trainer.args.save_strategy != "no":
            checkpoint = f"{folder}/{name}/checkpoint-{trainer.args.save_steps}"
            trainer = build(f"{folder}/{name}-resumed", **CASES[name])
            run(trainer, f"{folder}/{name}-resumed", resume_from_checkpoint=checkpoint)
    messages = {}
    for name, changes in REFUSED.items():
        try:
            build(f"{folder}/refused", **changes)
        except ValueError as error:
            messages[name] = str(error)
    torch.save(messages, f"{folder}/refused-{rank}.pt")
"""


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> Path:
    """The folder in which both processes left their results of every case."""
    return launch(tmp_path_factory.mktemp("sharded"), SCRIPT, timeout=1200, ACCELERATE_TORCH_DEVICE="cpu")


@pytest.fixture(scope="module")
def script(launched) -> dict:
    """What the script defines, for the one process that the two are compared with."""
    return runpy.run_path(str(launched / "run.py"))


CASES = [
    "paper",
    "loops",
    "other_classes",
    "new_blocks",
    "optimizers",
    "rollbacks",
    "additions",
    "diffusion",
]
SAVED = ["rollbacks", "additions", "diffusion"]


@pytest.fixture(scope="module")
def whole(script, tmp_path_factory):
    """Runs a case on one process, with the batch of both; gives the result, the trainer, and the model before."""
    known = {}

    def run(case: str):
        if case not in known:
            folder = tmp_path_factory.mktemp("whole")
            changes = {**script["CASES"][case], "sharded": False, "per_device_train_batch_size": 16}
            trainer = script["build"](str(folder / case), use_cpu=True, **changes)
            start = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
            script["run"](trainer, folder / case)
            known[case] = torch.load(folder / f"{case}-0.pt", weights_only=True), trainer, start
        return known[case]

    return run


@pytest.mark.parametrize("case", CASES)
def test_two_processes_with_shards_do_what_one_does(launched, whole, case):
    """The same adversaries, each batch in two parts: heads, blocks, transfers, optimizers and additions included."""
    one, trainer, start = whole(case)
    first, second = results(launched, case)
    torch.testing.assert_close(first["model"], second["model"], rtol=0, atol=0)
    distance, moved = (
        torch.cat([(state[name] - one["model"][name]).flatten() for name in start]).norm()
        for state in (first["model"], start)
    )
    assert distance <= 1e-3 * moved
    assert first["L_FTS"] == pytest.approx(one["L_FTS"], rel=2e-3)
    assert first["rollbacks"] == one["rollbacks"] == (3 if case == "rollbacks" else 0)
    assert (moved > 0.05) == (case != "rollbacks")

    assert len(first["evaluations"]) == len(one["evaluations"])
    for of_two, of_one in zip(first["evaluations"], one["evaluations"], strict=True):
        # A simulated accuracy moves by an example where a prediction is on the edge.
        measured = {name: value for name, value in of_one.items() if "simulated" not in name}
        assert {name: of_two[name] for name in measured} == pytest.approx(measured, rel=1e-2)


def test_each_process_holds_a_half(launched, whole):
    one, trainer, _ = whole("paper")
    halves = [result["held"] for result in results(launched, "paper")]
    assert sum(halves) == one["held"] == sum(p.numel() for p in trainer.model.parameters())
    assert max(halves) < 0.55 * one["held"]


@pytest.mark.parametrize("case", SAVED)
def test_a_resumed_run_ends_bit_identical(launched, case):
    """Optimizers, the guard's states and what lives on: every process takes up its own part again."""
    for result, resumed in zip(results(launched, case), results(launched, f"{case}-resumed"), strict=True):
        torch.testing.assert_close(resumed["model"], result["model"], rtol=0, atol=0)
        assert resumed["L_FTS"] == result["L_FTS"]


@pytest.mark.parametrize("case", ["rollbacks", "additions"])
def test_the_protected_model_is_saved_whole(launched, whole, case):
    """As its own library saves it, with a claim that fits: whether it was sharded does not show."""
    _, trainer, _ = whole(case)
    result, one = results(launched, case)[0], Path(trainer.args.output_dir)
    claim, expected = Claim.read(launched / case), Claim.read(one)
    assert claim.weights == hash_weights(launched / case)
    assert (claim.model, claim.protection.status) == (expected.model, expected.protection.status)
    # The two processes share their adversaries: as many are simulated as by one.
    assert claim.compute.simulated_passes == expected.compute.simulated_passes
    if case == "additions":
        saved = load_file(launched / case / "model.safetensors")
    else:
        loaded = ViTForImageClassification.from_pretrained(launched / case)
        saved = loaded.state_dict()
        assert claim.state_hash == hash_state(loaded)
        assert json.loads((launched / case / "config.json").read_text())["architectures"] == [claim.model]
    torch.testing.assert_close(dict(saved), result["model"], rtol=0, atol=0)


def test_a_sharded_unet_is_saved_as_a_pipeline(launched):
    pipeline = DDPMPipeline.from_pretrained(launched / "diffusion")
    torch.testing.assert_close(
        dict(pipeline.unet.state_dict()), results(launched, "diffusion")[0]["model"], rtol=0, atol=0
    )


def test_bf16_shards_agree_with_bf16_on_one_process(launched, whole):
    """Within what bf16 rounds: FSDP gathers bf16 weights, one process casts them where they are used."""
    one, _, start = whole("bf16")
    moved = [
        torch.cat([(r["model"][n] - start[n]).flatten() for n in start]) for r in (results(launched, "bf16")[0], one)
    ]
    assert torch.cosine_similarity(*moved, dim=0) > 0.9
    assert results(launched, "bf16")[0]["L_FTS"] == pytest.approx(one["L_FTS"], rel=0.05)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("FSDP1", "set fsdp_version to 2"),
        ("pieces", "set fsdp_state_dict_type to FULL_STATE_DICT"),
        ("offloaded", "leave fsdp_offload_params off"),
        ("wrapped", "use gradient_checkpointing"),
        ("exact", "leave second_order off"),
        ("batch_norm", "batch norm .* Use plain processes"),
        ("shares", "has 1 examples, but the 2 processes .* share each batch: give .* larger batch_sizes"),
        ("blocks", "'blocks.1' cannot be re-initialised: it is a FSDPBlock"),
        ("sharded", "sharded already: give it whole"),
    ],
)
def test_what_cannot_be_sharded_is_refused_by_every_process(launched, name, message):
    for rank in range(2):
        refused = torch.load(launched / f"refused-{rank}.pt", weights_only=True)
        assert re.search(message, refused.get(name, "")), refused.get(name)


def test_a_checkpoint_of_shards_is_refused_by_one_process(launched, script):
    trainer = script["build"](str(launched / "rollbacks"), sharded=False, use_cpu=True, **script["CASES"]["rollbacks"])
    with pytest.raises(ValueError, match="its world_size is 2, now it is 1"):
        trainer.train(resume_from_checkpoint=True)

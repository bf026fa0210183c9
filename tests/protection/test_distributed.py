"""Two processes under `accelerate launch` do what one does with twice the adversaries and twice the batch."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from two_processes import launch, results

# The run as a user would write it. Each process saves what it ends with; the test reads `build` from it too.
SCRIPT = """
import sys

import datasets
import torch
from torch import nn

from sophon_hf import SophonConfig, SophonTrainer

torch.set_num_threads(1)

PLAIN = dict(batch_norm=False, eval_strategy="no", eval_on_start=False)
GUARDED = dict(batch_norm=True, eval_steps=1, save_strategy="steps", save_steps=2)
CASES = {
    "paper": PLAIN,
    "loops": dict(PLAIN, l_FTS=2, l_NTR=2, gradient_accumulation_steps=2, max_grad_norm=0.5),
    "batch_norm": dict(GUARDED, tolerance=1.0),
    "rollbacks": dict(GUARDED, tolerance=0.0, alpha=0.5),
    "evaluated": dict(PLAIN, eval_strategy="steps", eval_steps=1, eval_on_start=True, tolerance=1.0),
}


class Net(nn.Module):
    def __init__(self, batch_norm):
        super().__init__()
        self.body, self.norm = nn.Linear(6, 16), nn.BatchNorm1d(16) if batch_norm else nn.Identity()
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.norm(self.body(x))))


def points(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(90, 6, generator=generator)
    y = (x @ torch.randn(6, 3, generator=generator)).argmax(dim=1)
    return datasets.Dataset.from_dict({"x": x.tolist(), "label": y.tolist()})


def fitted(batch_norm):
    torch.manual_seed(0)
    model, data = Net(batch_norm), points(2)
    x, y = torch.tensor(data["x"]), torch.tensor(data["label"])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def build(output_dir, batch_norm, **changes):
    settings = dict(
        max_steps=3, K=2, N=1, per_device_train_batch_size=8, save_strategy="no", disable_tqdm=True, use_cpu=True,
        strategy_space={"learning_rates": [1e-2, 1e-3], "batch_sizes": [8, 16]},
    )
    args = SophonConfig(output_dir, **{**settings, **changes})
    return SophonTrainer(fitted(batch_norm), points(1), points(2), args)


if __name__ == "__main__":
    for name, changes in CASES.items():
        trainer = build(f"{sys.argv[1]}/{name}", **changes)
        assert trainer.args.world_size == 2
        trainer.train()
        result = {
            "model": dict(trainer.model.state_dict()),
            "evaluations": [e for e in trainer.state.log_history if "eval_original_accuracy" in e],
            "rollbacks": max(e.get("rollbacks", 0) for e in trainer.state.log_history),
        }
        torch.save(result, f"{sys.argv[1]}/{name}-{trainer.args.process_index}.pt")
    try:
        build(f"{sys.argv[1]}/sharded", batch_norm=False, fsdp=True)
    except ValueError as error:
        torch.save(str(error), f"{sys.argv[1]}/refused-{trainer.args.process_index}.pt")
"""


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> Path:
    """The folder in which both processes left their results of every case."""
    return launch(tmp_path_factory.mktemp("distributed"), SCRIPT, timeout=400)


@pytest.fixture(scope="module")
def script(launched) -> dict:
    """What the script defines, for the one process that the two are compared with."""
    return runpy.run_path(str(launched / "run.py"))


@pytest.mark.parametrize("case", ["paper", "loops", "batch_norm", "rollbacks", "evaluated"])
def test_the_replicas_end_identical(launched, case):
    """Buffers included: the guard of each process judges by its own replica."""
    first, second = results(launched, case)
    torch.testing.assert_close(first["model"], second["model"], rtol=0, atol=0)
    assert first["rollbacks"] == second["rollbacks"] == (3 if case == "rollbacks" else 0)


@pytest.mark.parametrize("case", ["paper", "loops", "evaluated"])
def test_two_processes_do_what_one_does_with_twice_as_much(launched, script, tmp_path, case):
    changes = {**script["CASES"][case], "N": 2, "per_device_train_batch_size": 16}
    trainer = script["build"](str(tmp_path / case), **changes)
    start = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    two = results(launched, case)[0]
    torch.testing.assert_close(two["model"], dict(trainer.model.state_dict()), rtol=1e-3, atol=1e-5)
    assert (two["model"]["body.weight"] - start["body.weight"]).abs().max() > 1e-3

    evaluations = [entry for entry in trainer.state.log_history if "eval_original_accuracy" in entry]
    assert len(two["evaluations"]) == len(evaluations) == (4 if case == "evaluated" else 0)
    for of_two, of_one in zip(two["evaluations"], evaluations, strict=True):
        assert of_two == pytest.approx(of_one, rel=1e-3)


def test_two_processes_evaluate_every_example_once(launched, script, tmp_path):
    """The first evaluation, of a model that both have in common, batch-norm statistics included."""
    trainer = script["build"](str(tmp_path / "one"), **script["CASES"]["batch_norm"])
    expected = trainer.evaluate()
    measured = results(launched, "batch_norm")[0]["evaluations"][0]
    assert {name: measured[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_one_process_saves_and_its_file_is_the_model(launched):
    for case in ("batch_norm", "rollbacks"):
        torch.testing.assert_close(
            load_file(launched / case / "model.safetensors"), results(launched, case)[0]["model"], rtol=0, atol=0
        )


def test_shards_are_refused_where_accelerate_would_leave_the_model_whole(launched):
    for message in (torch.load(launched / f"refused-{rank}.pt", weights_only=True) for rank in range(2)):
        assert "FSDP is asked for, but accelerate runs MULTI_CPU on cpu, where it does not shard" in message


def test_a_checkpoint_of_two_processes_is_refused_by_one(launched, script):
    trainer = script["build"](str(launched / "batch_norm"), **script["CASES"]["batch_norm"])
    with pytest.raises(ValueError, match="its world_size is 2, now it is 1"):
        trainer.train(resume_from_checkpoint=True)

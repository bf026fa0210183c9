"""A run that was killed goes on as if nothing had happened, and only its own checkpoints are taken."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import datasets
import numpy as np
import pytest
import resumable
import torch
from diffusers import DDPMScheduler
from observed import config
from points import TinyNet, make_points
from tiny_models import CLASSES, make_bert, make_unet, make_vit
from transformers import TrainerCallback
from two_processes import forked

from sophon_hf import DiffusionTask, SophonConfig, SophonTrainer


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


class KeepLast(TrainerCallback):
    """The weights after the last iteration, before the best state takes their place."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.state = state_of(model)


def run_and_kill(output: Path, changes: dict) -> None:
    printed = output.with_name("printed.txt")
    process = forked(lambda: resumable.build(str(output), [resumable.Kill()], **changes).train(), printed, 300)
    ended = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert ended == -signal.SIGKILL, printed.read_text()[-2000:]


@pytest.mark.parametrize(
    ("changes", "saved_at", "rollbacks"),
    # The second checkpoint lies between two evaluations, where the guard of an uninterrupted run does not look.
    [({}, 4, 0), ({"alpha": 0.5, "tolerance": 0.0, "save_steps": 3}, 3, 1)],
    ids=["dropout and batch norm", "a rollback before the checkpoint"],
)
def test_a_killed_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path, changes, saved_at, rollbacks):
    run_and_kill(tmp_path / "killed", changes)
    assert sorted(os.listdir(tmp_path / "killed")) == [f"checkpoint-{saved_at}"]

    states = []
    for folder, resume in (("whole", None), ("killed", True)):
        last = KeepLast()
        trainer = resumable.build(str(tmp_path / folder), [last], **changes)
        trainer.train(resume_from_checkpoint=resume)
        states.append((last.state, state_of(trainer.model), trainer.guard.state))
        history = trainer.state.log_history
    for whole, resumed in zip(states[0][:2], states[1][:2], strict=True):
        assert_equal(resumed, whole)
    assert states[0][2] == states[1][2]
    at_checkpoint = [entry["rollbacks"] for entry in history if "rollbacks" in entry and entry["step"] <= saved_at]
    assert max(at_checkpoint) == rollbacks
    saved = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("whole", "killed")]
    assert saved[0] == saved[1]


def library_data(make, seed: int) -> datasets.Dataset:
    generator = np.random.default_rng(seed)
    labels = {} if make is make_unet else {"label": [i % CLASSES for i in range(40)]}
    if make is make_bert:
        return datasets.Dataset.from_dict({"input_ids": generator.integers(30, size=(40, 5)).tolist(), **labels})
    column, shape = ("sample", (40, 1, 8, 8)) if make is make_unet else ("pixel_values", (40, 3, 16, 16))
    return datasets.Dataset.from_dict({column: generator.normal(size=shape).astype(np.float32).tolist(), **labels})


@pytest.mark.parametrize("make", [make_vit, make_bert, make_unet])
def test_a_model_of_the_libraries_resumes_to_the_same_weights(tmp_path, make):
    """Whose files call some weights by other names than the model does (ViT), or are a pipeline's (UNet)."""
    states = []
    for resume in (None, str(tmp_path / "output" / "checkpoint-2")):
        torch.manual_seed(0)
        model = make()
        task = DiffusionTask(DDPMScheduler(num_train_timesteps=20)) if make is make_unet else None
        args = config(tmp_path, save_strategy="steps", save_steps=2, alpha=1e-2)
        trainer = SophonTrainer(model, library_data(make, 1), library_data(make, 2), args, task=task)
        trainer.train(resume_from_checkpoint=resume)
        states.append(state_of(model))
    assert_equal(states[1], states[0])


def test_a_finished_run_that_was_evaluated_by_epochs_is_resumed_as_protected(tmp_path):
    """The last checkpoint is written before the epoch's end; its guard has seen the last state all the same."""
    output, states = tmp_path / "output", []
    for resume in (None, True):
        trainer = build(output, eval_strategy="epoch", save_steps=3)
        start = state_of(trainer.model)
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.guard.state.best_step == 6
        states.append(state_of(trainer.model))
    assert_equal(states[1], states[0])
    assert not torch.equal(states[1]["body.weight"], start["body.weight"])


def test_a_training_that_failed_in_its_first_iteration_does_not_start_again(tmp_path):
    """Suppression has changed the model by then."""

    def fail(model, batch):
        raise MemoryError

    torch.manual_seed(0)
    trainer = SophonTrainer(TinyNet(), make_points(1), make_points(2), config(tmp_path), reinforcement_loss=fail)
    with pytest.raises(MemoryError):
        trainer.train()
    with pytest.raises(ValueError, match="has begun to train already"):
        trainer.train()


# ---- Which checkpoints are taken ----


def build(output: Path, model=None, restricted=None, original=None, eval_dataset=None, **changes) -> SophonTrainer:
    torch.manual_seed(0)
    settings = {
        "max_steps": 6,
        "K": 2,
        "per_device_train_batch_size": 8,
        "eval_steps": 2,
        "save_steps": 2,
        "disable_tqdm": True,
        "save_total_limit": None,
        "tolerance": 1.0,
        "use_cpu": True,
        "strategy_space": {"learning_rates": [1e-2, 1e-3], "batch_sizes": [8]},
    }
    return SophonTrainer(
        TinyNet() if model is None else model,
        make_points(1, 40) if restricted is None else restricted,
        make_points(2, 40) if original is None else original,
        SophonConfig(str(output), **{**settings, **changes}),
        eval_dataset=eval_dataset,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, dict]:
    """The folder of a finished run with checkpoints 2, 4 and 6, and its final weights."""
    folder = tmp_path_factory.mktemp("run") / "finished"
    trainer = build(folder)
    trainer.train()
    return folder, state_of(trainer.model)


@pytest.fixture
def interrupted(finished, tmp_path) -> Path:
    """The same folder as it was after iteration 4."""
    folder = tmp_path / "interrupted"
    shutil.copytree(finished[0], folder)
    shutil.rmtree(folder / "checkpoint-6")
    (folder / "model.safetensors").unlink()
    return folder


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


class Steps(TrainerCallback):
    """The iterations that were run."""

    def __init__(self):
        self.begun = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.begun.append(state.global_step)


def resume(trainer: SophonTrainer, checkpoint: str | bool = True) -> list[int]:
    steps = Steps()
    trainer.add_callback(steps)
    trainer.train(resume_from_checkpoint=checkpoint)
    return steps.begun


def test_the_last_checkpoint_is_taken(interrupted, finished):
    trainer = build(interrupted)
    assert resume(trainer) == [4, 5]
    assert_equal(state_of(trainer.model), finished[1])


def test_a_checkpoint_can_be_named(interrupted, finished):
    trainer = build(interrupted)
    assert resume(trainer, str(interrupted / "checkpoint-2")) == [2, 3, 4, 5]
    assert_equal(state_of(trainer.model), finished[1])


def test_a_finished_run_can_be_resumed_and_stays_as_it_is(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "again")
    trainer = build(tmp_path / "again")
    assert resume(trainer) == []
    assert_equal(state_of(trainer.model), finished[1])


@pytest.mark.parametrize(
    "tear",
    [
        lambda checkpoint: truncate(checkpoint / "trainer_state.json"),
        lambda checkpoint: (checkpoint / "trainer_state.json").unlink(),
        lambda checkpoint: (checkpoint / "sophon_state.pt").unlink(),
        lambda checkpoint: [path.unlink() for path in checkpoint.iterdir()],
    ],
    ids=["truncated trainer state", "no trainer state", "no state of ours", "empty folder"],
)
def test_a_torn_checkpoint_is_passed_over(interrupted, finished, tear):
    tear(interrupted / "checkpoint-4")
    trainer = build(interrupted)
    assert resume(trainer) == [2, 3, 4, 5]
    assert_equal(state_of(trainer.model), finished[1])


def test_without_a_complete_checkpoint_it_says_so(tmp_path):
    with pytest.raises(ValueError, match="no complete checkpoint.*train without resuming"):
        build(tmp_path / "new").train(resume_from_checkpoint=True)


def test_where_the_only_checkpoint_is_torn_the_advice_leads_somewhere(interrupted):
    """Neither resuming nor starting afresh may send the user to the other, which then refuses as well."""
    shutil.rmtree(interrupted / "checkpoint-2")
    truncate(interrupted / "checkpoint-4" / "trainer_state.json")
    with pytest.raises(ValueError, match="no complete checkpoint.*(delete|remove|empty|another output_dir)"):
        build(interrupted).train(resume_from_checkpoint=True)


def test_a_folder_of_something_else_is_no_checkpoint(interrupted, tmp_path):
    (tmp_path / "checkpoint-9").mkdir()
    with pytest.raises(ValueError, match="no checkpoint of a SophonTrainer"):
        build(interrupted).train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"alpha": 1e-3}, "alpha"),
        ({"beta": 1e-3}, "beta"),
        ({"K": 3}, "K"),
        ({"N": 2}, "N"),
        ({"l_FTS": 2}, "l_FTS"),
        ({"l_NTR": 2}, "l_NTR"),
        ({"gamma": [0, 1]}, "gamma"),
        ({"tolerance": 0.1}, "tolerance"),
        ({"on_violation": "stop"}, "on_violation"),
        ({"suppression_loss": "kl_from_uniform"}, "suppression_loss"),
        ({"strategy_space": {"learning_rates": [1e-2], "batch_sizes": [8]}}, "strategy_space"),
        ({"seed": 7}, "seed"),
        ({"max_steps": 8}, "max_steps"),
        ({"per_device_train_batch_size": 4}, "per_device_train_batch_size"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps"),
        ({"max_grad_norm": 1.0}, "max_grad_norm"),
        ({"lr_scheduler_type": "linear"}, "lr_scheduler_type"),
        ({"model": TinyNet(batch_norm=False)}, "parameters"),
        ({"restricted": make_points(3, 40)}, "restricted data"),
        ({"original": make_points(3, 40)}, "original data"),
        # These decide the weights too: the guard acts at every evaluation, and the rates follow the warm-up.
        ({"eval_steps": 1}, "eval_steps"),
        ({"warmup_steps": 4}, "warmup_steps"),
        ({"bf16": True}, "mixed_precision"),
        ({"weight_decay": 0.1}, "weight_decay"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_checkpoint_of_another_run_is_refused_by_the_name_of_what_differs(interrupted, changes, name):
    trainer = build(interrupted, **changes)
    with pytest.raises(ValueError, match=f"belongs to another run: its {name} is .* now it is"):
        resume(trainer)


def test_a_checkpoint_that_was_evaluated_on_other_data_is_refused(tmp_path):
    """The guard chooses by this data."""
    first = {"original": make_points(5, 20), "restricted": make_points(6, 20)}
    build(tmp_path, max_steps=2, eval_dataset=first).train()
    trainer = build(tmp_path, max_steps=2, eval_dataset={**first, "original": make_points(7, 20)})
    with pytest.raises(ValueError, match="its eval_original data is"):
        resume(trainer)


def test_a_fresh_run_does_not_start_in_the_folder_of_another(finished, interrupted):
    for folder in (finished[0], interrupted):
        trainer = build(folder)
        start = state_of(trainer.model)
        with pytest.raises(ValueError, match=r"holds another run \(checkpoint-2\).*resume_from_checkpoint=True"):
            trainer.train()
        assert_equal(state_of(trainer.model), start)


def test_a_fresh_run_does_not_overwrite_a_saved_model(finished, tmp_path):
    shutil.copy(finished[0] / "model.safetensors", tmp_path)
    with pytest.raises(ValueError, match=r"holds another run \(model.safetensors\)"):
        build(tmp_path).train()


PERSISTENT = {"num_persistent": 1, "horizon": 8, "eval_strategy": "no", "eval_on_start": False, "max_steps": 5}


@pytest.mark.parametrize("changes", [{"save_strategy": "no"}, {"save_only_model": True}, {"save_steps": 2}])
def test_adversaries_that_live_on_bind_a_run_to_where_it_saves(tmp_path, changes):
    resumable.build(str(tmp_path / "run"), **PERSISTENT).train()
    with pytest.raises(ValueError, match=f"belongs to another run: its {next(iter(changes))}"):
        resumable.build(str(tmp_path / "run"), **{**PERSISTENT, **changes}).train(
            resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4")
        )


def test_what_is_distilled_must_be_the_model_from_before(tmp_path):
    """A half-protected model would be taken for the unprotected one."""
    settings = {"distillation": 1.0, "eval_strategy": "no", "eval_on_start": False, "max_steps": 5}
    checkpoint = str(tmp_path / "run" / "checkpoint-4")
    resumable.build(str(tmp_path / "run"), **settings).train()
    resumable.build(str(tmp_path / "run"), **settings).train(resume_from_checkpoint=checkpoint)
    half = resumable.fitted()
    with torch.no_grad():
        half.head.weight.add_(0.01)
    again = SophonTrainer(
        half, resumable.points(1), resumable.points(2), resumable.build(str(tmp_path / "run"), **settings).args
    )
    with pytest.raises(ValueError, match="belongs to another run: its base model"):
        again.train(resume_from_checkpoint=checkpoint)

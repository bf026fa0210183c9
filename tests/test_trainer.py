"""`SophonTrainer` against Algorithm 1 written out naively, its guard, its logs, and what it saves."""

from __future__ import annotations

import copy
import importlib.util
import logging
import random

import datasets
import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import TinyNet, fitted, make_points
from diffusers import DDPMPipeline, DDPMScheduler
from published import classifier as tiny_resnet
from published import unet as tiny_unet
from torch import nn
from torch.nn import functional as F
from transformers import (
    HfArgumentParser,
    ResNetForImageClassification,
    TrainerCallback,
    ViTImageProcessor,
)

from sophon_hf import DiffusionTask, SophonConfig, SophonTrainer
from sophon_hf.data import Stream, derive_seed
from sophon_hf.finetuning import sample_environment
from sophon_hf.guard import Guard

SPACE = {"learning_rates": [1e-2, 1e-3], "batch_sizes": [8, 16]}


def config(tmp_path, **changes) -> SophonConfig:
    """Three iterations with a small simulation, and no evaluation or saving unless asked for."""
    settings = {
        "max_steps": 3, "K": 3, "strategy_space": SPACE, "per_device_train_batch_size": 16, "eval_strategy": "no",
        "eval_on_start": False, "save_strategy": "no", "disable_tqdm": True, "seed": 3, "use_cpu": True,
    }  # fmt: skip
    return SophonConfig(str(tmp_path / "output"), **{**settings, **changes})


def guarded(tmp_path, **changes) -> SophonConfig:
    """A configuration whose guard looks at every iteration."""
    settings = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "tolerance": 0.05}
    return config(tmp_path, **{**settings, **changes})


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


class Observer(TrainerCallback):
    """Writes down every log entry, and the model and its metrics after every evaluation."""

    def __init__(self):
        self.logs, self.evaluations = [], []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))

    def on_evaluate(self, args, state, control, metrics=None, model=None, optimizer=None, **kwargs):
        seen = {"step": state.global_step, "model": state_of(model), "optimizer": len(optimizer.state), **metrics}
        self.evaluations.append(seen)

    @property
    def steps(self) -> list[dict]:
        return [entry for entry in self.logs if "loss" in entry]


# ---- Algorithm 1 ----


def clip(parameters: list[nn.Parameter], limit: float) -> None:
    if limit:
        nn.utils.clip_grad_norm_(parameters, limit)


def naive_suppression(theta: nn.Module, restricted, task, args: SophonConfig, step: int, loop: int) -> None:
    """Lines 4 to 13: leaves the gradient of L_FTS in theta's `.grad`."""
    for parameter in theta.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for i in range(args.N):
        seed = derive_seed(args.seed, "adversary", step, loop, i)
        phi = args.space.sample(derive_seed(seed, "strategy"))
        environment = sample_environment(restricted, task, phi, seed)
        R, T = environment.fine_tuning.batches(phi.batch_size), environment.evaluation.batches(phi.batch_size)
        vartheta = copy.deepcopy(theta)
        if phi.initialization == "new_head":
            torch.manual_seed(seed)
            vartheta.head = nn.Linear(16, restricted.num_classes)
        optimizer = torch.optim.Adam(vartheta.parameters(), lr=phi.learning_rate)
        for k in range(args.K):
            vartheta.train()
            batch = next(R)
            optimizer.zero_grad()
            F.cross_entropy(vartheta(batch["x"]), batch["labels"]).backward()
            optimizer.step()
            vartheta.eval()
            for module in vartheta.modules():
                if isinstance(module, nn.BatchNorm1d):
                    module.train()  # On the statistics of T.
            gamma = (args.gamma[k] if args.gamma else 1 / args.K) / args.N
            batch = next(T)
            p = vartheta(batch["x"]).softmax(dim=1).gather(1, batch["labels"][:, None])
            optimizer.zero_grad()
            (-gamma * torch.log(1 - p).mean()).backward()
            for (name, parameter), simulated in zip(theta.named_parameters(), vartheta.parameters(), strict=True):
                if not (phi.initialization == "new_head" and name.startswith("head")):
                    parameter.grad += simulated.grad


def naive_sophon(theta: nn.Module, restricted, original, task, args: SophonConfig) -> nn.Module:
    """Algorithm 1, line by line."""
    suppress = torch.optim.Adam(theta.parameters(), lr=args.alpha)
    reinforce = torch.optim.Adam(theta.parameters(), lr=args.beta)
    stream = Stream(original, task, derive_seed(args.seed, "original"))
    batches = stream.batches(args.per_device_train_batch_size)
    for step in range(args.max_steps):
        for loop in range(args.l_FTS):
            naive_suppression(theta, restricted, task, args, step, loop)
            clip(list(theta.parameters()), args.max_grad_norm)
            suppress.step()
        for _ in range(args.l_NTR):
            batch = next(batches)
            theta.train()
            theta.zero_grad()
            F.cross_entropy(theta(batch["x"]), batch["labels"]).backward()
            clip(list(theta.parameters()), args.max_grad_norm)
            reinforce.step()
    return theta


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"l_FTS": 2, "l_NTR": 2, "N": 2},
        {"l_FTS": 2, "l_NTR": 2, "N": 2, "max_grad_norm": 0.05},
        {"l_FTS": 0},
        {"gamma": [0.5, 0.0, 2.0]},
    ],
    ids=["paper", "loops", "clipped", "reinforcement only", "gamma"],
)
@pytest.mark.parametrize("batch_norm", [True, False], ids=["batch norm", "plain"])
def test_it_computes_what_algorithm_1_says(tmp_path, changes, batch_norm):
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    model = TinyNet(batch_norm=batch_norm)
    theta, observer = copy.deepcopy(model), Observer()
    trainer = SophonTrainer(model, make_points(1), make_points(2), config(tmp_path, **changes), callbacks=[observer])
    expected = naive_sophon(
        theta, trainer.domains["restricted"], trainer.domains["original"], trainer.task, trainer.args
    )
    start = state_of(model)
    trainer.train()
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=1e-9, atol=1e-9)
    assert (model.body.weight - start["body.weight"]).abs().max() > 1e-4
    strategies = " ".join(entry.get("strategy", "") for entry in observer.steps)
    assert changes.get("N") != 2 or ("new head" in strategies and "direct" in strategies)
    if "max_grad_norm" in changes:
        assert all(min(entry["suppression_grad_norm"], entry["grad_norm"]) > 0.05 for entry in observer.steps)


@pytest.mark.parametrize("loops", [1, 2])
def test_gradient_accumulation_gives_the_trajectory_of_the_large_batch(tmp_path, loops):
    torch.set_default_dtype(torch.float64)
    results = []
    for size, accumulation in ((16, 1), (8, 2)):
        torch.manual_seed(0)
        model, observer = TinyNet(batch_norm=False), Observer()
        args = config(
            tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
            l_NTR=loops, max_grad_norm=0.5,
        )  # fmt: skip
        SophonTrainer(model, make_points(1), make_points(2), args, callbacks=[observer]).train()
        results.append((model.state_dict(), [(e["loss"], e["L_NTR"], e["L_FTS"]) for e in observer.steps]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-9)
    assert len(results[0][1]) == 3


def test_the_defaults_are_the_papers():
    args = SophonConfig()
    assert (args.alpha, args.beta, args.max_steps, args.K) == (3e-4, 5e-4, 800, 50)
    assert (args.l_FTS, args.l_NTR, args.N) == (1, 1, 1)
    assert args.space.learning_rates == (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
    assert args.space.batch_sizes == (50, 100, 150, 200, 250)
    assert args.space.optimizers == ("adam",)
    assert args.step_weights == [[1 / 50] * 50]
    assert args.max_grad_norm == 0 and args.weight_decay == 0


def test_the_default_losses_are_ice_for_a_classifier(tmp_path):
    states = []
    for name in (None, "inverse_cross_entropy", "kl_from_uniform"):
        torch.manual_seed(0)
        model = TinyNet()
        SophonTrainer(model, make_points(1), make_points(2), config(tmp_path, suppression_loss=name)).train()
        states.append(state_of(model))
    assert_equal(states[0], states[1])
    assert not torch.equal(states[0]["body.weight"], states[2]["body.weight"])


def test_the_arguments_can_be_read_from_a_command_line():
    words = ["--K", "2", "--gamma", "[1, 3]", "--strategy_space", '{"optimizers": ["sgd"]}', "--alpha", "1e-3"]
    (args,) = HfArgumentParser(SophonConfig).parse_args_into_dataclasses(words)
    assert args.step_weights == [[1.0, 3.0]]
    assert args.space.optimizers == ("sgd",)
    assert args.alpha == 1e-3


def test_a_reinforcement_loss_of_ones_own_takes_the_place_of_the_tasks(tmp_path):
    def twice(model, batch):
        return 2 * F.cross_entropy(model(batch["x"]), batch["labels"])

    states = []
    for changes, loss in (({"mu": 2.0}, None), ({}, twice)):
        torch.manual_seed(0)
        model = TinyNet()
        args = config(tmp_path, max_grad_norm=0.5, **changes)
        SophonTrainer(model, make_points(1), make_points(2), args, reinforcement_loss=loss).train()
        states.append(state_of(model))
    assert_equal(*states)


def test_frozen_parameters_stay_as_they_are(tmp_path, model):
    model.body.requires_grad_(False)
    start = state_of(model)
    SophonTrainer(model, make_points(1), make_points(2), config(tmp_path)).train()
    assert torch.equal(model.body.weight, start["body.weight"])
    assert not torch.equal(model.head.weight, start["head.weight"])
    assert not model.body.weight.requires_grad and model.head.weight.requires_grad


# ---- Measuring and logging ----


def test_every_iteration_logs_both_losses_strategy_accuracies_and_norms(tmp_path, model):
    observer = Observer()
    space = {**SPACE, "initializations": ["direct"]}
    args = config(tmp_path, N=2, strategy_space=space)
    SophonTrainer(model, make_points(1), make_points(2), args, callbacks=[observer]).train()
    assert len(observer.steps) == 3
    for entry in observer.steps:
        assert entry["strategy"].count("direct, all, adam") == 2
        assert 0 <= entry["accuracy_before"] <= 1 and 0 <= entry["accuracy_after"] <= 1
        assert all(np.isfinite(entry[name]) and entry[name] > 0 for name in ("L_FTS", "L_NTR", "suppression_grad_norm"))
        assert entry["grad_norm"] > 0
        assert (entry["alpha"], entry["learning_rate"]) == (3e-4, 5e-4)


def test_a_rarer_log_entry_holds_the_mean_of_its_iterations(tmp_path):
    entries = []
    for every in (1, 3):
        torch.manual_seed(0)
        observer = Observer()
        args = config(tmp_path, logging_steps=every)
        SophonTrainer(TinyNet(), make_points(1), make_points(2), args, callbacks=[observer]).train()
        entries.append(observer.steps)
    assert [len(e) for e in entries] == [3, 1]
    for name in ("L_FTS", "L_NTR", "suppression_grad_norm"):
        assert entries[1][0][name] == pytest.approx(np.mean([e[name] for e in entries[0]]), rel=1e-5)


def test_the_logged_first_losses_are_those_of_the_start(tmp_path):
    """L_FTS of a simulation that does not move is L_alpha of theta; L_NTR follows one suppression step of rate ~0."""
    torch.manual_seed(0)
    model, observer = TinyNet(batch_norm=False), Observer()
    start = copy.deepcopy(model)
    space = {"initializations": ["direct"], "learning_rates": [1e-30], "batch_sizes": [1000]}
    args = config(tmp_path, max_steps=1, K=1, alpha=1e-30, strategy_space=space)
    trainer = SophonTrainer(model, make_points(1), make_points(2), args, callbacks=[observer])
    seed = derive_seed(args.seed, "adversary", 0, 0, 0)
    batch = sample_environment(
        trainer.domains["restricted"], trainer.task, args.space.sample(0), seed
    ).evaluation.batch(0, 11)
    trainer.train()
    assert len(trainer.domains["restricted"]) == 108
    p = start(batch["x"]).softmax(dim=1).gather(1, batch["labels"][:, None])
    assert observer.steps[0]["L_FTS"] == pytest.approx((-torch.log(1 - p).mean()).item(), rel=1e-5)
    batch = Stream(trainer.domains["original"], trainer.task, derive_seed(args.seed, "original")).batch(0, 16)
    assert observer.steps[0]["L_NTR"] == pytest.approx(
        F.cross_entropy(start(batch["x"]), batch["labels"]).item(), rel=1e-5
    )


def test_evaluate_measures_both_domains(tmp_path):
    model, held_out = fitted(), {"original": make_points(5), "restricted": make_points(6)}
    trainer = SophonTrainer(model, make_points(1), make_points(2), config(tmp_path), eval_dataset=held_out)
    metrics = trainer.evaluate()
    model.eval()
    for name, points in held_out.items():
        x, y = torch.tensor(points["x"]), torch.tensor(points["label"])
        logits = model(x)
        assert metrics[f"eval_{name}_accuracy"] == pytest.approx(float((logits.argmax(1) == y).float().mean()))
        assert metrics[f"eval_{name}_loss"] == pytest.approx(float(F.cross_entropy(logits, y)), rel=1e-5)
    assert set(metrics) == {f"eval_{n}_{m}" for n in ("original", "restricted") for m in ("accuracy", "loss")}


def test_evaluate_takes_other_data_and_another_prefix(tmp_path, model):
    trainer = SophonTrainer(model, make_points(1), make_points(2), config(tmp_path))
    metrics = trainer.evaluate({"restricted": make_points(9)}, metric_key_prefix="test")
    assert set(metrics) == {"test_restricted_accuracy", "test_restricted_loss"}


def test_evaluate_reads_other_data_from_the_columns_that_were_named(tmp_path, model):
    def two_inputs(seed: int) -> datasets.Dataset:
        points = make_points(seed)
        return points.rename_column("x", "first").add_column("second", points["x"])

    names = {"original": "first", "restricted": "first"}
    trainer = SophonTrainer(model, two_inputs(1), two_inputs(2), config(tmp_path), input_columns=names)
    metrics = trainer.evaluate({"restricted": two_inputs(9)})
    assert metrics == trainer.evaluate({"restricted": make_points(9)})


def test_evaluating_changes_neither_the_model_nor_the_trajectory(tmp_path):
    states = []
    for args in (config(tmp_path), guarded(tmp_path, tolerance=1.0, eval_steps=2)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 3))
        net = Wrapped(model)
        states.append([])
        keep = KeepStates(states[-1])
        SophonTrainer(net, make_points(1), make_points(2), args, callbacks=[keep]).train()
    assert len(states[0]) == 3
    for one, other in zip(*states, strict=True):
        assert_equal(one, other)


class Wrapped(nn.Module):
    """Gives a `Sequential` a named input."""

    def __init__(self, layers: nn.Sequential):
        super().__init__()
        self.layers = layers

    def forward(self, x):
        return self.layers(x)


class KeepStates(TrainerCallback):
    """The weights after every iteration."""

    def __init__(self, states: list):
        self.states = states

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.states.append(state_of(model))


REPORTERS = ["none", *(["tensorboard"] if importlib.util.find_spec("tensorboard") else [])]


@pytest.mark.parametrize("reporter", REPORTERS)
def test_it_reports_to_what_the_trainer_reports_to(tmp_path, model, reporter):
    observer = Observer()
    args = guarded(tmp_path, report_to=reporter)
    SophonTrainer(model, make_points(1), make_points(2), args, callbacks=[observer]).train()
    assert len(observer.evaluations) == 4
    assert any("eval_restricted_simulated_accuracy" in entry for entry in observer.logs)


# ---- The guard ----


def train_guarded(tmp_path, **changes):
    observer = Observer()
    args = guarded(tmp_path, **changes)
    trainer = SophonTrainer(fitted(), make_points(1), make_points(2), args, callbacks=[observer])
    trainer.train()
    return trainer, observer


def test_the_guard_puts_the_last_good_state_back(tmp_path):
    trainer, observer = train_guarded(tmp_path, alpha=0.5, after_rollback="continue")
    start, *later = observer.evaluations
    assert later[0]["eval_original_accuracy"] < start["eval_original_accuracy"] - 0.05
    assert [e["rollbacks"] for e in observer.evaluations] == [0, 1, 2, 3]
    for evaluation in later:
        assert_equal(evaluation["model"], start["model"])
        assert evaluation["optimizer"] == 0, "Adam of the abandoned path must not steer the next steps"
    assert_equal(state_of(trainer.model), start["model"])


def test_the_rollbacks_that_are_counted_are_those_that_were_logged(tmp_path):
    trainer, observer = train_guarded(tmp_path, alpha=0.5, after_rollback="continue")
    assert trainer.guard.state.rollbacks == observer.evaluations[-1]["rollbacks"] == 3


def test_a_rollback_goes_to_the_last_good_state_and_not_to_the_first(tmp_path):
    _, observer = train_guarded(tmp_path, max_steps=8, alpha=0.03)
    first = next(i for i, evaluation in enumerate(observer.evaluations) if evaluation["rollbacks"] > 0)
    start, good, put_back = (observer.evaluations[i]["model"] for i in (0, first - 1, first))
    assert first > 1, "the set-up needs a good state after the start"
    assert_equal(put_back, good)
    assert not torch.equal(put_back["body.weight"], start["body.weight"])


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_after_a_rollback_alpha_is_halved_for_good(tmp_path, schedule):
    trainer, observer = train_guarded(tmp_path, alpha=0.5, max_steps=4, lr_scheduler_type=schedule)
    alphas, betas = ([e[name] for e in observer.steps] for name in ("alpha", "learning_rate"))
    rollbacks = [e["rollbacks"] for e in observer.evaluations][: len(alphas)]
    assert rollbacks[1:3] == [1, 2]
    # The entry of an iteration is written after both schedules have moved on, alpha's being read then.
    left = [1 - step / 4 for step in range(1, 5)] if schedule == "linear" else [1.0] * 4
    assert alphas == pytest.approx([0.5 * share / 2**count for share, count in zip(left, rollbacks, strict=True)])
    assert max(betas) == 5e-4, "beta is not halved"
    # The last rollback follows the last entry, and counts at once.
    assert trainer.suppression_optimizer.param_groups[0]["lr"] == pytest.approx(
        left[-1] * 0.5 / 2**trainer.guard.state.rollbacks
    )


def test_after_a_rollback_it_can_go_on_unchanged(tmp_path):
    _, observer = train_guarded(tmp_path, alpha=0.5, after_rollback="continue")
    assert [entry["alpha"] for entry in observer.steps] == [0.5] * 3


def test_after_a_rollback_it_can_stop(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainer, observer = train_guarded(tmp_path, alpha=0.5, after_rollback="stop")
    assert trainer.state.global_step == 1
    assert_equal(state_of(trainer.model), observer.evaluations[0]["model"])
    assert "NOT protected" in caplog.text


def test_the_guard_catches_weights_that_are_no_numbers(tmp_path):
    model = fitted()
    start = state_of(model)

    def broken(model, batch):
        return model(batch["x"]).sum() * float("inf")

    args = guarded(tmp_path, l_FTS=0)
    SophonTrainer(model, make_points(1), make_points(2), args, reinforcement_loss=broken).train()
    assert_equal(state_of(model), start)


def test_the_best_state_inside_the_tolerance_is_kept_and_saved(tmp_path, monkeypatch):
    # On so few examples every difference is a tie.
    monkeypatch.setattr("sophon_hf.trainer.simulated_error", lambda *_: 0.0)
    trainer, observer = train_guarded(
        tmp_path, max_steps=12, alpha=0.05, after_rollback="continue", save_strategy="steps"
    )
    start = observer.evaluations[0]["eval_original_accuracy"]
    inside = [e for e in observer.evaluations[1:] if e["eval_original_accuracy"] >= start - 0.05]
    best = min(reversed(inside), key=lambda e: e["eval_restricted_simulated_accuracy"])
    assert len({e["eval_restricted_simulated_accuracy"] for e in inside}) > 1
    assert best["step"] < 12, "the set-up needs a best state that is not the last one"
    assert_equal(state_of(trainer.model), best["model"])
    saved = TinyNet()
    safetensors.torch.load_model(saved, tmp_path / "output" / "model.safetensors")
    assert_equal(saved.state_dict(), best["model"])
    assert trainer.evaluate()["eval_original_accuracy"] == best["eval_original_accuracy"]


def test_ties_within_the_error_go_to_the_later_state(model):
    guard = Guard(model, tolerance=1.0, greater_is_better=True, error=0.1)
    chosen = []
    for step, simulated in enumerate((0.9, 0.5, 0.58, 0.45, 0.54, 0.56, float("nan"), 0.6)):
        guard.observe(step, original=1.0, simulated=simulated)
        chosen.append(guard.state.best_step)
    # 0.56 is no tie with 0.45, though it is one with 0.54: ties do not add up.
    assert chosen == [None, 1, 2, 3, 4, 4, 4, 4]


def test_without_evaluation_the_last_state_is_kept(tmp_path, caplog):
    """There is no guard then, so nothing may be put back to the start."""
    model = fitted()
    start, args = state_of(model), SophonConfig(
        output_dir=str(tmp_path / "output"), max_steps=2, K=2, strategy_space=SPACE, eval_strategy="no",
        per_device_train_batch_size=16, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    SophonTrainer(model, make_points(1), make_points(2), args).train()
    assert any(not torch.equal(start[name], value) for name, value in state_of(model).items())
    assert "has not been measured" in caplog.text


def test_a_suppression_gradient_that_is_not_finite_is_dropped_and_counted(tmp_path):
    """Adversaries that overflow teach nothing, so the run must equal one without suppression."""
    states, counts = [], []
    for changes in ({"strategy_space": {"learning_rates": [1e38], "batch_sizes": [8]}}, {"l_FTS": 0}):
        model, observer = fitted(), Observer()
        args = config(tmp_path, **changes)
        SophonTrainer(model, make_points(1), make_points(2), args, callbacks=[observer]).train()
        states.append(state_of(model))
        counts.append([entry["dropped_suppression_gradients"] for entry in observer.steps])
    assert counts == [[1, 2, 3], [0, 0, 0]]
    assert_equal(*states)


# ---- Models of the libraries ----


def pixels(seed: int, column: str, labelled: bool = True, size: int = 8, examples: int = 40) -> datasets.Dataset:
    generator = np.random.default_rng(seed)
    columns = {column: generator.normal(size=(examples, 3, size, size)).astype(np.float32).tolist()}
    return datasets.Dataset.from_dict({**columns, **({"label": [i % 3 for i in range(examples)]} if labelled else {})})


def train_saving(tmp_path, model, column: str, **kwargs) -> SophonTrainer:
    args = guarded(tmp_path, tolerance=10.0, save_strategy="steps", save_steps=2)
    labelled = column == "pixel_values"
    trainer = SophonTrainer(model, pixels(1, column, labelled), pixels(2, column, labelled), args, **kwargs)
    trainer.train()
    return trainer


def test_a_saved_classifier_loads_by_the_stock_from_pretrained(tmp_path):
    model = tiny_resnet()
    start = state_of(model)
    train_saving(tmp_path, model, "pixel_values")
    loaded = ResNetForImageClassification.from_pretrained(tmp_path / "output")
    assert_equal(loaded.state_dict(), model.state_dict())
    assert loaded.config.num_labels == 3
    assert not torch.equal(model.classifier[1].weight, start["classifier.1.weight"])


def test_a_saved_unet_is_a_whole_pipeline_that_generates(tmp_path):
    model = tiny_unet()
    start = state_of(model)
    trainer = train_saving(tmp_path, model, "sample", task=DiffusionTask(DDPMScheduler(num_train_timesteps=20)))
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "output")
    assert_equal(pipeline.unet.state_dict(), model.state_dict())
    assert pipeline.scheduler.config.num_train_timesteps == 20
    assert pipeline(num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 3)
    assert not torch.equal(model.conv_out.weight, start["conv_out.weight"])
    steps = [entry for entry in trainer.state.log_history if "L_FTS" in entry]
    assert len(steps) == 3 and all(entry["mse_after"] > 0 for entry in steps)


@pytest.mark.parametrize(("make", "column"), [(tiny_resnet, "pixel_values"), (tiny_unet, "sample")])
def test_the_processing_class_is_saved_with_the_model(tmp_path, make, column):
    train_saving(tmp_path, make(), column, processing_class=ViTImageProcessor(size={"height": 8, "width": 8}))
    assert ViTImageProcessor.from_pretrained(tmp_path / "output").size["height"] == 8


def test_two_diffusion_models_are_measured_with_the_same_noise(tmp_path):
    """A model that predicts nothing errs by the noise itself: whichever one it is, the MSE is the noise's mean square."""
    scores = []
    for bias in (0.0, 1.0):
        model = tiny_unet()
        nn.init.zeros_(model.conv_out.weight)
        nn.init.constant_(model.conv_out.bias, bias)
        task = DiffusionTask(DDPMScheduler(num_train_timesteps=20))
        held_out = {name: pixels(7, "sample", labelled=False) for name in ("original", "restricted")}
        trainer = SophonTrainer(
            model, pixels(1, "sample", labelled=False), pixels(2, "sample", labelled=False),
            config(tmp_path, per_device_eval_batch_size=7 if bias else 16), task=task, eval_dataset=held_out,
        )  # fmt: skip
        scores.append(trainer.evaluate())
    domain = trainer.domains["eval_original"]
    noise = task.collate(domain.rows(torch.arange(40)), list(range(40)))["target"]
    assert scores[0]["eval_original_mse"] == pytest.approx(float(noise.square().mean()), rel=1e-5)
    assert scores[1]["eval_original_mse"] == pytest.approx(float((noise - 1).square().mean()), rel=1e-5)
    assert scores[0]["eval_restricted_mse"] == scores[0]["eval_original_mse"]


def test_a_diffusion_guard_takes_the_tolerance_as_a_share_of_the_mse(tmp_path):
    observer = Observer()
    args = guarded(tmp_path, max_steps=1, alpha=0.1, after_rollback="stop", tolerance=0.1)
    data = [pixels(seed, "sample", labelled=False) for seed in (1, 2)]
    SophonTrainer(tiny_unet(), *data, args, callbacks=[observer]).train()
    start, after = observer.evaluations
    assert after["eval_original_mse"] > 1.1 * start["eval_original_mse"]
    assert after["rollbacks"] == 1
    assert_equal(after["model"], start["model"])


def test_the_model_can_be_a_folder(tmp_path):
    tiny_resnet().save_pretrained(tmp_path / "classifier")
    tiny_unet().save_pretrained(tmp_path / "unet")
    args = config(tmp_path, max_steps=1)
    classifier = SophonTrainer(
        str(tmp_path / "classifier"), pixels(1, "pixel_values"), pixels(2, "pixel_values"), args
    ).model
    unet = SophonTrainer(
        tmp_path / "unet", pixels(1, "sample", labelled=False), pixels(2, "sample", labelled=False), args
    ).model
    assert_equal(classifier.state_dict(), tiny_resnet().state_dict())
    assert_equal(unet.state_dict(), tiny_unet().state_dict())


def test_a_restricted_domain_with_more_classes_is_met_with_new_heads_only(tmp_path, model, caplog):
    observer = Observer()
    with caplog.at_level(logging.WARNING):
        trainer = SophonTrainer(
            model, make_points(1, num_classes=5), make_points(2), config(tmp_path, N=2), callbacks=[observer]
        )
    assert "5 classes and the model's head 3 outputs" in caplog.text
    trainer.train()
    strategies = " ".join(entry["strategy"] for entry in observer.steps)
    assert strategies.count("new head") == 6 and "direct" not in strategies
    assert model.head.out_features == 3


def test_a_restricted_domain_with_more_classes_can_be_evaluated(tmp_path, model):
    """Its labels have no output, so every prediction of them is wrong; that is an accuracy and no error."""
    restricted = make_points(1, num_classes=5)
    args = guarded(tmp_path, max_steps=1)
    held_out = {"original": make_points(3), "restricted": restricted}
    trainer = SophonTrainer(model, restricted, make_points(2), args, eval_dataset=held_out)
    metrics = trainer.evaluate()
    x, y = torch.tensor(restricted["x"]), torch.tensor(restricted["label"])
    assert metrics["eval_restricted_accuracy"] == pytest.approx(float((model.eval()(x).argmax(1) == y).float().mean()))
    trainer.train()


def test_bfloat16_runs_on_the_cpu(tmp_path):
    states = []
    for bf16 in (False, True):
        torch.manual_seed(0)
        model, observer = TinyNet(), Observer()
        args = guarded(tmp_path, bf16=bf16)
        SophonTrainer(model, make_points(1), make_points(2), args, callbacks=[observer]).train()
        states.append(state_of(model))
        assert len(observer.steps) == 3 and observer.steps[-1]["dropped_suppression_gradients"] == 0
    assert all(tensor.isfinite().all() and tensor.dtype != torch.bfloat16 for tensor in states[1].values())
    assert not torch.equal(states[0]["body.weight"], states[1]["body.weight"]), "bf16 must reach the computation"


def test_the_seed_alone_decides(tmp_path):
    states = []
    for seed, noise in ((3, 1), (3, 2), (4, 1)):
        torch.manual_seed(0)
        model = TinyNet()
        trainer = SophonTrainer(model, make_points(1), make_points(2), config(tmp_path, seed=seed))
        torch.manual_seed(noise), np.random.seed(noise), random.seed(noise)
        trainer.train()
        states.append(state_of(model))
    assert_equal(states[0], states[1])
    assert not torch.equal(states[0]["body.weight"], states[2]["body.weight"])

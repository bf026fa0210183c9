"""`SophonTrainer` against Algorithm 1 written out naively, what it measures, and its logs."""

from __future__ import annotations

import copy
import importlib.util
import random
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from naive_suppression import Environment, batches_without_repetition
from observed import SPACE, Observer, assert_equal, config, guarded, state_of
from points import TinyNet, fitted, make_points
from torch import nn
from torch.nn import functional as F
from transformers import HfArgumentParser, TrainerCallback

from sophon_hf import SophonConfig, SophonTrainer
from sophon_hf.data.batches import Stream
from sophon_hf.utils import derive_seed

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
        environment = Environment(restricted, task, phi, seed)
        R = environment.fine_tuning.batches(phi.batch_size)
        T = batches_without_repetition(environment.evaluation, phi.batch_size)
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
    stream = Stream(original, task.collate, derive_seed(args.seed, "original"))
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
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            l_NTR=loops,
            max_grad_norm=0.5,
        )
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
    batch = Environment(trainer.domains["restricted"], trainer.task, args.space.sample(0), seed).evaluation.batch(0, 11)
    trainer.train()
    assert len(trainer.domains["restricted"]) == 108
    p = start(batch["x"]).softmax(dim=1).gather(1, batch["labels"][:, None])
    assert observer.steps[0]["L_FTS"] == pytest.approx((-torch.log(1 - p).mean()).item(), rel=1e-5)
    batch = Stream(trainer.domains["original"], trainer.task.collate, derive_seed(args.seed, "original")).batch(0, 16)
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


def test_every_key_of_the_log_is_explained(tmp_path):
    trainer = SophonTrainer(TinyNet(), make_points(1), make_points(2), guarded(tmp_path, max_steps=2, logging_steps=1))
    trainer.train()
    explained = (Path(__file__).parents[2] / "docs" / "algorithm.md").read_text(encoding="utf-8")
    logged = {key for entry in trainer.state.log_history for key in entry}
    assert {"alpha", "rollbacks", "accuracy_after", "train_loss"} <= logged
    assert [key for key in sorted(logged) if f"`{key}`" not in explained] == []

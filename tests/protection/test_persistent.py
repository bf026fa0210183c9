"""Simulated adversaries that live on over the iterations, and those that warm up on original data."""

from __future__ import annotations

import copy

import pytest
import torch
from naive_suppression import Environment, assert_gradient, evaluation_mode, make_environment, make_net, start, suppress
from points import make_points
from protected import HEAD_ONLY, build
from torch.nn import functional as F
from transformers import TrainerCallback

from sophon_hf import ClassificationTask, FineTuningStrategy
from sophon_hf.data.domain import build_domain
from sophon_hf.models.structure import ModelStructure
from sophon_hf.protection.probes import Probes, leave_one_out_logits
from sophon_hf.protection.suppression import Suppression
from sophon_hf.tasks.losses import inverse_cross_entropy

# ---- Adversaries that live on ----


@pytest.mark.parametrize("initialization", ("direct", "new_head"))
def test_two_visits_are_one_long_simulation_where_theta_does_not_move(float64_domain, initialization):
    model = make_net()
    model.dropout.p = 0.0  # Each visit seeds its own random state.
    fields = {"learning_rate": 0.01, "optimizer": "momentum", "initialization": initialization, "batch_size": 5}
    environment = make_environment(float64_domain, 1, **fields)
    suppression = Suppression(model, ClassificationTask(), ModelStructure("head", ()), inverse_cross_entropy)
    whole = suppression(start([environment], [[0.25] * 4]), [[0.25] * 4])
    adversary = environment.adversary(4)
    first, second = (suppression([adversary], [[0.25] * 2]) for _ in range(2))
    assert adversary.finished
    assert_gradient(
        whole, (float(first.loss + second.loss), {n: g + second.gradient[n] for n, g in first.gradient.items()})
    )


def test_it_goes_on_from_where_theta_is_then_with_its_own_head_and_optimizer(float64_domain):
    model = make_net(noisy=False)
    environment = make_environment(
        float64_domain, 1, learning_rate=0.1, optimizer="momentum", initialization="new_head", batch_size=5
    )
    suppression = Suppression(model, ClassificationTask(), ModelStructure("head", ()), inverse_cross_entropy)
    adversary = environment.adversary(2)
    reference = copy.deepcopy(model)
    suppression([adversary], [[1.0]])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3)
    result = suppression([adversary], [[1.0]])

    torch.manual_seed(environment.seed)
    reference.head.reset_parameters()
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9)
    batches = environment.fine_tuning.batches(5)
    for visit in range(2):
        if visit:
            with torch.no_grad():  # Only what it took over from theta moves with theta.
                for parameter in reference.body.parameters():
                    parameter.add_(0.3)
        batch = next(batches)
        reference.zero_grad()
        F.cross_entropy(reference(batch["x"]), batch["labels"]).backward()
        optimizer.step()
    held_out = environment.evaluation.batch(5, 5)
    reference.zero_grad()
    loss = inverse_cross_entropy(reference(held_out["x"]), held_out["labels"])
    loss.backward()
    for name, parameter in reference.body.named_parameters():
        torch.testing.assert_close(result.gradient[f"body.{name}"], parameter.grad)
    assert not result.gradient["head.weight"].any()
    assert float(result.loss) == pytest.approx(loss.item())


def test_theta_is_as_before_after_every_visit(float64_domain):
    model = make_net()
    before, head = copy.deepcopy(model.state_dict()), model.head
    adversary = make_environment(float64_domain, 1, initialization="new_head", learning_rate=0.1).adversary(6)
    for _ in range(3):
        suppress(model, [adversary], [[1.0, 1.0]], structure=ModelStructure("head", ()))
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
        assert model.head is head


def test_they_take_turns_and_the_old_are_replaced(tmp_path):
    trainer = build(tmp_path, num_persistent=2, horizon=4)
    seen = []
    for step in range(8):
        [adversary] = trainer.adversaries.draw(step, loop=0)
        seen.append((adversary.age, adversary.updates))
        suppress(trainer.model, [adversary], [[1.0, 1.0]], structure=HEAD_ONLY)
    assert [age for age, _ in seen] == [0, 0, 0, 2, 2, 0, 0, 2]
    assert [updates for _, updates in seen] == [2, 4, 4, 4, 4, 4, 4, 4]


class StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def test_a_resumed_run_with_persistent_adversaries_ends_as_an_uninterrupted_one(tmp_path):
    states = []
    for resumed in (False, True):
        folder = tmp_path / str(resumed)
        if resumed:
            stopped = build(folder, num_persistent=2, horizon=8)
            stopped.add_callback(StopAt(3))
            stopped.train()
            (folder / "model.safetensors").unlink()
        trainer = build(folder, num_persistent=2, horizon=8)
        trainer.train(resume_from_checkpoint=resumed or None)
        states.append(trainer.model.state_dict())
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)


# ---- Adversaries that warm up on original data ----


def warming_up(domain, seed: int, **fields):
    original = build_domain(make_points(2, 100), ClassificationTask().inputs(make_net()))
    strategy = FineTuningStrategy(preparation="warm_up", optimizer="momentum", batch_size=5, **fields)
    return Environment(domain, ClassificationTask(), strategy, seed, original)


def warm_up_and_fine_tune(model, environment, updates: int, learning_rate: float, head_seed: int = 0):
    """As one would write it: half of the updates on 50 original examples each, then a new head on restricted ones.

    Yields the number of each update, while the model stands there.
    """
    for stage, (stream, size) in enumerate(((environment.warm_up, 50), (environment.fine_tuning, 5))):
        if stage:
            torch.manual_seed(head_seed)
            model.head.reset_parameters()
        optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9)
        for step, batch in zip(range(updates // 2), stream.batches(size)):
            model.zero_grad()
            F.cross_entropy(model(batch["x"]), batch["labels"]).backward()
            optimizer.step()
            yield stage * (updates // 2) + step + 1


@pytest.mark.parametrize("visits", (1, 4))
def test_an_adversary_warms_up_on_original_data_before_its_new_head(float64_domain, visits):
    model = make_net(noisy=False)
    environment = warming_up(float64_domain, 1, initialization="new_head", learning_rate=0.1)
    gamma = [0.1, 0.2, 0.3, 0.4]
    if visits == 1:
        result = suppress(model, [environment], [gamma], structure=HEAD_ONLY)
    else:
        adversary = environment.adversary(4)
        parts = [suppress(model, [adversary], [[weight]], structure=HEAD_ONLY) for weight in gamma]
        assert adversary.finished
        result = parts[-1]
        result.loss = sum(part.loss for part in parts)
        for name, gradient in result.gradient.items():
            gradient += sum(part.gradient[name] for part in parts[:-1])

    reference, total = copy.deepcopy(model), 0.0
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    head_seed = environment.seed + (0 if visits == 1 else 2)  # Each visit seeds its own random state by its age.
    for step in warm_up_and_fine_tune(reference, environment, 4, 0.1, head_seed):
        if step > 2:  # The head it warms up with says nothing of the one it attacks with.
            batch = environment.evaluation.batch((step - 1) * 5, 5)
            reference.zero_grad()
            loss = gamma[step - 1] * inverse_cross_entropy(reference(batch["x"]), batch["labels"])
            loss.backward()
            total += loss.item()
            for name, parameter in reference.body.named_parameters():
                expected[f"body.{name}"] += parameter.grad
    assert_gradient(result, (total, expected))


def test_an_adversary_with_no_step_to_evaluate_is_born_at_its_next_visit(float64_domain):
    model = make_net()
    environments = [make_environment(float64_domain, seed, learning_rate=0.1) for seed in (1, 2)]
    adversaries = [environment.adversary(4) for environment in environments]
    suppress(model, adversaries, [[0.0, 0.0], [1.0, 1.0]], structure=HEAD_ONLY)
    assert [adversary.age for adversary in adversaries] == [0, 2]
    suppress(model, adversaries, [[1.0, 1.0], [1.0, 1.0]], structure=HEAD_ONLY)
    assert [adversary.age for adversary in adversaries] == [2, 4]


def test_probes_see_the_features_of_an_adversary_who_still_warms_up(float64_domain):
    model = make_net(noisy=False)
    environment = warming_up(float64_domain, 1, learning_rate=0.1)
    probes = Probes(model, HEAD_ONLY, 1, 3, inverse_cross_entropy)
    result = suppress(model, [environment], [[0.0, 1.0, 0.0, 0.0]], structure=HEAD_ONLY, probes=probes)

    reference = copy.deepcopy(model)
    running = warm_up_and_fine_tune(reference, environment, 4, 0.1)
    assert [next(running), next(running)] == [1, 2]
    batch = environment.evaluation.batch(10, 10)
    evaluation_mode(reference).zero_grad()
    features = torch.tanh(reference.body(batch["x"]))
    loss = inverse_cross_entropy(leave_one_out_logits(features, batch["labels"], 3), batch["labels"])
    loss.backward()
    expected = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in reference.named_parameters()}
    assert_gradient(result, (loss.item(), expected))
    assert not result.adversaries[0].after


def test_a_trainer_whose_adversaries_warm_up_protects_and_resumes(tmp_path):
    space = {"preparations": ["warm_up"], "learning_rates": [1e-2], "batch_sizes": [8], "initializations": ["new_head"]}
    changes = {"num_persistent": 2, "horizon": 4, "probe_depths": 1, "strategy_space": space}
    whole = build(tmp_path / "whole", **changes)
    assert {whole.space.sample(seed).preparation for seed in range(9)} == {"warm_up"}
    before = copy.deepcopy(whole.model.state_dict())
    whole.train()
    assert whole.guard.state.applied == 6
    assert not torch.equal(whole.model.state_dict()["body.weight"], before["body.weight"])
    stopped = build(tmp_path / "resumed", **changes)
    stopped.add_callback(StopAt(3))
    stopped.train()
    (tmp_path / "resumed" / "model.safetensors").unlink()
    resumed = build(tmp_path / "resumed", **changes)
    resumed.train(resume_from_checkpoint=True)
    torch.testing.assert_close(resumed.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)

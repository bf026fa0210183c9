"""What goes beyond Algorithm 1, beside probes: adversaries that live on, distillation, kept norms, and presets."""

from __future__ import annotations

import copy
from pathlib import Path

import datasets
import pytest
import torch
from conftest import TinyNet, fitted, make_points
from naive_suppression import assert_gradient, evaluation_mode, make_environment, make_net, suppress
from torch import nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
    TrainerCallback,
    ViTConfig,
    ViTForImageClassification,
)

from sophon_hf import ClassificationTask, FineTuningStrategy, SophonConfig, SophonTrainer
from sophon_hf.attacks.adaptive import rescale_weights
from sophon_hf.claim import Claim
from sophon_hf.commands.protect import read_arguments
from sophon_hf.config import PRESETS
from sophon_hf.data import build_domain
from sophon_hf.finetuning import PersistentAdversary, sample_environment
from sophon_hf.losses import inverse_cross_entropy
from sophon_hf.probes import Probes, leave_one_out_logits
from sophon_hf.reinforcement import mix_second_half
from sophon_hf.suppression import Suppression
from sophon_hf.tasks.anatomy import Anatomy
from sophon_hf.tasks.scales import fresh_norms, scale_invariant_layers, set_norm

HEAD_ONLY = Anatomy("head", ("body",), 3)


def build(output: Path, model: nn.Module | None = None, **changes) -> SophonTrainer:
    torch.manual_seed(0)
    settings = {
        "max_steps": 6, "K": 2, "per_device_train_batch_size": 8, "eval_steps": 2, "save_steps": 3, "disable_tqdm": True,
        "tolerance": 1.0, "use_cpu": True, "strategy_space": {"learning_rates": [1e-2, 1e-3], "batch_sizes": [8]},
    }  # fmt: skip
    config = SophonConfig(str(output), **{**settings, **changes})
    return SophonTrainer(TinyNet() if model is None else model, make_points(1), make_points(2), config)


def small_resnet(blocks: int = 2) -> nn.Module:
    config = ResNetConfig(
        num_channels=3,
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[blocks, blocks],
        layer_type="basic",
        num_labels=3,
    )
    return ResNetForImageClassification(config)


def small_vit() -> nn.Module:
    config = ViTConfig(
        hidden_size=12, num_hidden_layers=4, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8,
        num_labels=3,
    )  # fmt: skip
    return ViTForImageClassification(config)


# ---- Adversaries that live on ----


@pytest.mark.parametrize("initialization", ("direct", "new_head"))
def test_two_visits_are_one_long_simulation_where_theta_does_not_move(float64_domain, initialization):
    model = make_net()
    model.dropout.p = 0.0  # Each visit seeds its own random state.
    fields = {"learning_rate": 0.01, "optimizer": "momentum", "initialization": initialization, "batch_size": 5}
    environment = make_environment(float64_domain, 1, **fields)
    suppression = Suppression(model, ClassificationTask(), Anatomy("head", ()), inverse_cross_entropy)
    whole = suppression([environment], [[0.25] * 4])
    adversary = PersistentAdversary(environment, 4)
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
    suppression = Suppression(model, ClassificationTask(), Anatomy("head", ()), inverse_cross_entropy)
    adversary = PersistentAdversary(environment, 2)
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
    adversary = PersistentAdversary(
        make_environment(float64_domain, 1, initialization="new_head", learning_rate=0.1), 6
    )
    for _ in range(3):
        suppress(model, [adversary], [[1.0, 1.0]], anatomy=Anatomy("head", ()))
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
        assert model.head is head


class Ages:
    """What the trainer lets live on."""

    def __init__(self, trainer: SophonTrainer):
        self.seen, simulate = [], trainer.suppression.simulate

        def watch(adversary, *rest):
            self.seen.append((id(adversary), adversary.age, adversary.updates))
            return simulate(adversary, *rest)

        trainer.suppression.simulate = watch


def test_the_trainer_takes_them_in_turn_and_replaces_the_old(tmp_path):
    trainer = build(tmp_path, persistent=2, horizon=4, max_steps=8, save_strategy="no")
    ages = Ages(trainer)
    trainer.train()
    assert [age for _, age, _ in ages.seen] == [0, 0, 0, 2, 2, 0, 0, 2]
    assert [updates for _, _, updates in ages.seen] == [2, 4, 4, 4, 4, 4, 4, 4]


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
            stopped = build(folder, persistent=2, horizon=8)
            stopped.add_callback(StopAt(3))
            stopped.train()
            (folder / "model.safetensors").unlink()
        trainer = build(folder, persistent=2, horizon=8)
        trainer.train(resume_from_checkpoint=resumed or None)
        states.append(trainer.model.state_dict())
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"persistent": 2, "second_order": True}, "leave `persistent` 0"),
        ({"second_order": True, "strategy_space": {"preparations": ["warm_up"]}}, "through a warm-up"),
        ({"strategy_space": {"preparations": [None, "warm_up"]}}, "there are none: set `probes`"),
        ({**PRESETS["representation"], "save_steps": 20}, "save_steps is 20: persistent .* after 10 updates"),
        ({"persistent": 1, "N": 2}, "persistent is 1, but an iteration simulates N x l_FTS = 2"),
        ({"persistent": -1}, "persistent is -1"),
        ({"horizon": 0}, "horizon is 0"),
        ({"probes": 1.5}, "probes is 1.5"),
        ({"distillation": -1.0}, "distillation is -1.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SophonConfig(**fields)


# ---- Adversaries that warm up on original data ----


def warming_up(domain, seed: int, **fields):
    original = build_domain(make_points(2, 100), ClassificationTask().inputs(make_net()))
    strategy = FineTuningStrategy(preparation="warm_up", optimizer="momentum", batch_size=5, **fields)
    return sample_environment(domain, ClassificationTask(), strategy, seed, original)


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
        result = suppress(model, [environment], [gamma], anatomy=HEAD_ONLY)
    else:
        adversary = PersistentAdversary(environment, 4)
        parts = [suppress(model, [adversary], [[weight]], anatomy=HEAD_ONLY) for weight in gamma]
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
    adversaries = [PersistentAdversary(environment, 4) for environment in environments]
    suppress(model, adversaries, [[0.0, 0.0], [1.0, 1.0]], anatomy=HEAD_ONLY)
    assert [adversary.age for adversary in adversaries] == [0, 2]
    suppress(model, adversaries, [[1.0, 1.0], [1.0, 1.0]], anatomy=HEAD_ONLY)
    assert [adversary.age for adversary in adversaries] == [2, 4]


def test_probes_see_the_features_of_an_adversary_who_still_warms_up(float64_domain):
    model = make_net(noisy=False)
    environment = warming_up(float64_domain, 1, learning_rate=0.1)
    probes = Probes(model, HEAD_ONLY, 1, 3, inverse_cross_entropy)
    result = suppress(model, [environment], [[0.0, 1.0, 0.0, 0.0]], anatomy=HEAD_ONLY, probes=probes)

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
    changes = {"persistent": 2, "horizon": 4, "probes": 1, "strategy_space": space}
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


# ---- Distillation and norms ----


def test_distillation_adds_the_divergence_from_the_unprotected_model(tmp_path):
    trainer = build(tmp_path, distillation=2.0)
    unprotected = copy.deepcopy(trainer.model).eval()
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(3.0)
    trainer.model.eval()
    batch = {"x": torch.randn(10, 6), "labels": torch.arange(10) % 3}
    ours, theirs = trainer.model(batch["x"]).softmax(1), unprotected(batch["x"]).softmax(1)
    divergence = (theirs * (theirs.log() - ours.log())).sum(1).mean()
    expected = -ours.log()[torch.arange(10), batch["labels"]].mean() + 2 * divergence
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), expected)
    assert divergence > 0.01


def test_mixtures_are_made_of_the_second_half_and_count_in_the_distance_only(tmp_path):
    trainer = build(tmp_path, distillation=2.0, mixing=True)
    with torch.no_grad():
        trainer.model.head.weight.mul_(3.0)
    trainer.model.eval()
    batch = {"x": torch.randn(9, 6), "labels": torch.arange(9) % 3}
    torch.manual_seed(3)
    mixed, labelled = mix_second_half(batch)
    assert labelled == 5
    torch.testing.assert_close(mixed["x"][:5], batch["x"][:5], rtol=0, atol=0)
    for index in range(4):
        x, other = batch["x"][5 + index], batch["x"][index]
        share = ((mixed["x"][5 + index] - x) / (other - x)).mean()
        assert 0 <= float(share) <= 1
        torch.testing.assert_close(mixed["x"][5 + index], x + share * (other - x))
    ours, theirs = (m(mixed["x"]).softmax(1) for m in (trainer.model, trainer.distillation.unprotected))
    divergence = (theirs * (theirs.log() - ours.log())).sum(1).mean()
    expected = -ours.log()[torch.arange(5), batch["labels"][:5]].mean() + 2 * divergence
    torch.manual_seed(3)
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), expected)


def test_images_are_mirrored_before_they_are_mixed():
    images = torch.rand(64, 3, 4, 4)
    batch = {
        "pixel_values": images,
        "labels": torch.zeros(64, dtype=torch.int64),
        "mask": torch.ones(64, dtype=torch.int64),
    }
    mixed, labelled = mix_second_half(batch)
    assert labelled == 32
    assert torch.equal(mixed["mask"], batch["mask"])
    seen = set()
    for index in range(32):
        for own, other in ((o, p) for o in (0, 1) for p in (0, 1)):
            x, y = images[32 + index], images[index]
            x, y = x.flip(-1) if own else x, y.flip(-1) if other else y
            share = (mixed["pixel_values"][32 + index] - x) / (y - x)
            if share.std() < 1e-2 * share.mean().abs().clamp_min(1e-2):
                seen.add((own, other))
    assert seen == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_a_reinforcement_loss_of_ones_own_does_not_go_with_distillation(tmp_path):
    args = SophonConfig(str(tmp_path), distillation=1.0, use_cpu=True)
    with pytest.raises(ValueError, match="takes the place of.*distillation"):
        SophonTrainer(TinyNet(), make_points(1), make_points(2), args, reinforcement_loss=lambda *_: 0)


def test_mixing_needs_distillation_and_continuous_inputs(tmp_path, caplog):
    with pytest.raises(ValueError, match="set `distillation` too"):
        SophonConfig(mixing=True)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, num_labels=2
    )
    tokens = datasets.Dataset.from_dict(
        {"input_ids": [[i % 20, 3, 4] for i in range(40)], "label": [i % 2 for i in range(40)]},
        features=datasets.Features(
            {"input_ids": datasets.List(datasets.Value("int64")), "label": datasets.ClassLabel(names=["a", "b"])}
        ),
    )
    args = SophonConfig(str(tmp_path), distillation=1.0, mixing=True, use_cpu=True)
    trainer = SophonTrainer(BertForSequenceClassification(config), tokens, tokens, args)
    assert "'input_ids' holds torch.int64: left out" in caplog.text
    assert not trainer.args.mixing and not trainer.distillation.mixing


def test_the_unprotected_model_stays_as_it_was(tmp_path):
    trainer = build(tmp_path, distillation=1.0, alpha=0.1)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    torch.testing.assert_close(trainer.distillation.unprotected.state_dict(), before, rtol=0, atol=0)
    assert not torch.equal(trainer.model.body.weight, before["body.weight"])


def test_norms_are_those_of_a_fresh_initialisation_where_scale_does_not_matter(tmp_path):
    ratios = {}
    for keep in (False, True):
        trainer = build(tmp_path / str(keep), alpha=0.1, keep_norms=keep)
        with torch.no_grad():
            trainer.model.body.weight.mul_(8.0)
        fresh = fresh_norms([trainer.model.body])[trainer.model.body]
        trainer.train()
        ratios[keep] = float(trainer.model.body.weight.detach().norm() / fresh)
    assert ratios[True] == pytest.approx(1.0, abs=1e-5)
    assert ratios[False] > 2


def test_a_model_that_could_not_be_protected_is_what_it_was_with_its_own_norms(tmp_path):
    model = fitted()
    with torch.no_grad():
        model.body.weight.mul_(8.0)
    trainer = build(tmp_path, model, alpha=0.9, beta=1e-6, tolerance=0.0, keep_norms=True, after_rollback="no_rollback")
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    assert trainer.guard.state.best_step is None
    torch.testing.assert_close(trainer.model.state_dict(), before, rtol=0, atol=0)


def test_a_fresh_norm_is_that_of_a_newly_made_layer_and_draws_nothing():
    layer = nn.Conv2d(3, 64, 3)
    with torch.no_grad():
        layer.weight.mul_(8.0)
    state = torch.get_rng_state()
    fresh = float(fresh_norms([layer])[layer])
    assert torch.equal(torch.get_rng_state(), state)
    assert fresh == pytest.approx(float(nn.Conv2d(3, 64, 3).weight.detach().norm()), rel=0.1)


def test_a_protected_model_gains_an_adversary_nothing_by_rescaling(tmp_path):
    trainer = build(tmp_path, alpha=0.1, keep_norms=True)
    trainer.train()
    before = trainer.model.body.weight.detach().clone()
    rescale_weights(trainer.model, trainer.task, trainer.domains["restricted"])
    torch.testing.assert_close(trainer.model.body.weight.detach(), before)


def test_setting_a_norm_does_not_change_the_function():
    model = small_resnet().eval()
    x = torch.randn(4, 3, 16, 16)
    layers = scale_invariant_layers(model, lambda: model(x).logits)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert set(layers) == set(convolutions)
    before = model(x).logits
    for layer, normalisations in layers.items():
        set_norm(layer, normalisations, 3.0)
        assert float(layer.weight.detach().norm()) == pytest.approx(3.0, rel=1e-5)
    assert (model(x).logits - before).norm() < 0.01 * before.norm()


def test_a_transformer_without_such_layers_is_left_alone():
    model = small_vit()
    x = torch.randn(2, 3, 16, 16)
    state = copy.deepcopy(model.state_dict())
    scale_invariant_layers(model, lambda: model(x).logits)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


# ---- Presets ----


def test_the_preset_of_the_paper_is_the_plain_config():
    assert SophonConfig.preset("paper", output_dir="x").to_dict() == SophonConfig(output_dir="x").to_dict()


def test_what_is_given_wins_over_the_preset():
    config = SophonConfig.preset("representation", alpha=0.01)
    assert config.alpha == 0.01
    assert config.probes == PRESETS["representation"]["probes"] > 0


def test_the_claim_and_the_card_say_what_goes_beyond_the_paper(tmp_path):
    for changes, name in (({}, "SOPHON, Algorithm 1"), ({"keep_norms": True}, "SOPHON, Algorithm 1 with keep norms")):
        trainer = build(tmp_path / name, max_steps=1, **changes)
        trainer.train()
        assert Claim.read(tmp_path / name).method.name == name
        assert f"iterations of {name}, adversaries" in " ".join((tmp_path / name / "README.md").read_text().split())


def test_an_unknown_preset_names_the_closest():
    with pytest.raises(ValueError, match="preset is 'representations'.*representation"):
        SophonConfig.preset("representations")


def test_the_command_line_takes_a_preset_and_flags_win_over_it(tmp_path):
    arguments = ["--model", "m", "--original", "o", "--restricted", "r"]
    config = read_arguments([*arguments, "--preset", "representation", "--alpha", "0.01"])[1]
    assert (config.alpha, config.keep_norms) == (0.01, True)
    assert config.space.to_dict()["reinitialized_blocks"] == [0, 1, 1]
    (tmp_path / "c.yaml").write_text("preset: representation\nbeta: 0.02\n")
    config = read_arguments([str(tmp_path / "c.yaml"), *arguments])[1]
    assert (config.beta, config.K) == (0.02, PRESETS["representation"]["K"])
    with pytest.raises(ValueError, match="preset is 'strong'"):
        read_arguments([*arguments, "--preset", "strong"])


class StatesAfterEvaluation(TrainerCallback):
    def __init__(self):
        self.states = []

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        self.states.append(copy.deepcopy(model.state_dict()))


def test_without_rollback_a_breach_is_passed_through_but_never_published(tmp_path):
    model = fitted()
    ends = {}
    for choice in ("no_rollback", "continue"):
        trainer = build(
            tmp_path / choice, copy.deepcopy(model), alpha=0.5, beta=1e-6, tolerance=0.0, after_rollback=choice
        )
        watch = StatesAfterEvaluation()
        trainer.add_callback(watch)
        trainer.train()
        ends[choice] = [torch.equal(s["body.weight"], watch.states[0]["body.weight"]) for s in watch.states]
        torch.testing.assert_close(trainer.model.state_dict(), watch.states[0], rtol=0, atol=0)
        assert trainer.guard.state.best_step is None
    assert ends == {"no_rollback": [True, False, False, False], "continue": [True] * 4}

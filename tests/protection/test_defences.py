"""What goes beyond Algorithm 1, beside probes and adversaries that live on: distillation, kept norms, and presets."""

from __future__ import annotations

import copy

import datasets
import pytest
import torch
from points import TinyNet, fitted, make_points
from protected import build
from tiny_models import small_resnet, small_vit
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    TrainerCallback,
)

from sophon_hf import SophonConfig, SophonTrainer
from sophon_hf.cli.options import read_options
from sophon_hf.cli.protect import build_config
from sophon_hf.finetuning.preparations import rescale_weights
from sophon_hf.finetuning.strategy import NotApplicableError
from sophon_hf.hub.claim import Claim
from sophon_hf.models.scale_invariance import fresh_norms, scale_invariant_layers, set_norm
from sophon_hf.protection.config import PRESETS
from sophon_hf.protection.reinforcement import mix_second_half

# ---- Settings ----


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_persistent": 2, "second_order": True}, "leave `num_persistent` 0"),
        ({"second_order": True, "strategy_space": {"preparations": ["warm_up"]}}, "through preparations"),
        ({"second_order": True, "strategy_space": {"preparations": ["shrink_and_perturb"]}}, "through preparations"),
        ({"recovery_ratio": 1.0}, "recovery_ratio is 1.0"),
        ({"simulated_examples": 0}, "simulated_examples is 0"),
        ({"preconditioning": -1.0}, "preconditioning is -1.0"),
        ({"preconditioning": 1.0, "optim": "sgd"}, "optim .*sgd.* keeps none"),
        ({"strategy_space": {"examples": [0]}}, "examples has 0"),
        ({"strategy_space": {"preparations": [None, "warm_up"]}}, "there are none: set `probe_depths`"),
        (
            {"probe_depths": 1, "num_persistent": 4, "horizon": 64, "K": 2, "max_steps": 1200, "save_steps": 20}
            | {"strategy_space": {"preparations": [None, "warm_up"]}},
            "save_steps is 20: persistent .* after 10 updates",
        ),
        ({"num_persistent": 1, "N": 2}, "num_persistent is 1, but an iteration simulates N x l_FTS = 2"),
        ({"num_persistent": -1}, "num_persistent is -1"),
        ({"horizon": 0}, "horizon is 0"),
        ({"probe_depths": 1.5}, "probe_depths is 1.5"),
        ({"distillation": -1.0}, "distillation is -1.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SophonConfig(**fields)


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
    trainer = build(tmp_path, distillation=2.0, mixup=True)
    unprotected = copy.deepcopy(trainer.model).eval()
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
    ours, theirs = (m(mixed["x"]).softmax(1) for m in (trainer.model, unprotected))
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
        SophonConfig(mixup=True)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, num_labels=2
    )
    features = datasets.Features(
        {"input_ids": datasets.List(datasets.Value("int64")), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    tokens, others = (
        datasets.Dataset.from_dict(
            {"input_ids": [[i % 20, 3, last] for i in range(40)], "label": [i % 2 for i in range(40)]}, features
        )
        for last in (4, 5)
    )
    args = SophonConfig(str(tmp_path), distillation=1.0, mixup=True, use_cpu=True)
    trainer = SophonTrainer(BertForSequenceClassification(config), tokens, others, args)
    assert "'input_ids' holds torch.int64: left out" in caplog.text
    assert not trainer.args.mixup


def test_the_unprotected_model_stays_as_it_was(tmp_path):
    trainer = build(tmp_path, distillation=1e6, alpha=0.1)
    before = copy.deepcopy(trainer.model.state_dict())
    batch = {"x": torch.randn(10, 6), "labels": torch.arange(10) % 3}
    trainer.train()
    assert not torch.equal(trainer.model.body.weight, before["body.weight"])
    trainer.model.load_state_dict(before)
    task_loss = torch.nn.functional.cross_entropy(trainer.model.eval()(batch["x"]), batch["labels"])
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), task_loss, rtol=1e-4, atol=1e-4)


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
    trainer = build(tmp_path, model, alpha=0.9, beta=1e-6, tolerance=0.0, keep_norms=True, on_violation="adapt_alpha")
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
    with pytest.raises(NotApplicableError, match="have the norm of an initialisation already"):
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
    assert config.probe_depths == PRESETS["representation"]["probe_depths"] > 0


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
    config = build_config(read_options("protect", [*arguments, "--preset", "representation", "--alpha", "0.01"]))
    assert (config.alpha, config.keep_norms) == (0.01, True)
    assert config.space.to_dict()["reinitialized_blocks"] == [0, 1, 1]
    (tmp_path / "c.yaml").write_text("preset: representation\nbeta: 0.02\n")
    config = build_config(read_options("protect", [str(tmp_path / "c.yaml"), *arguments]))
    assert (config.beta, config.K) == (0.02, PRESETS["representation"]["K"])
    config = build_config(read_options("protect", [*arguments, "--preset", "representation", "--on_violation", "stop"]))
    assert config.on_violation == "stop"
    SophonConfig.preset("representation", l_FTS=0)  # No adversary, so none whose warm-up could not end.
    with pytest.raises(ValueError, match="--preset: invalid choice: 'strong'"):
        read_options("protect", [*arguments, "--preset", "strong"])


class StatesAfterEvaluation(TrainerCallback):
    def __init__(self):
        self.states = []

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        self.states.append(copy.deepcopy(model.state_dict()))


def test_a_breach_that_is_passed_through_is_never_published(tmp_path):
    model, ends = fitted(), {}
    # With adapt_alpha a fall of less than 2 x 7 tolerances is passed through.
    for choice, tolerance in (("adapt_alpha", 0.045), ("continue", 0.0)):
        trainer = build(
            tmp_path / choice, copy.deepcopy(model), alpha=0.5, beta=1e-6, tolerance=tolerance, on_violation=choice
        )
        watch = StatesAfterEvaluation()
        trainer.add_callback(watch)
        trainer.train()
        ends[choice] = [torch.equal(s["body.weight"], watch.states[0]["body.weight"]) for s in watch.states]
        torch.testing.assert_close(trainer.model.state_dict(), watch.states[0], rtol=0, atol=0)
        assert trainer.guard.state.best_step is None
    assert not all(ends["adapt_alpha"]) and all(ends["continue"])


def test_a_rollback_leaves_no_iteration_with_the_norms_of_the_unprotected_model(tmp_path):
    model = fitted()
    with torch.no_grad():
        model.body.weight.mul_(8.0)
    trainer = build(tmp_path, model, alpha=0.9, beta=1e-6, tolerance=0.0, keep_norms=True)
    watch = StatesAfterEvaluation()
    trainer.add_callback(watch)
    trainer.train()
    assert trainer.guard.state.rollbacks > 1
    fresh = float(fresh_norms([trainer.model.body])[trainer.model.body])
    assert [float(s["body.weight"].norm()) for s in watch.states[1:3]] == pytest.approx([fresh] * 2, rel=1e-5)

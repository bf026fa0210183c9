"""`SophonTrainer` on models of the libraries: what is saved loads again, classes, noise and precision."""

from __future__ import annotations

import logging

import datasets
import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from observed import Observer, assert_equal, config, guarded, state_of
from points import TinyNet, make_points
from published import classifier as tiny_resnet
from published import unet as tiny_unet
from torch import nn
from transformers import ResNetForImageClassification, ViTImageProcessor

from sophon_hf import DiffusionTask, SophonTrainer
from sophon_hf.models.loading import load_model


def pixels(seed: int, column: str, labelled: bool = True, size: int = 8, examples: int = 40) -> datasets.Dataset:
    generator = np.random.default_rng(seed)
    columns = {column: generator.normal(size=(examples, 3, size, size)).astype(np.float32).tolist()}
    return datasets.Dataset.from_dict({**columns, **({"label": [i % 3 for i in range(examples)]} if labelled else {})})


def train_saving(tmp_path, model, column: str, **kwargs) -> SophonTrainer:
    space = {"initializations": ["direct"], "learning_rates": [1e-2], "batch_sizes": [8]}
    args = guarded(tmp_path, tolerance=1.0, save_strategy="steps", save_steps=2, eval_steps=3, strategy_space=space)
    kwargs["processing_class"] = ViTImageProcessor(size={"height": 8, "width": 8})
    labelled = column == "pixel_values"
    trainer = SophonTrainer(model, pixels(1, column, labelled), pixels(2, column, labelled), args, **kwargs)
    trainer.train()
    assert ViTImageProcessor.from_pretrained(tmp_path / "output").size["height"] == 8
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


def test_two_diffusion_models_are_measured_with_the_same_noise(tmp_path):
    """A model that predicts nothing errs by the noise itself: the MSE is the noise's mean square."""
    scores = []
    for bias in (0.0, 1.0):
        model = tiny_unet()
        nn.init.zeros_(model.conv_out.weight)
        nn.init.constant_(model.conv_out.bias, bias)
        task = DiffusionTask(DDPMScheduler(num_train_timesteps=20))
        held_out = {name: pixels(7, "sample", labelled=False) for name in ("original", "restricted")}
        trainer = SophonTrainer(
            model,
            pixels(1, "sample", labelled=False),
            pixels(2, "sample", labelled=False),
            config(tmp_path, per_device_eval_batch_size=7 if bias else 16),
            task=task,
            eval_dataset=held_out,
        )
        scores.append(trainer.evaluate())
    domain = trainer.domains["eval_original"]
    noise = task.collate(domain.rows(torch.arange(40)), list(range(40)))["target"]
    assert scores[0]["eval_original_mse"] == pytest.approx(float(noise.square().mean()), rel=1e-5)
    assert scores[1]["eval_original_mse"] == pytest.approx(float((noise - 1).square().mean()), rel=1e-5)
    assert scores[0]["eval_restricted_mse"] == scores[0]["eval_original_mse"]


def test_a_diffusion_guard_takes_the_tolerance_as_a_share_of_the_mse(tmp_path):
    observer = Observer()
    cheap = {"simulated_examples": 1, "strategy_space": {"initializations": ["direct"], "batch_sizes": [8]}}
    args = guarded(tmp_path, max_steps=1, alpha=0.1, on_violation="stop", tolerance=0.1, **cheap)
    data = [pixels(seed, "sample", labelled=False) for seed in (1, 2)]
    SophonTrainer(tiny_unet(), *data, args, callbacks=[observer]).train()
    start, after = observer.evaluations
    assert after["eval_original_mse"] > 1.1 * start["eval_original_mse"]
    assert after["rollbacks"] == 1
    assert_equal(after["model"], start["model"])


@pytest.mark.parametrize("make", [tiny_resnet, tiny_unet])
def test_a_model_that_is_stored_in_half_precision_is_loaded_in_full(tmp_path, make):
    make().half().save_pretrained(tmp_path / "half")
    assert load_model(tmp_path / "half").dtype == torch.float32


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
    trainer = SophonTrainer(model, make_points(4, num_classes=5), make_points(2), args, eval_dataset=held_out)
    metrics = trainer.evaluate()
    x, y = torch.tensor(restricted["x"]), torch.tensor(restricted["label"])
    assert metrics["eval_restricted_accuracy"] == pytest.approx(float((model.eval()(x).argmax(1) == y).float().mean()))
    trainer.train()


def test_labels_beyond_the_head_are_wrong_though_the_original_domain_names_as_many_classes(tmp_path, model):
    """What counts is what the head has, 3 outputs, whatever the features of the original domain name."""
    restricted = make_points(1, num_classes=5)
    original = make_points(2).cast_column("label", restricted.features["label"])
    held_out = {"original": original.select(range(50)), "restricted": restricted.select(range(60))}
    trainer = SophonTrainer(model, restricted, original, config(tmp_path), eval_dataset=held_out)
    metrics = trainer.evaluate()
    x, y = (torch.tensor(held_out["restricted"][column]) for column in ("x", "label"))
    assert metrics["eval_restricted_accuracy"] == pytest.approx(float((model.eval()(x).argmax(1) == y).float().mean()))
    assert np.isnan(metrics["eval_restricted_loss"]) and np.isfinite(metrics["eval_original_loss"])


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

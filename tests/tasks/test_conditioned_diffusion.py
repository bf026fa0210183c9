"""Diffusion models that are told a class: labels travel with the batch, and what a model learns beside the noise."""

from __future__ import annotations

import datasets
import pytest
import torch
from classifiers import protect, same_tensors, settings
from diffusers import DDPMPipeline, DDPMScheduler, DiTTransformer2DModel, ScoreSdeVeScheduler, UNet2DModel
from labelled_data import images
from torch import nn

from sophon_hf import AttackSuite, DiffusionTask, FineTuningStrategy, SophonTrainer
from sophon_hf.attacks.sweeps import load_sweep
from sophon_hf.data.batches import Stream
from sophon_hf.data.domain import build_domain
from sophon_hf.models.loading import load_model
from sophon_hf.tasks.base import infer_task, load_task

DIRECT = {"strategy_space": {"batch_sizes": [8], "initializations": ["direct"]}}


def unet(classes: int | None = 4, out_channels: int = 1, **fields) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=out_channels,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        num_class_embeds=classes,
        **fields,
    )


def dit(channels: int = 1) -> DiTTransformer2DModel:
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "norm_num_groups": 4}
    model = DiTTransformer2DModel(
        **sizes, in_channels=channels, out_channels=2 * channels, sample_size=8, patch_size=2, num_embeds_ada_norm=4
    )
    nn.init.normal_(model.proj_out_2.weight, std=0.1)
    return model


@pytest.mark.parametrize("make", [unet, dit], ids=["unet", "dit"])
def test_labels_travel_with_the_batch(make):
    model, task, data = make(), infer_task(make()), images(1)
    domain = build_domain(data, task.inputs(model))
    batch = Stream(domain, task.collate, 0, torch.arange(9)).batch(0, 9)
    assert domain.labels is None and domain.num_classes == 0, "they are an input, not what is predicted"
    assert sorted(batch["class_labels"].tolist()) == sorted(data["label"][:9])
    moved = {**batch, "class_labels": (batch["class_labels"] + 1) % 3}
    assert not torch.equal(task.predict(model, batch), task.predict(model, moved)), "the model is told them"


@pytest.mark.parametrize("make", [unet, dit], ids=["unet", "dit"])
def test_a_class_conditional_model_is_protected_saved_and_loaded(make, tmp_path):
    model = make()
    trainer = protect(model, images(1), images(2), tmp_path, DIRECT)
    assert trainer.unmoved <= {name for name, _ in model.named_parameters() if "class" in name or "embedding" in name}
    assert any("embedding" in n for n, _ in model.named_parameters() if n not in trainer.unmoved), "labels are learned"
    loaded = load_model(tmp_path)
    assert type(loaded) is type(model) and same_tensors(model, loaded)
    assert load_task(tmp_path, loaded).noise_scheduler.config.prediction_type == "epsilon"
    if isinstance(model, UNet2DModel):
        assert same_tensors(model, DDPMPipeline.from_pretrained(tmp_path).unet)


def test_a_class_conditional_model_is_attacked(tmp_path):
    dream_booth = load_sweep("denoiser")[-1]
    assert dream_booth.adapter == "lora" and dream_booth.original_weight == 1, "original images preserve the prior"
    sweep = [strategy.with_changes(epochs=1, batch_size=10) for strategy in (FineTuningStrategy(), dream_booth)]
    suite = AttackSuite(sweep, tmp_path, seeds=[0], measured_epochs=[0, 1])
    data = images(1)
    results = suite.run(
        protected=dit(),
        original=dit(),
        restricted_dataset=data.select(range(30)),
        eval_dataset=data.select(range(30, 48)),
        original_dataset=images(3),
        original_eval_dataset=images(2),
    )
    assert not [run for run in results.runs if run.error] and results.metric == "mse"


def test_images_without_labels_are_given_the_null_label():
    model, task = unet(classes=4), DiffusionTask(null_label=3)
    plain, data = images(1).remove_columns("label"), images(1)
    assert build_domain(plain, task.inputs(model)).classes is None
    rows = torch.arange(48)
    without = task.collate(build_domain(plain, task.inputs(model)).rows(rows), rows.tolist())
    assert (without["class_labels"] == 3).all()
    given = task.collate(build_domain(data, task.inputs(model)).rows(rows), rows.tolist())["class_labels"]
    dropped = given == 3
    assert 0 < dropped.sum() < 15, "about every tenth"
    assert torch.equal(given[~dropped], torch.tensor(data["label"])[~dropped])


def test_labels_may_be_vectors():
    model = unet(classes=None, class_embed_type="identity")
    width = model.time_embedding.linear_2.out_features
    data = datasets.Dataset.from_dict({"sample": torch.randn(8, 1, 8, 8).numpy(), "class_labels": [[0.5] * width] * 8})
    task = infer_task(model)
    domain = build_domain(data, task.inputs(model))
    batch = task.collate(domain.rows(torch.arange(4)), list(range(4)))
    assert task.predict(model, batch).shape == (4, 1, 8, 8)


@pytest.mark.parametrize("make", [lambda: unet(out_channels=2), dit], ids=["unet", "dit"])
def test_of_a_learned_variance_the_noise_half_is_learned(make):
    model = make().eval()  # In training a DiT drops labels by itself.
    task = infer_task(model)
    batch = Stream(build_domain(images(1), task.inputs(model)), task.collate, 0).batch(0, 4)
    prediction = task.predict(model, batch)
    names = {"sample": batch["sample"]} if "sample" in batch else {"hidden_states": batch["hidden_states"]}
    whole = model(**names, timestep=batch["timestep"], class_labels=batch["class_labels"]).sample
    assert whole.shape[1] == 2 and torch.equal(prediction, whole[:, :1])
    assert task.structure(model, batch).head == ("proj_out_2" if "hidden_states" in batch else "conv_out")


# Refusals.


def test_a_prediction_of_another_shape_is_never_broadcast(tmp_path):
    with pytest.raises(ValueError, match=r"model predicts \(2, 3, 8, 8\) of noisy examples of shape \(2, 1, 8, 8\)"):
        SophonTrainer(unet(out_channels=3), images(1), images(2), settings(tmp_path, **DIRECT))


def test_data_without_labels_are_refused_where_no_label_stands_for_none():
    with pytest.raises(ValueError, match="no label column among .*: a model with class labels needs one"):
        build_domain(images(1).remove_columns("label"), infer_task(unet()).inputs(unet()))


def test_a_label_that_the_model_has_no_embedding_for_is_refused():
    with pytest.raises(ValueError, match="classes that the model does not know, .*has 2 labels without"):
        build_domain(images(1), infer_task(unet()).inputs(unet(classes=2)), name="restricted")


def test_a_score_based_scheduler_is_refused():
    with pytest.raises(ValueError, match="A ScoreSdeVeScheduler is not supported: noise is added as DDPM does"):
        DiffusionTask(ScoreSdeVeScheduler())


def test_the_null_label_is_drawn_apart_from_the_noise():
    """Noise and time of an example are the same with and without one."""
    rows = {"sample": torch.randn(6, 1, 8, 8), "class_labels": torch.arange(6) % 3}
    one, other = (DiffusionTask(DDPMScheduler(), null_label=n).collate(rows, list(range(6))) for n in (None, 3))
    assert torch.equal(one["sample"], other["sample"]) and torch.equal(one["timestep"], other["timestep"])

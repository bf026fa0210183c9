"""Text-to-image models: captions are encoded once by the pipeline's own parts, and it is saved again as a whole."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
from classifiers import protect, same_tensors
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
)
from pipelines import captioned, save_pipeline

from sophon_hf import DiffusionTask
from sophon_hf.models.loading import load_model
from sophon_hf.tasks.base import infer_task, load_task
from sophon_hf.tasks.latents import encode_captions

DIRECT = {"strategy_space": {"batch_sizes": [8], "initializations": ["direct"], "learning_rates": [1e-3]}}


def test_captions_are_encoded_as_the_pipeline_does(tmp_path):
    pipeline, data = save_pipeline(tmp_path), captioned(1, 3)
    encoded = encode_captions(tmp_path, data, batch_size=2)
    pixels = torch.tensor(np.stack([np.asarray(picture) for picture in data["image"]])).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        latents = pipeline.vae.encode(pixels).latent_dist.mean * pipeline.vae.config.scaling_factor
        tokens = pipeline.tokenizer(
            list(data["text"]), padding="max_length", max_length=8, return_tensors="pt"
        ).input_ids
        hidden = pipeline.text_encoder(tokens)[0]
    for name, expected in (("latents", latents), ("encoder_hidden_states", hidden)):
        found = torch.tensor(np.asarray(encoded[name])).float()
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def flow_model() -> SD3Transformer2DModel:
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        pos_embed_max_size=8,
    )
    torch.nn.init.normal_(model.proj_out.weight, std=0.1)
    return model


def prepared(seed: int, count: int = 24) -> datasets.Dataset:
    draw = np.random.default_rng(seed)
    shapes = {"latents": (4, 8, 8), "encoder_hidden_states": (3, 16), "pooled_projections": (8,)}
    return datasets.Dataset.from_dict(
        {name: draw.normal(size=(count, *shape)).astype("float32").tolist() for name, shape in shapes.items()}
    )


def test_a_flow_is_matched_from_data_to_noise():
    task = DiffusionTask(FlowMatchEulerDiscreteScheduler())
    rows = {"hidden_states": torch.randn(4, 4, 8, 8), "encoder_hidden_states": torch.randn(4, 3, 16)}
    batch = task.collate(rows, list(range(4)))
    share = (batch["timestep"] / 1000).view(-1, 1, 1, 1)
    noise = batch["target"] + rows["hidden_states"]
    torch.testing.assert_close(batch["hidden_states"], (1 - share) * rows["hidden_states"] + share * noise)
    assert abs(float(noise.std()) - 1) < 0.1 and ((share > 0) & (share <= 1)).all()
    assert torch.equal(batch["encoder_hidden_states"], rows["encoder_hidden_states"])


def test_a_flow_matching_transformer_is_protected_and_saved_beside_its_scheduler(tmp_path):
    task = DiffusionTask(FlowMatchEulerDiscreteScheduler(shift=3.0))
    model = flow_model()
    protect(model, prepared(1), prepared(2), tmp_path, DIRECT, task=task)
    loaded = load_model(tmp_path)
    assert same_tensors(model, loaded)
    assert load_task(tmp_path, loaded).noise_scheduler.config.shift == 3.0


def test_what_is_no_text_to_image_pipeline_is_refused(tmp_path):
    with pytest.raises(ValueError, match="There is no column 'caption'; the data set has"):
        encode_captions(tmp_path, captioned(1), caption_column="caption")
    with pytest.raises(ValueError, match="is no pipeline with a vae and a text_encoder"):
        encode_captions(tmp_path, captioned(1))
    assert infer_task(flow_model()).inputs(flow_model()).main == "hidden_states"

"""Text-to-image models: captions are encoded once by the pipeline's own parts, and it is saved again as a whole."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
import transformers
from classifiers import protect, same_tensors, settings
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from labelled_data import images

from sophon_hf import AttackSuite, DiffusionTask, FineTuningStrategy, SophonTrainer
from sophon_hf.hub.publish import _is_published
from sophon_hf.models.loading import load_model
from sophon_hf.tasks.base import infer_task, load_task
from sophon_hf.tasks.latents import encode_captions

DIRECT = {"strategy_space": {"batch_sizes": [8], "initializations": ["direct"], "learning_rates": [1e-3]}}
WORDS = ["red", "blue", "green"]


def save_pipeline(folder, prediction_type: str = "epsilon"):
    torch.manual_seed(0)
    symbols = sorted(set("".join(WORDS)))
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = transformers.CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    tokenizer.model_max_length = 8
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1, "pad_token_id": len(tokens) - 1}
    config = transformers.CLIPTextConfig(vocab_size=len(tokens), max_position_embeddings=8, **sizes, **ends)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=transformers.CLIPTextModel(config),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=PNDMScheduler(skip_prk_steps=True, steps_offset=1, prediction_type=prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return pipeline


def captioned(seed: int, count: int = 24) -> datasets.Dataset:
    data = images(seed, count)
    return data.add_column("text", [WORDS[(i + seed) % 3] for i in range(count)])


def test_a_pipeline_is_protected_attacked_and_saved_as_a_whole(tmp_path):
    before = save_pipeline(tmp_path / "before", "v_prediction")
    data = [encode_captions(tmp_path / "before", captioned(seed)) for seed in (1, 2)]
    trainer = SophonTrainer(str(tmp_path / "before"), *data, settings(tmp_path / "after", **DIRECT))
    assert isinstance(trainer.model, UNet2DConditionModel)
    assert trainer.task.noise_scheduler.config.prediction_type == "v_prediction", "the pipeline's own"
    trainer.train()
    after = StableDiffusionPipeline.from_pretrained(tmp_path / "after", safety_checker=None)
    assert same_tensors(trainer.model, after.unet) and not same_tensors(before.unet, after.unet)
    assert same_tensors(before.vae, after.vae) and same_tensors(before.text_encoder, after.text_encoder)
    assert type(after.scheduler) is PNDMScheduler, "the sampler stays"
    picture = after("red", num_inference_steps=2, output_type="np", height=16, width=16).images[0]
    assert np.isfinite(picture).all()
    assert same_tensors(load_model(tmp_path / "after"), after.unet)
    published = {p.relative_to(tmp_path / "after").as_posix() for p in (tmp_path / "after").rglob("*") if p.is_file()}
    needed = {"model_index.json", "unet/config.json", "vae/diffusion_pytorch_model.safetensors", "sophon.json"}
    assert needed <= {name for name in published if _is_published(name)}
    assert str(tmp_path) not in (tmp_path / "after" / "model_index.json").read_text()

    suite = AttackSuite([FineTuningStrategy(epochs=1, batch_size=8)], tmp_path / "attacks", seeds=[0])
    results = suite.run(
        protected=str(tmp_path / "after"),
        original=str(tmp_path / "before"),
        restricted_dataset=data[0],
        eval_dataset=encode_captions(tmp_path / "before", captioned(7, 12)),
    )
    assert not any(run.failed for run in results.runs) and results.metric == "mse"


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

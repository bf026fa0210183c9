"""Encode pictures and captions as a latent diffusion model sees them, by the pipeline that it is a part of, once."""

from __future__ import annotations

import inspect
import os
from typing import Any

import datasets
import torch

from sophon_hf.data.media import convert_picture
from sophon_hf.models.loading import pipeline_parts


@torch.no_grad()
def encode_captions(
    source: str | os.PathLike,
    dataset: datasets.Dataset,
    *,
    image_column: str = "image",
    caption_column: str = "text",
    batch_size: int = 16,
    device: str | torch.device = "cpu",
) -> datasets.Dataset:
    """Return the data as `latents` and encoded captions, which trainer and suite take for a text-to-image model.

    Args:
        source: Hub id or folder of the pipeline, whose VAE and text encoders are used.
        dataset: Pictures, which are resized to the size that the model was made for, and their captions.
        image_column: Where the pictures are.
        caption_column: Where the captions are.
        batch_size: Examples that are encoded at a time.
        device: Where they are.

    Raises:
        ValueError: The pipeline has no VAE or encodes no prompts, or a column is missing.
    """
    from diffusers import DiffusionPipeline

    for column in (image_column, caption_column):
        if column not in dataset.column_names:
            raise ValueError(f"There is no column {column!r}; the data set has {dataset.column_names}.")
    parts = pipeline_parts(source)
    if "vae" not in parts or not any(name.startswith("text_encoder") for name in parts):
        raise ValueError(f"{os.fspath(source)!r} is no pipeline with a vae and a text_encoder: it has {sorted(parts)}.")
    pipeline: Any = DiffusionPipeline.from_pretrained(source, torch_dtype=torch.float32).to(device)
    model = pipeline.unet if "unet" in parts else pipeline.transformer
    vae, size = pipeline.vae.config, model.config.sample_size * pipeline.vae_scale_factor

    def encode(rows: dict[str, list]) -> dict[str, Any]:
        pictures = [convert_picture(picture, "RGB", exact=False) for picture in rows[image_column]]
        pixels = pipeline.image_processor.preprocess(pictures, height=size, width=size).to(device)
        latents = (pipeline.vae.encode(pixels).latent_dist.mean - (vae.get("shift_factor") or 0)) * vae.scaling_factor
        encoded = {"latents": latents, **_encode_prompts(pipeline, list(rows[caption_column]), device)}
        if "text_embeds" in encoded:
            encoded["time_ids"] = torch.tensor([[size, size, 0, 0, size, size]] * len(pictures), dtype=torch.float32)
        return {name: values.cpu().numpy() for name, values in encoded.items()}

    first = encode(dataset.select(range(1))[:])
    features: dict[str, Any] = {
        name: (datasets.Array3D if values.ndim == 4 else datasets.Array2D)(values.shape[1:], "float32")
        if values.ndim > 2
        else datasets.List(datasets.Value("float32"), length=values.shape[1])
        for name, values in first.items()
    }
    return dataset.with_format(None).map(
        encode,
        batched=True,
        batch_size=batch_size,
        remove_columns=dataset.column_names,
        features=datasets.Features(features),
    )


def _encode_prompts(pipeline: Any, prompts: list[str], device: str | torch.device) -> dict[str, torch.Tensor]:
    accepted = inspect.signature(pipeline.encode_prompt).parameters
    settings: dict[str, Any] = {"prompt": prompts, "device": device, "num_images_per_prompt": 1}
    settings |= {"do_classifier_free_guidance": False, "prompt_2": None, "prompt_3": None}
    found = pipeline.encode_prompt(**{name: value for name, value in settings.items() if name in accepted})
    encoded = {"encoder_hidden_states": found[0]}
    if len(found) == 4:
        # A pooled caption beside the tokens: SDXL's UNet and SD3's transformer call it differently.
        encoded["text_embeds" if hasattr(pipeline, "unet") else "pooled_projections"] = found[2]
    return encoded

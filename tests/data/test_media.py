"""Raw images, text and audio, made into what a model takes."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from raw_data import (
    ALL,
    AUDIO,
    GREY,
    IMAGES,
    MASKED_AUDIO,
    RATE,
    TEXT,
    UNET,
    picture,
    pictures,
    sentences,
    sounds,
    tokenizer,
)
from scipy.signal import resample_poly
from transformers import ViTImageProcessor, Wav2Vec2FeatureExtractor

from sophon_hf.data.domain import build_domain
from sophon_hf.data.loading import load_domain
from sophon_hf.data.preprocessing import ModelInputs

# ---- Images ----


@pytest.mark.parametrize(("needs", "channels"), [(IMAGES, 3), (GREY, 1)])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_images_become_the_channels_of_the_model(needs, channels, mode):
    image = picture(mode)
    pixels = build_domain(pictures([image, image]), needs).rows(ALL(2))["pixel_values"]
    assert pixels.shape == (2, channels, 4, 6) and pixels.dtype == torch.float32
    expected = np.asarray(image.convert("L" if channels == 1 else "RGB"), dtype=np.float32) / 255
    expected = expected[None] if channels == 1 else expected.transpose(2, 0, 1)
    torch.testing.assert_close(pixels[1].numpy(), expected)


def test_images_for_diffusion_are_resized_symmetric_and_unlabelled():
    image = picture("RGB", size=(12, 8))
    domain = build_domain(pictures([image, image]).remove_columns("label"), UNET)
    pixels = domain.rows(ALL(2))["sample"]
    expected = np.asarray(image.resize((6, 4), Image.Resampling.BILINEAR), dtype=np.float32).transpose(2, 0, 1)
    torch.testing.assert_close(pixels[0].numpy(), expected / 127.5 - 1, atol=1e-6, rtol=0)
    assert domain.labels is None and domain.num_classes == 0


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_images_go_through_the_processor(mode):
    image = picture(mode, size=(9, 7))
    processor = ViTImageProcessor(size={"height": 5, "width": 5}, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7])
    pixels = build_domain(pictures([image, image]), IMAGES, processor).rows(ALL(2))["pixel_values"]
    resized = np.asarray(image.convert("RGB").resize((5, 5), Image.Resampling.BILINEAR), dtype=np.float32) / 255
    expected = (resized - np.array([0.1, 0.2, 0.3])) / np.array([0.5, 0.6, 0.7])
    torch.testing.assert_close(pixels[0].numpy(), expected.transpose(2, 0, 1).astype(np.float32), atol=1e-5, rtol=0)


def test_grey_images_go_through_a_processor_for_one_channel():
    processor = ViTImageProcessor(size={"height": 5, "width": 5}, image_mean=[0.5], image_std=[0.5])
    pixels = build_domain(pictures([picture("L"), picture("L")]), GREY, processor).rows(ALL(2))["pixel_values"]
    assert pixels.shape == (2, 1, 5, 5)


def test_images_of_mixed_sizes_need_a_processor_that_resizes():
    mixed = pictures([picture("RGB"), picture("RGB", size=(5, 5))])
    with pytest.raises(
        ValueError, match="different sizes.*Give images of one size, or save with the model a processor that resizes"
    ):
        build_domain(mixed, IMAGES)
    processor = ViTImageProcessor(size={"height": 5, "width": 5})
    assert build_domain(mixed, IMAGES, processor).rows(ALL(2))["pixel_values"].shape == (2, 3, 5, 5)


def test_images_for_a_model_of_five_channels_are_refused():
    five = ModelInputs(names=("x",), main="x", labelled=True, channels=5)
    with pytest.raises(ValueError, match="takes 5 channels, images have 1, 3 or 4"):
        build_domain(pictures([picture("RGB"), picture("RGB")]), five)


def test_undecoded_images_are_images():
    image = picture("RGB")
    undecoded = pictures([image, image]).cast_column("image", datasets.Image(decode=False))
    pixels = build_domain(undecoded, IMAGES).rows(ALL(2))["pixel_values"]
    torch.testing.assert_close(pixels[0], torch.tensor(np.asarray(image) / np.float32(255)).permute(2, 0, 1))


def test_images_in_torch_format_are_images():
    image = picture("RGB")
    pixels = build_domain(pictures([image, image]).with_format("torch"), IMAGES).rows(ALL(2))["pixel_values"]
    torch.testing.assert_close(pixels[0], torch.tensor(np.asarray(image) / np.float32(255)).permute(2, 0, 1))


# ---- Pictures of more than 8 bits ----


def deep(dtype: type, high: float, count: int = 2) -> datasets.Dataset:
    values = np.random.default_rng(0).uniform(0, high, (count, 4, 6)).astype(dtype)
    return pictures([Image.fromarray(v) for v in values])


@pytest.mark.parametrize(("needs", "channels"), [(IMAGES, 3), (GREY, 1)])
def test_pictures_of_16_bits_are_scaled_by_65535(needs, channels):
    dataset = deep(np.uint16, 65535)
    assert dataset[0]["image"].mode == "I;16"
    values = np.asarray(dataset[0]["image"]).astype(np.float32) / 65535
    pixels = build_domain(dataset, needs).rows(ALL(2))["pixel_values"]
    torch.testing.assert_close(pixels[0].numpy(), np.stack([values] * channels), atol=1e-6, rtol=0)
    processor = ViTImageProcessor(
        size={"height": 4, "width": 6}, image_mean=[0.0] * channels, image_std=[1.0] * channels
    )
    processed = build_domain(dataset, needs, processor).rows(ALL(2))["pixel_values"]
    torch.testing.assert_close(processed[0].numpy(), np.stack([values] * channels), atol=1 / 255, rtol=0)


def test_transparency_of_pictures_of_16_bits_is_none():
    four = ModelInputs(names=("x", "labels"), main="x", labelled=True, channels=4)
    assert (build_domain(deep(np.uint16, 65535), four).rows(ALL(2))["x"][:, 3] == 1).all()


@pytest.mark.parametrize(("dtype", "mode"), [(np.int32, "I"), (np.float32, "F")])
def test_pictures_of_unknown_range_are_refused_or_scaled_by_one_that_is_given(dtype, mode):
    dataset = deep(dtype, 5000)
    for processor in (None, ViTImageProcessor(size={"height": 4, "width": 6})):
        message = f"Row 0 of the restricted domain cannot be read: column 'image': its mode is {mode}, .*`pixel_range`"
        with pytest.raises(ValueError, match=message):
            build_domain(dataset, IMAGES, processor, name="restricted")
    mixed = datasets.concatenate_datasets([deep(np.uint16, 9), dataset])
    with pytest.raises(ValueError, match=f"Row 2 of the restricted domain .*its mode is {mode}"):
        build_domain(mixed, IMAGES, name="restricted")
    pixels = build_domain(load_domain(dataset, pixel_range=(1000, 4000)), GREY).rows(ALL(2))["pixel_values"]
    expected = ((np.asarray(dataset[1]["image"]).astype(np.float64) - 1000) / 3000).clip(0, 1)
    assert pixels[1, 0].numpy() == pytest.approx(expected, abs=2 / 65535)


def test_ranges_that_are_none():
    with pytest.raises(ValueError, match=r"pixel_range is \[5, 5\]: what is black must be below what is white"):
        load_domain(deep(np.int32, 9), pixel_range=(5, 5))
    with pytest.raises(ValueError, match=r"pixel_range is for pictures, and no column of \['text', 'label'\] holds"):
        load_domain(sentences(), pixel_range=(0, 1))
    plain = pictures([picture("RGB")] * 2)
    assert np.array_equal(load_domain(plain, pixel_range=(0, 9))[0]["image"], plain[0]["image"]), "8 bits have a range"


# ---- Text ----


def test_sentences_are_tokenized_padded_and_cut():
    domain = build_domain(sentences(), TEXT, tokenizer())
    batch = domain.rows(torch.tensor([0, 1, 6, 7]))
    assert batch["input_ids"].tolist() == [[1, 3, 3, 3, 3, 3], [1, 2, 2, 3, 3, 3], [1, 2, 0, 3, 3, 3], [2] * 6]
    assert batch["attention_mask"].sum(dim=1).tolist() == [1, 3, 3, 6]
    assert batch["labels"].tolist() == [0, 1, 0, 1]
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_batch_is_as_wide_as_its_longest_sentence():
    batch = build_domain(sentences(), TEXT, tokenizer()).rows(torch.tensor([0, 2]))
    assert batch["input_ids"].tolist() == [[1, 3], [2, 2]]


def test_text_needs_a_tokenizer_and_one_column():
    with pytest.raises(ValueError, match="Column 'text' holds text: save the model's tokenizer"):
        build_domain(sentences(), TEXT)
    two = sentences().add_column("title", ["two one"] * 8)
    with pytest.raises(ValueError, match=r"several columns of text, \['text', 'title'\]"):
        build_domain(two, TEXT, tokenizer())
    named = build_domain(two, TEXT, tokenizer(), input_column="title")
    assert named.rows(ALL(1))["input_ids"].tolist() == [[2, 1]]
    with pytest.raises(ValueError, match="has no column 'headline'"):
        build_domain(two, TEXT, tokenizer(), input_column="headline")


# ---- Audio ----


def test_audio_is_resampled_to_the_rate_of_the_model():
    wave = np.sin(np.arange(800) / 20).astype(np.float32)
    extractor = Wav2Vec2FeatureExtractor(sampling_rate=RATE, do_normalize=False)
    domain = build_domain(sounds([wave, -wave], rate=1600), AUDIO, extractor)
    samples = domain.rows(ALL(2))["input_values"]
    assert samples.shape == (2, 500)
    torch.testing.assert_close(samples[1].numpy(), -resample_poly(wave, 5, 8).astype(np.float32), atol=1e-6, rtol=0)
    # Away from the ends it is the same tone, now sampled at 1000 Hz.
    tone = np.sin(np.arange(500) * 1.6 / 20)
    assert np.abs(samples[0].numpy() - tone)[50:-50].max() < 0.02


def test_channels_of_a_sound_are_averaged():
    left, right = np.linspace(-0.5, 0.5, 100, dtype=np.float32), np.full(100, 0.25, dtype=np.float32)
    extractor = Wav2Vec2FeatureExtractor(sampling_rate=RATE, do_normalize=False)
    samples = build_domain(sounds([np.stack([left, right], axis=1)] * 2), AUDIO, extractor).rows(ALL(1))["input_values"]
    torch.testing.assert_close(samples[0].numpy(), (left + right) / 2)


def test_decoded_arrays_are_audio_too():
    wave = np.linspace(-0.5, 0.5, 100, dtype=np.float32)
    cells = [{"array": wave, "sampling_rate": RATE, "path": None}] * 2
    dataset = datasets.Dataset.from_dict({"audio": cells, "label": [0, 1]})
    samples = build_domain(dataset, AUDIO, Wav2Vec2FeatureExtractor(sampling_rate=RATE, do_normalize=False))
    torch.testing.assert_close(samples.rows(ALL(1))["input_values"][0].numpy(), wave)


@pytest.mark.parametrize("first", ["channels", "samples"])
def test_channels_of_decoded_arrays_are_averaged_and_time_is_resampled(first):
    wave = np.sin(np.arange(800) / 20).astype(np.float32)
    stereo = np.stack([wave, wave / 2])
    cells = [{"array": stereo if first == "channels" else stereo.T, "sampling_rate": 1600, "path": None}] * 2
    dataset = datasets.Dataset.from_dict({"audio": cells, "label": [0, 1]})
    extractor = Wav2Vec2FeatureExtractor(sampling_rate=RATE, do_normalize=False)
    samples = build_domain(dataset, AUDIO, extractor).rows(ALL(2))["input_values"]
    expected = resample_poly(wave * 0.75, 5, 8).astype(np.float32)
    torch.testing.assert_close(samples[0].numpy(), expected, atol=1e-6, rtol=0)


def test_a_sound_of_three_dimensions_is_refused():
    cells = [{"array": np.zeros((2, 3, 4)), "sampling_rate": RATE, "path": None}] * 2
    dataset = datasets.Dataset.from_dict({"audio": cells, "label": [0, 1]})
    with pytest.raises(ValueError, match=r"Row 0 of the original domain .*'audio': its samples have shape \(2, 3, 4\)"):
        build_domain(dataset, AUDIO, Wav2Vec2FeatureExtractor(sampling_rate=RATE), name="original")


def test_audio_of_mixed_lengths_is_padded_and_masked():
    waves = [np.full(length, 0.25, dtype=np.float32) for length in (400, 250, 100)]
    extractor = Wav2Vec2FeatureExtractor(sampling_rate=RATE, do_normalize=False, return_attention_mask=True)
    domain = build_domain(sounds(waves), MASKED_AUDIO, extractor)
    batch = domain.rows(torch.tensor([1, 2]))
    assert batch["attention_mask"].sum(dim=1).tolist() == [250, 100]
    assert batch["input_values"].shape == (2, 250)
    assert batch["input_values"][1].tolist() == [0.25] * 100 + [0.0] * 150


def test_audio_needs_a_feature_extractor():
    with pytest.raises(ValueError, match="Column 'audio' holds audio: save the model's feature extractor"):
        build_domain(sounds([np.zeros(10, dtype=np.float32)] * 2), AUDIO)

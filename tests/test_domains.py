"""Domains: every form of data a user may have, in; examples that fit the model, out."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from scipy.signal import resample_poly
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, ViTImageProcessor, Wav2Vec2FeatureExtractor

from sophon_hf import ClassificationTask, SophonConfig, SophonTrainer
from sophon_hf.data import Stream, build_domain, load_domain, select_classes, split_domain
from sophon_hf.data.domains import class_names, label_column, read_labels
from sophon_hf.data.preparation import ModelInputs

RATE = 1000
ALL = torch.arange
IMAGES = ModelInputs(names=("pixel_values", "labels"), main="pixel_values", labelled=True, channels=3)
GREY = ModelInputs(names=("pixel_values", "labels"), main="pixel_values", labelled=True, channels=1)
UNET = ModelInputs(names=("sample",), main="sample", labelled=False, channels=3, image_size=(4, 6), symmetric=True)
TEXT = ModelInputs(names=("input_ids", "attention_mask", "labels"), main="input_ids", labelled=True)
AUDIO = ModelInputs(names=("input_values", "labels"), main="input_values", labelled=True)
MASKED_AUDIO = ModelInputs(names=("input_values", "attention_mask", "labels"), main="input_values", labelled=True)
POINTS = ModelInputs(names=("x", "labels"), main="x", labelled=True)


def labels(values: list, feature: Any = None, **columns: list) -> datasets.Dataset:
    """A data set with a label column and numbers 0, 1, ... in `row`."""
    dataset = datasets.Dataset.from_dict({"row": list(range(len(values))), "label": values, **columns})
    return dataset if feature is None else dataset.cast_column("label", feature)


def points(count: int = 20) -> datasets.Dataset:
    features = {"x": datasets.List(datasets.Value("float32")), "label": datasets.ClassLabel(names=["a", "b"])}
    x = np.random.default_rng(0).normal(size=(count, 3))
    return datasets.Dataset.from_dict({"x": x, "label": [i % 2 for i in range(count)]}, datasets.Features(features))


def picture(mode: str, size: tuple[int, int] = (6, 4), seed: int = 0) -> Image.Image:
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], *channels), dtype=np.uint8)
    return Image.fromarray(pixels, mode)


def pictures(images: list[Image.Image]) -> datasets.Dataset:
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    columns = {"image": images, "label": [i % 2 for i in range(len(images))]}
    return datasets.Dataset.from_dict(columns, datasets.Features(features))


def write_images(folder: Path, count: int = 3) -> dict[str, list[np.ndarray]]:
    """PNG files in a folder a class; returns the pixels."""
    written = {}
    for name in ("cat", "dog"):
        (folder / "train" / name).mkdir(parents=True)
        images = [picture("RGB", seed=len(name) * 10 + i + (name == "dog") * 5) for i in range(count)]
        for i, image in enumerate(images):
            image.save(folder / "train" / name / f"{i}.png")
        written[name] = [np.asarray(image) for image in images]
    return written


def write_sounds(folder: Path, lengths: tuple[int, ...] = (600, 400, 500), rate: int = RATE) -> dict[str, list]:
    """FLAC files in a folder a class; returns the samples."""
    written = {}
    for number, name in enumerate(("high", "low")):
        (folder / "train" / name).mkdir(parents=True)
        draw = np.random.default_rng(number)
        written[name] = [draw.uniform(-0.5, 0.5, length).astype(np.float32) for length in lengths]
        for i, samples in enumerate(written[name]):
            soundfile.write(folder / "train" / name / f"{i}.flac", samples, rate, subtype="PCM_24")
    return written


def sound_bytes(samples: np.ndarray, rate: int) -> dict[str, Any]:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype="FLOAT")
    return {"bytes": file.getvalue(), "path": None}


def sounds(waves: list[np.ndarray], rate: int = RATE) -> datasets.Dataset:
    columns = {"audio": [sound_bytes(w, rate) for w in waves], "label": [i % 2 for i in range(len(waves))]}
    return datasets.Dataset.from_dict(columns).cast_column("audio", datasets.Audio())


def tokenizer(pad: int = 3) -> PreTrainedTokenizerFast:
    vocabulary = {"[UNK]": 0, "one": 1, "two": 2, "[PAD]": pad}
    words = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", model_max_length=6)


def sentences() -> datasets.Dataset:
    texts = ["one", "one two two", "two two", "one one one one", "two", "two one", "one two nothing", "two " * 9]
    return datasets.Dataset.from_dict({"text": texts, "label": [0, 1] * 4})


# ---- Where a domain comes from ----


def test_objects_of_datasets_give_the_same_examples():
    expected = points()
    for source in (
        expected,
        datasets.DatasetDict({"train": expected, "test": expected.select([0])}),
        expected.to_iterable_dataset(),
        datasets.IterableDatasetDict({"train": expected.to_iterable_dataset()}),
    ):
        loaded = load_domain(source)
        assert loaded.to_dict() == expected.to_dict()
        assert loaded.features == expected.features


def test_split_is_chosen_by_name():
    both = datasets.DatasetDict({"train": points(), "test": points().select([3])})
    assert len(load_domain(both, "test")) == 1
    with pytest.raises(ValueError, match=r"no split 'validation'; it has \['test', 'train'\]"):
        load_domain(both, "validation")


def test_iterable_dataset_of_a_generator_without_features():
    stream = datasets.IterableDataset.from_generator(lambda: ({"x": [i, i], "label": i % 2} for i in range(5)))
    assert load_domain(stream)["x"][4] == [4, 4]


def test_folder_of_parquet_files(tmp_path):
    points(20).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    points(4).to_parquet(tmp_path / "test-00000-of-00001.parquet")
    for folder in (tmp_path, str(tmp_path)):
        assert load_domain(folder).to_dict() == points(20).to_dict()
    assert len(load_domain(tmp_path, "test")) == 4


def test_folder_of_images(tmp_path):
    written = write_images(tmp_path)
    dataset = load_domain(tmp_path)
    domain = build_domain(dataset, IMAGES)
    assert domain.class_names == ["cat", "dog"]
    assert Counter(domain.labels.tolist()) == {0: 3, 1: 3}
    batch = domain.rows(ALL(6))
    for pixels, label in zip(batch["pixel_values"], batch["labels"], strict=True):
        assert any(
            torch.equal(pixels, torch.tensor(w / np.float32(255)).permute(2, 0, 1))
            for w in written[["cat", "dog"][label]]
        )


def test_folder_of_sounds(tmp_path):
    written = write_sounds(tmp_path, lengths=(500, 500))
    extractor = Wav2Vec2FeatureExtractor(sampling_rate=RATE, do_normalize=False)
    domain = build_domain(load_domain(tmp_path), AUDIO, extractor)
    assert domain.class_names == ["high", "low"]
    batch = domain.rows(ALL(4))
    assert batch["input_values"].shape == (4, 500)
    for samples, label in zip(batch["input_values"], batch["labels"], strict=True):
        expected = np.stack(written[["high", "low"][label]])
        assert np.abs(expected - samples.numpy()).max(axis=1).min() < 1e-6


def test_sounds_may_come_as_a_stream():
    waves = [np.random.default_rng(i).normal(0, 0.1, 100).astype(np.float32) for i in range(4)]
    dataset = load_domain(sounds(waves).to_iterable_dataset())
    extractor = Wav2Vec2FeatureExtractor(sampling_rate=RATE, do_normalize=False)
    samples = build_domain(dataset, AUDIO, extractor).rows(ALL(4))["input_values"]
    torch.testing.assert_close(samples.numpy(), np.stack(waves))


def test_halves_and_classes_of_a_folder_of_sounds(tmp_path):
    write_sounds(tmp_path)
    dataset = load_domain(tmp_path)
    defender, adversary = split_domain(dataset)
    assert len(defender) + len(adversary) == 6
    low = build_domain(select_classes(dataset, ["low"]), AUDIO, Wav2Vec2FeatureExtractor(sampling_rate=RATE))
    assert len(low) == 3 and low.class_names == ["low"]


def test_sources_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no folder './nowhere'"):
        load_domain("./nowhere")
    with pytest.raises(FileNotFoundError, match=r"There is no folder '.*nowhere'"):
        load_domain(tmp_path / "nowhere")
    with pytest.raises(ConnectionError, match="the Hub cannot be reached"):
        load_domain("someone/something")
    with pytest.raises(TypeError, match="not list"):
        load_domain([1, 2])
    with pytest.raises(ValueError, match="The data set is empty"):
        load_domain(points().filter(lambda row: False))


# ---- Labels ----


def test_label_column_is_found():
    name = datasets.ClassLabel(names=["a", "b"])
    both = datasets.Dataset.from_dict({"label": [0], "labels": [1], "kind": [0]})
    assert label_column(both) == "labels"
    assert label_column(both, "kind") == "kind"
    only = datasets.Dataset.from_dict({"n": [1], "kind": [0]}).cast_column("kind", name)
    assert label_column(only) == "kind"
    assert label_column(datasets.Dataset.from_dict({"n": [1]})) is None


def test_label_column_errors():
    name = datasets.ClassLabel(names=["a", "b"])
    two = datasets.Dataset.from_dict({"fine": [1], "coarse": [0]}).cast_column("fine", name).cast_column("coarse", name)
    with pytest.raises(ValueError, match=r"several label columns, \['fine', 'coarse'\]"):
        label_column(two)
    assert label_column(two, "coarse") == "coarse"
    with pytest.raises(ValueError, match="no column 'medium'; the data set has"):
        label_column(two, "medium")
    with pytest.raises(ValueError, match=r"restricted domain has no label column among \['x'\]"):
        build_domain(points().remove_columns("label"), POINTS, name="restricted")


def test_labels_that_are_no_class_indices():
    with pytest.raises(ValueError, match="2 examples have no label in column 'label', the first at row 1"):
        read_labels(labels([0, None, 1, None]), "label")
    with pytest.raises(ValueError, match="negative labels"):
        read_labels(labels([0, 1, -1]), "label")
    with pytest.raises(ValueError, match="holds float64 values"):
        read_labels(labels([0.0, 1.0]), "label")
    with pytest.raises(ValueError, match="class_encode_column"):
        read_labels(labels(["cat", "dog"]), "label")
    with pytest.raises(ValueError, match=r"of shape \(2,\)"):
        read_labels(labels([[0, 1], [1, 0]]), "label")
    for bad in ([0, None], [0, -1], [0.5, 1.0]):
        with pytest.raises(ValueError, match="column 'label'|Column 'label'"):
            build_domain(labels(bad, x=[[0.0], [1.0]]).remove_columns("row"), POINTS)


def test_class_names_come_from_the_features_or_are_numbered():
    assert class_names(labels([0, 0], datasets.ClassLabel(names=["cat", "dog"])), "label") == ["cat", "dog"]
    assert class_names(labels([0, 2]), "label") == ["class 0", "class 1", "class 2"]


def test_select_classes_keeps_and_renumbers_in_the_order_given():
    dataset = labels([0, 1, 2, 2, 1, 0, 2], datasets.ClassLabel(names=["cat", "dog", "bird"]))
    kept = select_classes(dataset, ["bird", "cat"])
    assert list(zip(kept["row"], kept["label"], strict=True)) == [(0, 1), (2, 0), (3, 0), (5, 1), (6, 0)]
    assert kept.features["label"].names == ["bird", "cat"]
    assert select_classes(labels([0, 1, 2]), ["class 2"])["row"][:] == [2]


def test_select_classes_refuses_what_it_does_not_know():
    named = labels([0, 1], datasets.ClassLabel(names=["cat", "dog"]))
    with pytest.raises(ValueError, match=r"\['cow'\] are no classes of the data set, which has \['cat', 'dog'\]"):
        select_classes(named, ["cat", "cow"])
    with pytest.raises(ValueError, match="has no label column"):
        select_classes(named.remove_columns("label"), ["cat"])


def test_select_classes_keeps_images_and_the_rest_of_a_selection():
    images = [picture("RGB", seed=i) for i in range(6)]
    kept = select_classes(pictures(images).select([5, 3, 1, 0]), ["b"])
    assert [np.asarray(image).tolist() for image in kept["image"]] == [
        np.asarray(images[i]).tolist() for i in (5, 3, 1)
    ]


# ---- The defender's and the adversary's half ----

UNEVEN = [0] * 31 + [1] * 17 + [2] * 1 + [3] * 8


def test_a_configuration_of_a_hub_data_set_is_named_behind_a_colon(monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *names: SimpleNamespace(name="parquet", hash="a" * 40))
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *names: asked.append(names) or datasets.DatasetDict(train=points())
    )
    load_domain("owner/name:small")
    load_domain("owner/name")
    assert asked == [("owner/name", "small"), ("owner/name", None)]


@pytest.mark.parametrize("count", [1, 2, 57])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_halves_are_disjoint_equal_and_stratified(count, seed):
    dataset = labels(UNEVEN[:count])
    one, other = (part["row"][:] for part in split_domain(dataset, seed=seed))
    assert sorted(one + other) == list(range(count))
    assert one == sorted(one) and other == sorted(other)
    assert abs(len(one) - len(other)) <= 1
    shares = [Counter(UNEVEN[row] for row in part) for part in (one, other)]
    assert all(abs(shares[0][c] - shares[1][c]) <= 1 for c in range(4))


@pytest.mark.parametrize("share", [0.1, 0.25, 0.9])
def test_share_holds_in_every_class(share):
    dataset = labels(UNEVEN)
    first, second = split_domain(dataset, share=share)
    assert len(first) + len(second) == len(UNEVEN)
    assert abs(len(first) - share * len(UNEVEN)) < 1
    for c, count in Counter(UNEVEN).items():
        assert abs(first["label"][:].count(c) - share * count) < 1


def test_split_follows_its_seed_alone():
    dataset = labels(UNEVEN)
    halves = [split_domain(dataset, seed=seed)[0]["row"][:] for seed in (0, 0, 1)]
    np.random.seed(5)
    torch.manual_seed(5)
    assert halves[0] == halves[1] == split_domain(dataset, seed=0)[0]["row"][:]
    assert halves[0] != halves[2]


def test_split_does_not_follow_the_order_of_the_data():
    """Neighbours, such as frames of one film, must not be dealt out alternately or in runs."""
    together = []
    for seed in range(100):
        first = set(split_domain(labels([0] * 40), seed=seed)[0]["row"][:])
        together.append((0 in first) == (1 in first))
    # Two given rows land in one half with probability 19 / 39.
    assert abs(np.mean(together) - 19 / 39) < 0.16


def test_split_without_labels_is_plainly_random():
    dataset = datasets.Dataset.from_dict({"row": list(range(11))})
    one, other = (part["row"][:] for part in split_domain(dataset))
    assert sorted(one + other) == list(range(11)) and abs(len(one) - len(other)) == 1
    assert one != list(range(0, 11, 2)) and one != list(range(1, 11, 2))
    assert split_domain(dataset, seed=1)[0]["row"][:] != one


def test_split_by_a_named_column():
    dataset = labels([0, 1] * 8, kind=[0] * 8 + [1] * 8)
    assert Counter(split_domain(dataset, column="kind")[0]["kind"][:]) == {0: 4, 1: 4}


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
    with pytest.raises(ValueError, match="different sizes.*Pass a `processing_class`"):
        build_domain(mixed, IMAGES)
    processor = ViTImageProcessor(size={"height": 5, "width": 5})
    assert build_domain(mixed, IMAGES, processor).rows(ALL(2))["pixel_values"].shape == (2, 3, 5, 5)


def test_images_for_a_model_of_five_channels_are_refused():
    five = ModelInputs(names=("x",), main="x", labelled=True, channels=5)
    with pytest.raises(ValueError, match="takes 5 channels, but images have 1, 3 or 4"):
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
    with pytest.raises(ValueError, match="Column 'text' holds text: pass the model's tokenizer"):
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


def test_audio_of_mixed_lengths_is_padded_and_masked():
    waves = [np.full(length, 0.25, dtype=np.float32) for length in (400, 250, 100)]
    extractor = Wav2Vec2FeatureExtractor(sampling_rate=RATE, do_normalize=False, return_attention_mask=True)
    domain = build_domain(sounds(waves), MASKED_AUDIO, extractor)
    batch = domain.rows(torch.tensor([1, 2]))
    assert batch["attention_mask"].sum(dim=1).tolist() == [250, 100]
    assert batch["input_values"].shape == (2, 250)
    assert batch["input_values"][1].tolist() == [0.25] * 100 + [0.0] * 150


def test_audio_needs_a_feature_extractor():
    with pytest.raises(ValueError, match="Column 'audio' holds audio: pass the model's feature extractor"):
        build_domain(sounds([np.zeros(10, dtype=np.float32)] * 2), AUDIO)


# ---- Ready columns ----


def test_ready_columns_are_used_as_they_are():
    domain = build_domain(points(), POINTS)
    batch = domain.rows(torch.tensor([7, 2]))
    torch.testing.assert_close(batch["x"], torch.tensor([points()["x"][i] for i in (7, 2)]))
    assert batch["x"].dtype == torch.float32 and batch["labels"].tolist() == [1, 0]


def test_single_column_of_numbers_goes_to_the_main_input():
    batch = build_domain(points().rename_column("x", "measurements"), POINTS).rows(ALL(2))
    assert set(batch) == {"x", "labels"}


def test_column_that_no_model_takes_is_refused():
    dataset = datasets.Dataset.from_dict({"when": [1, 2], "label": [0, 1]})
    with pytest.raises(ValueError, match=r"has no column that the model could take: it has \['when'\]"):
        build_domain(dataset, POINTS)


def test_nan_is_named_with_its_row_and_domain():
    x = np.ones((300, 2))
    x[[123, 280], [0, 1]] = np.nan, np.inf
    dataset = datasets.Dataset.from_dict({"x": x, "label": [0, 1] * 150})
    message = "2 examples of the restricted domain hold NaN or infinity in 'x', the first at row 123"
    with pytest.raises(ValueError, match=message):
        build_domain(dataset, POINTS, name="restricted")
    lazy = build_domain(dataset, POINTS, name="restricted", memory_limit=0)
    lazy.rows(torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="1 examples of the restricted domain .* the first at row 280"):
        lazy.rows(torch.tensor([5, 280, 7]))


def test_trainer_names_the_row_of_the_data_that_it_was_given(tmp_path, model):
    x = np.random.default_rng(0).normal(size=(40, 6))
    x[33, 2] = np.nan
    dataset = datasets.Dataset.from_dict({"x": x, "label": [i % 3 for i in range(40)]})
    with pytest.raises(ValueError, match="the first at row 33"):
        SophonTrainer(model, dataset, dataset, SophonConfig(str(tmp_path), use_cpu=True))


# ---- In memory, and on the fly ----


def both_paths(dataset: datasets.Dataset, needs: ModelInputs, processing: Any = None):
    return build_domain(dataset, needs, processing), build_domain(dataset, needs, processing, memory_limit=0)


def waves_of_mixed_lengths() -> datasets.Dataset:
    return sounds([np.random.default_rng(i).normal(0, 0.1, 200 + 40 * i).astype(np.float32) for i in range(8)])


@pytest.mark.parametrize(
    ("dataset", "needs", "processing"),
    [
        (lambda: points(8), POINTS, lambda: None),
        (lambda: pictures([picture("RGB", seed=i) for i in range(8)]), IMAGES, lambda: None),
        (lambda: pictures([picture("RGB", seed=i) for i in range(8)]), UNET, lambda: None),
        (sentences, TEXT, tokenizer),
        (waves_of_mixed_lengths, MASKED_AUDIO, lambda: Wav2Vec2FeatureExtractor(sampling_rate=RATE, return_attention_mask=True)),
        (waves_of_mixed_lengths, AUDIO, lambda: Wav2Vec2FeatureExtractor(sampling_rate=RATE)),
    ],
    ids=["points", "images", "diffusion", "text", "audio with a mask", "audio without a mask"],
)  # fmt: skip
def test_batches_on_the_fly_are_those_in_memory(dataset, needs, processing):
    task = ClassificationTask()
    streams = [Stream(domain, task, seed=3).batches(3) for domain in both_paths(dataset(), needs, processing())]
    for _ in range(4):
        one, other = next(streams[0]), next(streams[1])
        assert set(one) == set(other)
        for name in one:
            assert one[name].dtype == other[name].dtype
            torch.testing.assert_close(one[name], other[name], rtol=0, atol=0)


def test_memory_limit_counts_bytes():
    # 20 rows of 3 float32 and 1 int64.
    assert build_domain(points(), POINTS, memory_limit=20 * (3 * 4 + 8))._tensors is not None
    assert build_domain(points(), POINTS, memory_limit=20 * (3 * 4 + 8) - 1)._tensors is None


@pytest.mark.parametrize("memory_limit", [2**20, 0])
def test_fingerprint_follows_the_content(memory_limit):
    def mark(dataset: datasets.Dataset) -> str:
        return build_domain(dataset, POINTS, memory_limit=memory_limit).fingerprint

    assert mark(points()) == mark(points())
    changed = points().to_dict()
    changed["x"][19][2] += 1e-3
    assert mark(datasets.Dataset.from_dict(changed, points().features)) != mark(points())
    changed = points().to_dict()
    changed["label"][0] = 1
    assert mark(datasets.Dataset.from_dict(changed, points().features)) != mark(points())
    assert mark(points().select(range(19))) != mark(points())
    assert mark(points().select([1, 0, *range(2, 20)])) != mark(points())


# ---- A transform of the user's ----


def jitter(rows: dict) -> dict:
    noise = torch.rand(len(rows["x"]), 3) + np.random.rand() + np.random.default_rng(0).random()
    return {"x": torch.tensor(rows["x"]) + noise, "label": rows["label"]}


def test_transform_is_not_frozen_but_follows_the_seed():
    domain = build_domain(points().with_transform(jitter), POINTS)
    state = torch.get_rng_state(), np.random.get_state()[1].tolist()
    one, again, other = (domain.rows(ALL(4), [seed] * 4)["x"] for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state[0]) and np.random.get_state()[1].tolist() == state[1]


def test_transform_differs_from_epoch_to_epoch_and_is_the_same_again():
    domain = build_domain(points(4).with_transform(jitter), POINTS)
    stream = Stream(domain, ClassificationTask(), seed=1)
    first, second = stream.batch(0, 4), stream.batch(4, 4)
    order = [batch["x"].sum(dim=1).argsort() for batch in (first, second)]
    assert not torch.equal(first["x"][order[0]], second["x"][order[1]])
    assert torch.equal(Stream(domain, ClassificationTask(), seed=1).batch(4, 4)["x"], second["x"])


def test_transform_may_rename_the_labels_or_leave_them_out():
    """The domain has read them from the data set itself."""

    def transform(rows: dict) -> dict:
        return {"pixel_values": [torch.tensor(np.asarray(i) / 255.0) for i in rows["image"]], "labels": rows["label"]}

    dataset = pictures([picture("RGB", seed=i) for i in range(4)]).with_transform(transform)
    domain = build_domain(dataset, IMAGES)
    assert domain.labels.tolist() == [0, 1, 0, 1]
    assert domain.rows(ALL(4))["labels"].tolist() == [0, 1, 0, 1]


def test_halves_of_a_transformed_domain_keep_the_transform():
    halves = split_domain(points().with_transform(jitter))
    assert all(half.format["type"] == "custom" for half in halves)
    chosen = select_classes(points().with_transform(jitter), ["b"])
    assert chosen.format["type"] == "custom"
    assert build_domain(chosen, POINTS).labels.tolist() == [0] * 10

"""Domains: every form of data a user may have, in; examples that fit the model, out."""

from __future__ import annotations

import hashlib
import math
import pickle
from collections import Counter
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from raw_data import (
    ALL,
    AUDIO,
    IMAGES,
    MASKED_AUDIO,
    POINTS,
    RATE,
    TEXT,
    UNET,
    picture,
    pictures,
    points,
    sentences,
    sounds,
    tokenizer,
    write_images,
    write_sounds,
)
from transformers import ViTImageProcessor, Wav2Vec2FeatureExtractor

from sophon_hf import ClassificationTask, SophonConfig, SophonTrainer
from sophon_hf.data.batches import Stream
from sophon_hf.data.domain import build_domain
from sophon_hf.data.labels import select_classes, split_domain
from sophon_hf.data.loading import load_domain
from sophon_hf.data.preprocessing import ModelInputs

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
    assert domain.classes.names == ("cat", "dog")
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
    assert domain.classes.names == ("high", "low")
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
    assert len(low) == 3 and low.classes.names == ("low",)


@pytest.mark.parametrize(
    ("dataset", "needs", "processor"),
    [
        (points(4), POINTS, None),
        (pictures([picture("RGB")] * 4), IMAGES, None),
        (sentences(), TEXT, tokenizer()),
        (sounds([np.ones(100, dtype=np.float32)] * 4), AUDIO, Wav2Vec2FeatureExtractor(sampling_rate=RATE)),
    ],
    ids=["tensors", "images", "text", "audio"],
)
def test_a_domain_reaches_the_workers_of_a_data_loader(dataset, needs, processor):
    """Which do not inherit it everywhere."""
    domain = build_domain(dataset, needs, processor)
    there = pickle.loads(pickle.dumps(domain))
    torch.testing.assert_close(there.rows(ALL(4)), domain.rows(ALL(4)), rtol=0, atol=0)


def test_sources_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no file or folder './nowhere'"):
        load_domain("./nowhere")
    with pytest.raises(FileNotFoundError, match=r"There is no file or folder '.*nowhere'"):
        load_domain(tmp_path / "nowhere")
    with pytest.raises(ConnectionError, match="the Hub cannot be reached"):
        load_domain("someone/something")
    with pytest.raises(TypeError, match="not list"):
        load_domain([1, 2])
    with pytest.raises(ValueError, match="The data set is empty"):
        load_domain(points().filter(lambda row: False))


def test_a_configuration_of_a_hub_data_set_is_named_behind_a_colon(monkeypatch):
    asked, loaded = [], datasets.DatasetDict(train=points())
    builder = SimpleNamespace(
        name="parquet", hash="a" * 40, download_and_prepare=lambda: None, as_dataset=lambda: loaded
    )
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *names: asked.append(names) or builder)
    load_domain("owner/name:small")
    load_domain("owner/name")
    assert asked == [("owner/name", "small"), ("owner/name", None)]


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
        (
            waves_of_mixed_lengths,
            MASKED_AUDIO,
            lambda: Wav2Vec2FeatureExtractor(sampling_rate=RATE, return_attention_mask=True),
        ),
        (waves_of_mixed_lengths, AUDIO, lambda: Wav2Vec2FeatureExtractor(sampling_rate=RATE)),
    ],
    ids=["points", "images", "diffusion", "text", "audio with a mask", "audio without a mask"],
)
def test_batches_on_the_fly_are_those_in_memory(dataset, needs, processing):
    task = ClassificationTask()
    streams = [Stream(domain, task.collate, seed=3).batches(3) for domain in both_paths(dataset(), needs, processing())]
    for _ in range(4):
        one, other = next(streams[0]), next(streams[1])
        assert set(one) == set(other)
        for name in one:
            assert one[name].dtype == other[name].dtype
            torch.testing.assert_close(one[name], other[name], rtol=0, atol=0)


def test_memory_limit_counts_bytes():
    # 20 rows of 3 float32 and 1 int64. What is kept in memory is checked at once, the rest when it is read.
    dataset = points().map(lambda row, index: {"x": [math.nan] * 3} if index == 19 else row, with_indices=True)
    with pytest.raises(ValueError, match="the first at row 19"):
        build_domain(dataset, POINTS, memory_limit=20 * (3 * 4 + 8))
    assert len(build_domain(dataset, POINTS, memory_limit=20 * (3 * 4 + 8) - 1)) == 20


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


@pytest.mark.parametrize("transform", [None, lambda rows: rows], ids=["plain", "transformed"])
def test_fingerprint_of_what_does_not_fit_in_memory_follows_the_processor(transform):
    dataset = pictures([picture("RGB", seed=i) for i in range(8)])
    dataset = dataset if transform is None else dataset.with_transform(transform)

    def mark(**settings) -> str:
        processor = ViTImageProcessor(size={"height": 5, "width": 5}, **settings)
        return build_domain(dataset, IMAGES, processor, memory_limit=0).fingerprint

    assert mark() == mark()
    assert mark() != mark(image_mean=[0.1, 0.2, 0.3])


def test_fingerprint_in_memory_is_a_hash_of_the_tensors_alone():
    """Finished attacks are found again by it."""
    digest = hashlib.blake2b(digest_size=16)
    for name, values in sorted(build_domain(points(), POINTS).rows(ALL(20)).items()):
        digest.update(name.encode() + values.numpy().tobytes())
    assert build_domain(points(), POINTS).fingerprint == digest.hexdigest()


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
    stream = Stream(domain, ClassificationTask().collate, seed=1)
    first, second = stream.batch(0, 4), stream.batch(4, 4)
    order = [batch["x"].sum(dim=1).argsort() for batch in (first, second)]
    assert not torch.equal(first["x"][order[0]], second["x"][order[1]])
    assert torch.equal(Stream(domain, ClassificationTask().collate, seed=1).batch(4, 4)["x"], second["x"])


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


def test_examples_are_recognised_under_a_random_transform():
    plain = build_domain(points(), POINTS)
    one, other = (build_domain(points().with_transform(jitter), POINTS) for _ in range(2))
    hashes = one.example_hashes(raw=True)
    assert hashes == other.example_hashes(raw=True) == plain.example_hashes(raw=True)
    assert len(set(hashes)) == 20 and one.transformed and not plain.transformed
    assert one.example_hashes() != other.example_hashes()


def test_raw_examples_are_told_apart_by_their_inputs_alone():
    def raw(images: list[Image.Image], **columns: list) -> list[str]:
        dataset = pictures(images)
        for name, values in columns.items():
            dataset = dataset.add_column(name, values)
        return build_domain(dataset, IMAGES).example_hashes(raw=True)

    one, two = picture("RGB", seed=1), picture("RGB", seed=2)
    first = raw([one, two, one])
    assert first[0] == first[2] != first[1], "the label, which differs, is left out"
    assert raw([one, two], number=[3, 4], file=["a.png", "b.png"]) == first[:2]
    waves = [np.full(10, 0.1, dtype=np.float32), np.full(10, 0.2, dtype=np.float32)]
    extractor = Wav2Vec2FeatureExtractor(sampling_rate=RATE)
    heard = sounds([*waves, waves[0]]).cast_column("audio", datasets.Audio(decode=False))
    renamed = heard.map(lambda row, i: {"audio": {**row["audio"], "path": f"{i}.wav"}}, with_indices=True)
    for dataset in (heard, renamed):
        assert len(set(build_domain(dataset, AUDIO, extractor).example_hashes(raw=True))) == 2
    spoken = build_domain(sentences(), TEXT, tokenizer()).example_hashes(raw=True)
    assert len(set(spoken)) == len(spoken)

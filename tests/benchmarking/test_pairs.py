"""The packaged pairs: letters as the demo has it, digits and ages from folders in the forms of the Hub."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from sophon_hf.benchmarking import PAIRS
from sophon_hf.benchmarking.pairs import Pair, load_pair
from sophon_hf.tasks.base import infer_task

AGES = ["0-2", "3-9", "10-19", "20-29", "30-39", "40-49", "50-59", "60-69", "more than 70"]


def write(folder: Path, image: str, label: str, names: list[str], size: int, mode: str, test: str, seed: int) -> None:
    generator = np.random.default_rng(seed)
    features = datasets.Features({image: datasets.Image(), label: datasets.ClassLabel(names=names)})
    shape = (size, size) if mode == "L" else (size, size, 3)
    folder.mkdir()
    for split, rows in (("train", 180), (test, 60)):
        pixels = generator.integers(0, 256, (rows, *shape), dtype=np.uint8)
        columns = {image: [Image.fromarray(p, mode) for p in pixels], label: [i % len(names) for i in range(rows)]}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}.parquet")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    write(tmp_path / "cifar10", "img", "label", list("abcdefghij"), 32, "RGB", "test", 0)
    write(tmp_path / "mnist", "image", "label", list("0123456789"), 28, "L", "test", 1)
    write(tmp_path / "face_ages", "image", "age", AGES, 40, "RGB", "test", 2)
    monkeypatch.setenv("SOPHON_DATA", str(tmp_path))
    return tmp_path


def pictures(dataset: datasets.Dataset) -> set[bytes]:
    return {picture.tobytes() for picture in dataset["image"]}


def check_halves(pair: Pair) -> None:
    parts = [*pair.defender.values(), pair.adversary, pair.test]
    assert len(set().union(*map(pictures, parts))) == sum(len(pictures(part)) for part in parts)
    assert abs(len(pair.defender["train"]) + len(pair.defender["validation"]) - len(pair.adversary)) <= 1
    assert sorted(pair.original) == ["test", "train", "validation"]


def test_letters_needs_nothing_and_keeps_the_halves_apart():
    pair = load_pair("letters")
    check_halves(pair)
    assert (pair.examples, len(pair.seeds), pair.epochs, len(pair.attacks)) == ((20,), 10, 20, 8)
    assert set(pair.presets) == {"paper", "representation"}


@pytest.mark.parametrize(("name", "classes"), [("digits", 10), ("ages", 5)])
def test_pairs_of_the_hub_come_from_folders(name, classes, folder):
    pair = load_pair(name)
    check_halves(pair)
    assert pair.adversary.features["label"].num_classes == classes
    for part in (*pair.original.values(), *pair.defender.values(), pair.adversary, pair.test):
        assert part.column_names == ["image", "label"]
        assert {(picture.size, picture.mode) for picture in part["image"]} == {((32, 32), "RGB")}
    model = pair.model(10)
    assert infer_task(model).inputs(model).channels == 3


def test_ages_become_five_groups_of_their_own_faces(folder):
    pair = load_pair("ages")
    names = pair.adversary.features["label"].names
    assert names == ["0 to 9", "10 to 19", "20 to 39", "40 to 59", "60 and over"]
    parts = [*pair.defender.values(), pair.adversary]
    counts = np.bincount(np.concatenate([part["label"] for part in parts]))
    assert counts.tolist() == [40, 20, 40, 40, 40]  # 20 of each of the nine.


def test_digits_are_padded_and_not_stretched(folder):
    picture = np.array(load_pair("digits").test[0]["image"])
    border = np.concatenate(
        [picture[:2].ravel(), picture[-2:].ravel(), picture[:, :2].ravel(), picture[:, -2:].ravel()]
    )
    assert border.max() == 0 and picture[2:-2, 2:-2].max() > 0


def test_what_is_missing_is_named(folder, monkeypatch):
    assert PAIRS == ("letters", "digits", "ages")
    with pytest.raises(ValueError, match="There is no pair 'leters'. Did you mean 'letters'?"):
        load_pair("leters")
    monkeypatch.setenv("SOPHON_DATA", str(folder / "mnist"))
    with pytest.raises(FileNotFoundError, match="there is no folder 'cifar10' in it|there is no folder 'mnist' in it"):
        load_pair("digits")

"""The toy data: their sizes, their names, and that what is moved differs from what is not."""

from __future__ import annotations

import numpy as np
import pytest

from sophon_hf.data.toy import handwritten_digits, printed_letters


@pytest.mark.parametrize("classes", [10, 23])
def test_letters_have_the_classes_that_were_asked_for_and_no_digit_beside_them(classes):
    letters = printed_letters(100, classes=classes)
    assert {split: len(rows) for split, rows in letters.items()} == {"train": 100, "test": 500}
    names = letters["train"].features["label"].names
    assert len(names) == len(set(names)) == classes and not set(names) & set("IOQ0123456789")
    assert set(letters["test"]["label"]) == set(range(classes))


def test_moved_digits_are_the_same_digits_elsewhere():
    still, moved = handwritten_digits(), handwritten_digits(moved=True)
    assert still["test"]["label"] == moved["test"]["label"]

    def centres(rows) -> np.ndarray:
        pixels = np.stack([np.asarray(picture, dtype=float) for picture in rows["image"]])
        assert pixels.shape[1:] == (32, 32) and pixels.max() <= 255
        mass = pixels.sum(axis=(1, 2))
        assert (mass > 0).all()
        return (pixels.sum(axis=1) @ np.arange(32)) / mass

    assert centres(moved["test"]).std() > 1.5 * centres(still["test"]).std()

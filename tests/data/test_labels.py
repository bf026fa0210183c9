"""Class labels, selections by them, and the defender's and the adversary's half."""

from __future__ import annotations

from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from raw_data import POINTS, labels, picture, pictures, points

from sophon_hf.data.domain import build_domain
from sophon_hf.data.labels import class_names, label_column, read_labels, select_classes, split_domain

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

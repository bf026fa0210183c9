"""Class labels, selections by them, and the defender's and the adversary's half."""

from __future__ import annotations

from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from raw_data import POINTS, labels, picture, pictures, points

from sophon_hf.data.domain import build_domain
from sophon_hf.data.labels import label_column, number_classes, read_labels, select_classes, split_domain
from sophon_hf.data.preprocessing import ModelInputs

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


def test_labels_that_are_no_classes():
    for values, message in (
        ([0, None, 1, None], "2 examples have no label in column 'label' of the given domain, the first at row 1"),
        (["a", "", "b"], "1 examples have no label in column 'label' of the given domain, the first at row 1"),
        ([0.0, float("nan")], "1 examples have no label in column 'label' of the given domain, the first at row 1"),
        (
            [[0, 1], [1, 0]],
            r"holds \[0, 1\] at row 0, which is no class: a label is a name, a number, or true or false",
        ),
        (np.linspace(0, 5, 40).tolist(), "40 different values in 40 rows, which are measurements, not classes"),
    ):
        with pytest.raises(ValueError, match=message):
            read_labels(labels(values), "label")
    named = labels([1, -1], datasets.ClassLabel(names=["a", "b"]))
    with pytest.raises(
        ValueError, match=r"1 examples have no label .*, the first at row 1 .*as `skip_unreadable` does"
    ):
        read_labels(named, "label")
    with pytest.raises(ValueError, match="olumn 'label' of the restricted domain"):
        build_domain(labels([0, None], x=[[0.0], [1.0]]).remove_columns("row"), POINTS, name="restricted")


@pytest.mark.parametrize(("values", "what"), [([0, 1, -1], "-1 beside 0"), ([-1.0, -1.0], "-1 only")])
def test_minus_one_is_a_class_or_none_as_the_user_says(values, what):
    dataset = labels(values, x=[[0.0]] * len(values)).remove_columns("row")
    message = (
        f"Column 'label' of the restricted domain holds {what}, which often .*`--restricted_classes`.*select_classes"
    )
    with pytest.raises(ValueError, match=message):
        build_domain(dataset, POINTS, name="restricted")
    classes = select_classes(dataset, sorted({int(value) for value in values}))
    domain = build_domain(classes, POINTS, name="restricted")
    assert domain.classes.names == tuple(str(value) for value in sorted({int(value) for value in values}))
    assert domain.labels.tolist() == [int(value) + 1 for value in values]
    if 1 in values:
        assert build_domain(select_classes(dataset, [0, 1]), POINTS, name="restricted").labels.tolist() == [0, 1]
    called = ModelInputs(("x", "labels"), "x", labelled=True, class_names=("1", "0", "-1"))
    assert build_domain(dataset, called, name="original").labels.tolist() == [1 - int(value) for value in values]


NAMED = ModelInputs(("x", "labels"), "x", labelled=True, class_names=("zero", "one", "two", "three"))
NUMBERED = ModelInputs(("x", "labels"), "x", labelled=True, class_names=tuple(f"LABEL_{i}" for i in range(4)))


def numbered(values: list, needs: ModelInputs = POINTS, name: str = "restricted", feature=None) -> list[int]:
    dataset = labels(values, feature)
    return number_classes(name, [dataset], needs).read(dataset).tolist()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["dog", "cat", "dog"], [1, 0, 1]),
        ([True, False, True], [1, 0, 1]),
        ([2.0, 1.0, 2.0], [1, 0, 1]),
        ([0.5, 2.5, 1.5], [0, 2, 1]),
        ([3, 1, 2], [2, 0, 1]),
        ([1440764, 2102040, 1440764], [0, 1, 0]),
        ([-1, 1, 1], [0, 1, 1]),
        (["10", "9", "1"], [2, 1, 0]),
        ([1, 0, 2], [1, 0, 2]),
    ],
    ids=["names", "booleans", "whole floats", "floats", "from 1 on", "offsets", "minus one", "digits", "as they are"],
)
def test_restricted_labels_are_numbered_in_sorted_order(values, expected, caplog):
    assert numbered(values) == expected
    classes = number_classes("restricted", [labels(values)], POINTS)
    assert len(classes.names) == len(set(values)), "a class count is the number of classes"
    first = {repr(["dog", "cat", "dog"]): "0 = 'cat', 1 = 'dog'.", repr([2.0, 1.0, 2.0]): "0 = '1', 1 = '2'."}
    assert ("classes are numbered in sorted order: " in caplog.text) != (values == [1, 0, 2])
    assert first.get(repr(values), "") in caplog.text


def test_all_splits_of_a_domain_share_their_numbers(caplog):
    training, test = labels(["b", "c"]), labels(["a", "c"])
    classes = number_classes("restricted", [training, test], POINTS)
    assert classes.read(training).tolist() == [1, 2] and classes.read(test).tolist() == [0, 2]
    assert caplog.text.count("numbered in sorted order") == 1
    # Folders of a test split that lacks a class are numbered by their names too.
    folders = (
        labels([0, 1], datasets.ClassLabel(names=["a", "c"])),
        labels([0, 1, 2], datasets.ClassLabel(names=[*"abc"])),
    )
    classes = number_classes("restricted", [folders[1], folders[0]], POINTS)
    assert classes.read(folders[0]).tolist() == [0, 2]
    with pytest.raises(ValueError, match="names in one split and numbers in another"):
        number_classes("restricted", [labels(["a", "b"]), labels([0, 1])], POINTS)
    with pytest.raises(ValueError, match=r"splits call the label column \['label', 'labels'\]"):
        number_classes("restricted", [labels([0, 1]), labels([0, 1]).rename_column("label", "labels")], POINTS)


@pytest.mark.parametrize("name", ["original", "restricted"])
def test_names_that_the_model_knows_get_its_numbers(name, caplog):
    assert numbered(["two", "zero", "three"], NAMED, name) == [2, 0, 3]
    assert (
        f"The {name} domain's classes get the model's numbers by their names: 0 = 'zero', 2 = 'two', 3 = 'three'"
        in caplog.text
    )
    folders = datasets.ClassLabel(names=["one", "three", "two", "zero"])
    assert numbered([0, 1, 2, 3], NAMED, name, folders) == [1, 3, 2, 0]
    assert numbered(["TWO", " Zero"], NAMED, name) == [2, 0]
    assert numbered(["LABEL_2", "LABEL_0"], NUMBERED, name) == [2, 0]
    caplog.clear()
    assert numbered([0, 1, 3], NAMED, name, datasets.ClassLabel(names=list(NAMED.class_names))) == [0, 1, 3]
    assert not caplog.text, "nothing is said where nothing changes"


def test_restricted_names_of_which_the_model_knows_some_are_numbered_by_themselves():
    assert numbered(["two", "nine"], NAMED) == [1, 0]


@pytest.mark.parametrize("needs", [NAMED, NUMBERED, POINTS], ids=["named", "numbered", "unknown"])
def test_original_numbers_are_the_model_s(needs):
    for values in ([3, 1], [3.0, 1.0], ["3", "1"]):
        assert numbered(values, needs, "original") == [3, 1]
    folders = datasets.ClassLabel(names=sorted(map(str, range(4))))
    assert numbered([3, 1], needs, "original", folders) == [3, 1]
    classes = number_classes("original", [labels([3, 1, 3])], needs)
    assert len(classes.names) == 2, "a class count is the number of classes"


def test_what_numbers_stand_for_is_told_since_they_could_start_at_1(caplog):
    assert numbered([1, 2], NAMED, "original") == [1, 2]
    assert "numbers are the model's outputs, from 0 on: 1 = 'one', 2 = 'two'." in caplog.text


def test_folders_that_are_called_by_numbers_are_read_alphabetically_and_numbered_all_the_same():
    folders = datasets.ClassLabel(names=sorted(map(str, range(12))))
    assert folders.names[2] == "10"
    assert numbered([2, 3, 4], POINTS, "original", folders) == [10, 11, 2]


def test_original_names_are_the_data_s_where_the_model_has_none(caplog):
    assert numbered([1, 0], NUMBERED, "original", datasets.ClassLabel(names=["cat", "dog"])) == [1, 0]
    assert "are numbered as the data do, since the model names none: 0 = 'cat', 1 = 'dog'" in caplog.text
    assert numbered([True, False], NUMBERED, "original") == [1, 0]
    # The order in which a user has selected them counts, whatever they are called.
    chosen = select_classes(labels([7, 3, 3]), [7, 3])
    assert number_classes("original", [chosen], POINTS).read(chosen).tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("values", "needs", "unknown", "has"),
    [
        (["two", "cat"], NAMED, r"\['cat'\]", r"\['zero', 'one', 'two', 'three'\]"),
        ([True, False], NAMED, r"\['False', 'True'\]", r"\['zero', 'one', 'two', 'three'\]"),
        ([1, 4], NAMED, r"\['4'\]", r"\['zero', 'one', 'two', 'three'\]"),
        ([1, 4], NUMBERED, r"\['4'\]", r"\['LABEL_0', 'LABEL_1', 'LABEL_2', 'LABEL_3'\]"),
        ([-2, 1], POINTS, r"\['-2'\]", "no names"),
        ([0.5, 1.5], POINTS, r"\['0.5', '1.5'\]", "no names"),
        (["cat", "dog"], NUMBERED, r"\['cat', 'dog'\]", r"\['LABEL_0', 'LABEL_1', 'LABEL_2', 'LABEL_3'\]"),
    ],
)
def test_original_classes_that_the_model_does_not_know_are_refused(values, needs, unknown, has):
    have = ", ".join(repr(str(value)) for value in sorted(values))
    message = rf"does not know, {unknown}: the data have \[{have}\], the model has {has}. .*`--original_classes`"
    with pytest.raises(ValueError, match=message):
        numbered(values, needs, "original")


def test_select_classes_of_labels_as_people_have_them():
    assert select_classes(labels(["cat", "dog", "cow"]), ["dog", "cat"])["label"][:] == [1, 0]
    assert select_classes(labels([True, False]), [True])["row"][:] == [0]
    assert select_classes(labels([7, 30, 7]).to_iterable_dataset(), ["30", 7])["label"][:] == [1, 0, 1]
    renamed = select_classes(labels(["n01", "n02", "n03"]), {"n03": "tench", "n01": "goldfish"})
    assert renamed.features["label"].names == ["tench", "goldfish"] and renamed["label"][:] == [1, 0]


def test_select_classes_keeps_and_renumbers_in_the_order_given():
    dataset = labels([0, 1, 2, 2, 1, 0, 2], datasets.ClassLabel(names=["cat", "dog", "bird"]))
    kept = select_classes(dataset, ["bird", "cat"])
    assert list(zip(kept["row"], kept["label"], strict=True)) == [(0, 1), (2, 0), (3, 0), (5, 1), (6, 0)]
    assert kept.features["label"].names == ["bird", "cat"]
    assert select_classes(labels([0, 1, 2]), ["2"])["row"][:] == [2]


def test_select_classes_refuses_what_it_does_not_know():
    named = labels([0, 1], datasets.ClassLabel(names=["cat", "dog"]))
    with pytest.raises(ValueError, match=r"\['cow'\] are no classes of the data set, which has \['cat', 'dog'\]"):
        select_classes(named, ["cat", "cow"])
    with pytest.raises(ValueError, match="has no label column"):
        select_classes(named.remove_columns("label"), ["cat"])
    for names in ([], ["cat", "cat"], {"cat": "dog", "dog": "dog"}):
        with pytest.raises(ValueError, match="give at least one, and each name once"):
            select_classes(named, names)
    with pytest.raises(ValueError, match="share is 2, but must lie between 0 and 1"):
        split_domain(named, share=2)


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


def test_split_takes_names_and_streams():
    by_number, by_name = (split_domain(labels(values)) for values in (UNEVEN, [f"c{i}" for i in UNEVEN]))
    assert [part["row"][:] for part in by_name] == [part["row"][:] for part in by_number]
    streamed = split_domain(labels(UNEVEN).to_iterable_dataset())
    assert [part["row"][:] for part in streamed] == [part["row"][:] for part in by_number]


def test_split_by_a_named_column():
    dataset = labels([0, 1] * 8, kind=[0] * 8 + [1] * 8)
    assert Counter(split_domain(dataset, column="kind")[0]["kind"][:]) == {0: 4, 1: 4}

"""Class labels: where they are, how classes are numbered, which are kept, and how a domain is split fairly by them."""

from __future__ import annotations

import logging
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import datasets
import numpy as np

from sophon_hf.data.loading import Source, is_missing_label, label_column, load_domain
from sophon_hf.data.preprocessing import ModelInputs
from sophon_hf.utils import derive_seed

logger = logging.getLogger(__name__)

_SHOWN = 12
_SINGLE = 20


@dataclass(frozen=True)
class Classes:
    """How the labels of a domain are numbered.

    Attributes:
        column: Where the labels are.
        names: What the classes are called. Of a restricted domain the class of number i is `names[i]`; an original
            domain has the model's numbers, and may have a part of its classes only.
        numbers: Label as the data have it (a `ClassLabel` by its name) -> number.
        width: How many labels an example may have at once; None where it has one class.
    """

    column: str
    names: tuple[str, ...]
    numbers: Mapping[Hashable, int]
    width: int | None = None

    def __len__(self) -> int:
        return len(self.names) if self.width is None else self.width

    def read(self, dataset: datasets.Dataset) -> np.ndarray:
        """Return all labels as numbers; shape (n,), int64, or as ones among zeros; shape (n, width), float32."""
        if self.width is not None:
            chosen = np.zeros((len(dataset), self.width), dtype=np.float32)
            for row, labels in zip(chosen, _read_label_sets(dataset, self.column)[0], strict=True):
                row[[self.numbers[label] for label in labels]] = 1
            return chosen
        values = read_labels(dataset, self.column)
        return np.fromiter((self.numbers[value] for value in values), dtype=np.int64, count=len(values))


def read_labels(dataset: datasets.Dataset, column: str, name: str = "given") -> list[Hashable]:
    """Return all labels as the data have them: names (of a `ClassLabel` too), whole numbers, floats or booleans.

    Args:
        dataset: What the labels are read from; its transform, where it has one, is not run.
        column: Where they are.
        name: What messages call the domain.

    Raises:
        ValueError: Some are missing, or they are no classes.
    """
    values, where = dataset.with_format(None)[column][:], f"Column {column!r} of the {name} domain"
    feature = dataset.features[column]
    if missing := [row for row, value in enumerate(values) if is_missing_label(value, feature)]:
        raise ValueError(
            f"{len(missing)} examples have no label in column {column!r} of the {name} domain, the first at row "
            f"{missing[0]} (NA, null and nan are none in a CSV file): label them, or drop those rows, as "
            "`skip_unreadable` does."
        )
    if not values or isinstance(values[0], str):
        return values
    if not isinstance(values[0], (bool, int, float)):
        raise ValueError(
            f"{where} holds {values[0]!r} at row 0, which is no class: a label is a name, a number, or true or false."
        )
    distinct = set(values)
    if isinstance(feature, datasets.ClassLabel):
        declared = feature.names
        if max(distinct) >= len(declared):
            raise ValueError(
                f"{where} has label {max(distinct)}, but its features name {len(declared)} classes: repair the "
                "features or the labels."
            )
        return [declared[value] for value in values]
    if isinstance(values[0], float):
        if all(value.is_integer() for value in distinct):
            return [int(value) for value in values]  # pandas makes floats of numbers beside missing ones.
        if len(distinct) > max(_SINGLE, len(values) / 2):
            raise ValueError(
                f"{where} holds {len(distinct)} different values in {len(values)} rows, which are measurements, not "
                "classes: name another label column, or cut the values into classes."
            )
    return values


def _read_label_sets(
    dataset: datasets.Dataset, column: str, name: str = "given"
) -> tuple[list[list[Hashable]], list[Hashable]]:
    """Return the labels of each example, and all labels that there may be: of columns of ones and zeros their numbers.

    Raises:
        ValueError: An example has no list of labels.
    """
    values = dataset.with_format(None)[column][:]
    for row, value in enumerate(values):
        if not isinstance(value, (list, np.ndarray)):
            raise ValueError(
                f"Column {column!r} of the {name} domain holds {value!r} at row {row}, but the model takes several "
                "labels an example: give a list of names or numbers, or of a one or zero for each label."
            )
    values, feature = [list(value) for value in values], getattr(dataset.features[column], "feature", None)
    if isinstance(feature, datasets.ClassLabel):
        return [[feature.names[label] for label in value] for value in values], list(feature.names)
    widths, present = {len(value) for value in values}, {label for value in values for label in value}
    if len(widths) == 1 and max(widths) > 1 and present <= {0, 1}:
        return [[number for number, one in enumerate(value) if one] for value in values], list(range(max(widths)))
    return values, _sorted(present)


def number_classes(
    name: str,
    parts: Sequence[datasets.Dataset],
    needs: ModelInputs,
    label: str | None = None,
    first: Iterable[Hashable] = (),
) -> Classes | None:
    """Number the classes of a domain, the same in all its splits, and say in one line how, where there is a choice.

    Names that the model knows get the model's numbers. Other classes of a restricted domain are numbered in the order
    of their `ClassLabel`, or sorted.

    Args:
        name: "original" or "restricted": labels of an original domain have to mean what the model's outputs mean.
        parts: The domain's splits.
        needs: What the model takes, and what it calls its classes.
        label: The label column, where it is not found by itself.
        first: Classes of a restricted domain that come first, in this order.

    Returns:
        How they are numbered, or None where the task needs no labels.

    Raises:
        ValueError: No label column, labels that are no classes, or an original domain with classes that the model does
            not know.
    """
    conditioned = needs.conditioned is not None and all("class_labels" not in part.column_names for part in parts)
    if not needs.labelled and not conditioned:
        return None
    columns = {label_column(part, label): part for part in parts}
    column = next(iter(columns))
    if column is None and conditioned and needs.null_label is not None:
        return None
    if column is None or None in columns:
        what = "a model with class labels" if conditioned else "a classifier, or a backbone's linear probe,"
        raise ValueError(
            f"The {name} domain has no label column among {columns[None].column_names}: {what} needs one. Name it, "
            "where it is called otherwise, with `--restricted_label` or `--original_label` (in Python "
            "`label_columns`), or put each class of pictures or sounds in a folder, all equally deep."
        )
    if len(columns) > 1:
        raise ValueError(f"The {name} domain's splits call the label column {list(columns)}: call it the same in all.")
    known, width = needs.class_names, None
    if needs.multi_label:
        read = [_read_label_sets(part, column, name)[1] for part in parts]
        # A label of one split only is a label of all.
        present, declared = _sorted({label for labels in read for label in labels}), list[Hashable]()
        width = len(known) or len(present)
    else:
        present, declared = _present_and_declared(name, parts, column, first)
    numbers = _named_as_the_model(present, known)
    if -1 in present and -1 not in numbers and (0 in present or len(present) == 1):
        raise ValueError(
            f"Column {column!r} of the {name} domain holds -1{' beside 0' if 0 in present else ' only'}, which often "
            "stands for no label. List the classes that there are, with -1 or without it: `--restricted_classes` or "
            "`--original_classes` (in Python `select_classes`)."
        )
    if len(numbers) == len(present):
        _tell(name, "get the model's numbers by their names", numbers, declared)
        return Classes(column, tuple(known), numbers, width)
    if "original" not in name and not conditioned:
        count = sum(map(len, parts))
        # Who declares classes means them, however few examples of each there are.
        if width is None and not declared and len(present) > max(_SINGLE, count / 2):
            raise ValueError(
                f"Column {column!r} of the {name} domain has {len(present)} different values in {count} rows, which "
                "are names of examples, not of classes: name another label column."
            )
        order = dict.fromkeys([*declared, *present])
        numbers = {value: number for number, value in enumerate(order)}
        _tell(name, "are numbered in sorted order", numbers, declared)
        return Classes(column, tuple(str(value) for value in order), numbers, width and len(order))
    numbers = _meant_as_outputs(name, present, declared, numbers, needs)
    names = tuple(str(value) for value in sorted(present, key=numbers.__getitem__))
    return Classes(column, names, numbers, width)


def _named_as_the_model(present: Sequence[Hashable], known: Sequence[str]) -> dict[Hashable, int]:
    """Number the classes that the model knows by name; written otherwise too (case, spaces), if not ambiguous."""
    exact = {name: number for number, name in enumerate(known)}
    plain = {_plain(name): number for name, number in exact.items()}
    lookup = exact if len(plain) < len(exact) else {**plain, **exact}
    found = {value: lookup.get(str(value), lookup.get(_plain(value))) for value in present}
    return {value: number for value, number in found.items() if number is not None}


def _meant_as_outputs(
    name: str, present: Sequence[Any], declared: Sequence[Any], numbers: dict[Hashable, int], needs: ModelInputs
) -> dict[Hashable, int]:
    """Number an original domain's classes as the model's outputs, by their own numbers or their order where need be.

    Raises:
        ValueError: The model does not know some of them.
    """
    known = needs.class_names
    nameless = all(re.fullmatch(r"LABEL_\d+", label) for label in known)
    # Folders `0`, `1`, `10`, `2`, ... are read alphabetically, and are numbers all the same.
    by_folder = declared == sorted(declared, key=str) and _sorted(declared) == [str(i) for i in range(len(declared))]
    if (by_folder or not declared) and all(_is_number(v) or (nameless and isinstance(v, bool)) for v in present):
        numbers = {value: int(value) for value in present}
    elif nameless:
        numbers = {value: number for number, value in enumerate(declared)}
        _tell(name, "are numbered as the data do, since the model names none", numbers, [])
    count = needs.conditioned or len(known)
    numbers = {v: n for v, n in numbers.items() if n >= 0 and (not count or n < count)}
    if unknown := [value for value in present if value not in numbers]:
        named = _shown(known) if known else f"{count} labels without names" if count else "no names"
        raise ValueError(
            f"The {name} domain has classes that the model does not know, {_shown(unknown)}: the data have "
            f"{_shown(present)}, the model has {named}. Select the classes that it knows, rename them as it calls "
            f"them, or, where it has no names, list all in its order (`--{name}_classes`; in Python "
            "`select_classes`)."
        )
    if not nameless and all(map(_is_number, present)):
        pairs = [f"{value} = {known[numbers[value]]!r}" for value in present]
        logger.warning("The %s domain's numbers are the model's outputs, from 0 on: %s.", name, _first_of(pairs))
    return numbers


def _present_and_declared(
    name: str, parts: Sequence[datasets.Dataset], column: str, first: Iterable[Hashable] = ()
) -> tuple[list[Hashable], list[Hashable]]:
    """Return the classes of all parts that have examples, sorted, and those that `first` and features put in order."""
    found = {value for part in parts for value in read_labels(part, column, name)}
    if len({isinstance(value, str) for value in found}) > 1:
        raise ValueError(
            f"The {name} domain's labels are names in one split and numbers in another ({_shown(list(found))}): write "
            "them in one way."
        )
    features = [part.features[column] for part in parts]
    names = [label for f in features if isinstance(f, datasets.ClassLabel) for label in f.names]
    return _sorted(found), list(dict.fromkeys([*first, *names]))


def _sorted(values: Iterable[Any]) -> list[Any]:
    """Sort classes: numbers by their value, also where they are written as text."""
    values = list(values)
    return sorted(values, key=lambda value: int(value) if all(map(_is_number, values)) else value)


def _is_number(value: Any) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole or (isinstance(value, str) and value.isascii() and value.isdigit())


def _plain(name: Hashable) -> str:
    return re.sub(r"[\s_-]+", " ", str(name)).strip().casefold()


def _tell(name: str, how: str, numbers: Mapping[Hashable, int], declared: Sequence[Hashable]) -> None:
    """Say how classes are numbered, where it is not as the data set itself has numbered them."""
    own = dict(zip(declared, range(len(declared)), strict=True))
    if all(number == own.get(value, value) and not isinstance(value, bool) for value, number in numbers.items()):
        return
    pairs = [f"{number} = {str(value)!r}" for value, number in sorted(numbers.items(), key=itemgetter(1))]
    logger.warning("The %s domain's classes %s: %s.", name, how, _first_of(pairs))


def _shown(values: Sequence[Hashable]) -> str:
    return f"[{_first_of([repr(str(value)) for value in values])}]"


def _first_of(words: Sequence[str]) -> str:
    more = [f"... ({len(words)} in all)"] if len(words) > _SHOWN else []
    return ", ".join([*words[:_SHOWN], *more])


def select_classes(
    dataset: Source, names: Sequence[object] | Mapping[object, str], column: str | None = None
) -> datasets.Dataset:
    """Keep some classes and number them 0, 1, ... in the order given.

    Args:
        dataset: What `load_domain` takes.
        names: Of the classes; numbers and booleans as they are written. {name: new name} renames them, to what a model
            calls them, say.
        column: The label column, where it is not found by itself.

    Raises:
        ValueError: No name, one twice, or one that is no class of the data set.
    """
    dataset = load_domain(dataset)
    column = label_column(dataset, column)
    if column is None:
        raise ValueError(f"The data set has no label column among {dataset.column_names}: classes cannot be selected.")
    # A transform of the user's must neither run here nor be lost.
    form, dataset = dataset.format, dataset.with_format(None)
    labels = [str(value) for value in read_labels(dataset, column)]
    feature = dataset.features[column]
    known = feature.names if isinstance(feature, datasets.ClassLabel) else _sorted(set(labels))
    wanted = [str(name) for name in names]
    renamed = [str(name) for name in names.values()] if isinstance(names, Mapping) else wanted
    if not renamed or len(set(renamed)) < len(renamed):
        raise ValueError(f"The classes to keep are called {renamed}: give at least one, and each name once.")
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"{unknown} are no classes of the data set, which has {_shown(known)}.")
    number = {name: i for i, name in enumerate(wanted)}
    rows = [row for row, label in enumerate(labels) if label in number]
    kept = dataset.select(rows).remove_columns(column)
    kept = kept.add_column(column, [number[labels[row]] for row in rows])
    kept = kept.cast_column(column, datasets.ClassLabel(names=renamed))
    columns = None if form["type"] == "custom" else form["columns"]
    return kept.with_format(form["type"], columns, form["output_all_columns"], **form["format_kwargs"])


def split_domain(
    dataset: Source, seed: int = 0, share: float = 0.5, column: str | None = None
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Split into the defender's and the adversary's part (section 5.1.4): equal, seeded, stratified by label.

    Args:
        dataset: A restricted domain's training split (or anything else that is to be halved fairly), as `load_domain`
            takes it.
        seed: Decides the split.
        share: What the first part gets.
        column: The label column, where it is not found by itself. Without labels the split is plainly random.

    Returns:
        The defender's part and the adversary's part, disjoint, in the data set's order.

    Raises:
        ValueError: A share outside (0, 1); else as `load_domain` does.
    """
    if not 0 < share < 1:
        raise ValueError(f"share is {share}, but must lie between 0 and 1, so that both parts hold examples.")
    dataset = load_domain(dataset)
    first, second = split_indices(dataset, seed, share, label_column(dataset, column))
    return dataset.select(first), dataset.select(second)


def at_most(dataset: datasets.Dataset, examples: int, seed: int = 0, column: str | None = None) -> datasets.Dataset:
    """Return so many examples, seeded and stratified as by `split_domain`; all where there are not more."""
    if examples >= len(dataset):
        return dataset
    # Half an example more, so that rounding never costs one.
    return split_domain(dataset, seed, (examples + 0.5) / len(dataset), column)[0]


def split_indices(
    dataset: datasets.Dataset, seed: int, share: float, column: str | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of both parts of `split_domain`; not stratified where `column` is None."""
    generator = np.random.default_rng(derive_seed("split", seed))
    labels = np.zeros(len(dataset), dtype=np.int64)
    if column is not None and isinstance(dataset.features[column], (datasets.List, datasets.LargeList)):
        # Sets of labels: examples with the same ones are alike.
        labels = np.unique([str(value) for value in dataset.with_format(None)[column][:]], return_inverse=True)[1]
    elif column is not None:
        present, declared = _present_and_declared("given", [dataset], column)
        numbers = {value: number for number, value in enumerate(dict.fromkeys([*declared, *present]))}
        labels = Classes(column, (), numbers).read(dataset)
    # Sorting by (class, random) and dealing out along that order keeps every class and the total equal within one.
    order = np.lexsort((generator.random(len(labels)), labels))
    dealt = np.floor(np.arange(1, len(order) + 1) * share) > np.floor(np.arange(len(order)) * share)
    return np.sort(order[dealt]), np.sort(order[~dealt])

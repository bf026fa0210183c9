"""Class labels: where they are, which classes are kept, and how a domain is split fairly by them."""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import numpy as np

from sophon_hf.utils import derive_seed

_LABEL_COLUMNS = ("labels", "label")


def label_column(dataset: datasets.Dataset, chosen: str | None = None) -> str | None:
    """Return the column with the class labels: the chosen one, `labels`, `label` or the only `ClassLabel`; else None.

    Raises:
        ValueError: The chosen column does not exist, or several could be meant.
    """
    if chosen is not None:
        if chosen not in dataset.column_names:
            raise ValueError(f"There is no column {chosen!r}; the data set has {dataset.column_names}.")
        return chosen
    for name in _LABEL_COLUMNS:
        if name in dataset.column_names:
            return name
    class_labels = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.ClassLabel)]
    if len(class_labels) > 1:
        raise ValueError(f"The data set has several label columns, {class_labels}: name the one that is meant.")
    return class_labels[0] if class_labels else None


def read_labels(dataset: datasets.Dataset, column: str) -> np.ndarray:
    """Return all labels; shape (n,), int64.

    Raises:
        ValueError: Some are missing, or they are not class indices.
    """
    # Without its format, or a transform of the user's would run on every row.
    values = list(dataset.with_format(None)[column])
    missing = [i for i, value in enumerate(values) if value is None]
    if missing:
        raise ValueError(f"{len(missing)} examples have no label in column {column!r}, the first at row {missing[0]}.")
    labels = np.asarray(values)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"Column {column!r} holds {labels.dtype} values of shape {labels.shape[1:]}, not one class index an "
            "example. `dataset.class_encode_column` turns names into indices."
        )
    if (labels < 0).any():
        raise ValueError(f"Column {column!r} holds negative labels, as test sets without labels do: drop those rows.")
    return labels.astype(np.int64)


def class_names(dataset: datasets.Dataset, column: str) -> list[str]:
    """Return class names from the features, or `class 0`, `class 1`, ... where they name none."""
    feature = dataset.features.get(column)
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names)
    return [f"class {i}" for i in range(int(read_labels(dataset, column).max()) + 1)]


def select_classes(dataset: datasets.Dataset, names: Sequence[str], column: str | None = None) -> datasets.Dataset:
    """Keep some classes and number them 0, 1, ... in the order given.

    Raises:
        ValueError: A name that is no class of the data set.
    """
    column = label_column(dataset, column)
    if column is None:
        raise ValueError(f"The data set has no label column among {dataset.column_names}: classes cannot be selected.")
    # A transform of the user's must neither run here nor be lost.
    form, dataset = dataset.format, dataset.with_format(None)
    known = class_names(dataset, column)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"{unknown} are no classes of the data set, which has {known}.")
    old = [known.index(name) for name in names]
    labels = read_labels(dataset, column)
    kept = dataset.select(np.flatnonzero(np.isin(labels, old)))
    new = [old.index(label) for label in read_labels(kept, column)]
    kept = kept.remove_columns(column).add_column(column, new)
    kept = kept.cast_column(column, datasets.ClassLabel(names=list(names)))
    columns = None if form["type"] == "custom" else form["columns"]
    return kept.with_format(form["type"], columns, form["output_all_columns"], **form["format_kwargs"])


def split_domain(
    dataset: datasets.Dataset, seed: int = 0, share: float = 0.5, column: str | None = None
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Split into the defender's and the adversary's part (section 5.1.4): equal, seeded, stratified by label.

    Args:
        dataset: A restricted domain's training split (or anything else that is to be halved fairly).
        seed: Decides the split.
        share: What the first part gets.
        column: The label column, where it is not found by itself. Without labels the split is plainly random.

    Returns:
        The defender's part and the adversary's part, disjoint, in the data set's order.
    """
    first, second = split_indices(dataset, seed, share, label_column(dataset, column))
    return dataset.select(first), dataset.select(second)


def split_indices(
    dataset: datasets.Dataset, seed: int, share: float, column: str | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of both parts of `split_domain`; not stratified where `column` is None."""
    generator = np.random.default_rng(derive_seed("split", seed))
    labels = np.zeros(len(dataset), dtype=np.int64) if column is None else read_labels(dataset, column)
    # Sorting by (class, random) and dealing out along that order keeps every class and the total equal within one.
    order = np.lexsort((generator.random(len(labels)), labels))
    dealt = np.floor(np.arange(1, len(order) + 1) * share) > np.floor(np.arange(len(order)) * share)
    return np.sort(order[dealt]), np.sort(order[~dealt])

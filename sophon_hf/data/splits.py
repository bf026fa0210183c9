"""The training and the test split of a source, also of one that comes without a test split."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL.Image import Image

from sophon_hf.data.labels import select_classes, split_indices
from sophon_hf.data.loading import Source, label_column, open_source, take_split
from sophon_hf.data.media import kind_of_cell

logger = logging.getLogger(__name__)


def load_part(
    source: Source,
    split: str = "train",
    test_split: str = "test",
    *,
    test: bool,
    test_share: float = 0.2,
    seed: int = 0,
    column: str | None = None,
    label_set: Sequence[str] | None = None,
    classes: Mapping[object, str] | None = None,
    **reading: Any,
) -> datasets.Dataset:
    """Load what is trained on, or what is reported on; a source of one split gets a test split from its examples.

    Args:
        source: As of `load_domain`.
        split: What is trained on.
        test_split: What is reported on.
        test: Which of both is returned.
        test_share: Share of `split` that is cut off where the source has no other split: seeded, stratified by label,
            with all copies of a picture, sound or text on one side.
        seed: Decides which examples.
        column: The label column, where it is not found by itself.
        label_set: Columns of ones and zeros, one for each label that an example may have; they become `labels`.
        classes: Which are kept, and what they are called then, as of `select_classes`; all as they are where None.
        reading: `skip_unreadable`, `inputs` and `pixel_range`, as of `load_domain`.

    Raises:
        ValueError: A share outside (0, 1), or one that holds no example; else as `load_domain` does.
    """
    if not 0 < test_share < 1:
        raise ValueError(f"test_share is {test_share}, but must lie between 0 and 1, such as 0.2.")
    loaded, whole = open_source(source), True
    if isinstance(loaded, Mapping):
        # A source of several splits is not cut: the one that is meant has a name of its own.
        whole = list(loaded) == [split]
    dataset = take_split(loaded, source, test_split if test and not whole else split, label=column, **reading)
    if label_set is not None:
        dataset, column = _with_label_sets(dataset, label_set), "labels"
    if classes:
        dataset = select_classes(dataset, classes, column)
    if not whole:
        return dataset
    column = label_column(dataset, column)
    plain, hashes = dataset.with_format(None), []
    for row in range(len(dataset)):
        try:
            hashes.append(hash_row(plain[row], column, words=True))
        except Exception:
            hashes.append(str(row))  # What cannot be read is named, with its domain, when the domain is built.
    # Copies go where the first one goes.
    first = {digest: row for row, digest in reversed(list(enumerate(hashes)))}
    rows = np.array(sorted(first.values()))
    chosen = set(rows[split_indices(dataset.select(rows), seed, test_share, column)[0]].tolist())
    kept = [row for row, digest in enumerate(hashes) if first[digest] in chosen]
    if not kept:
        raise ValueError(
            f"test_share is {test_share}, which is no example of the {len(rows)} different ones that there are, of "
            f"{dataset.column_names}: give more data, or a larger share."
        )
    if test:
        return dataset.select(kept)
    logger.warning(
        "%s has no split %r: %d of its %d examples are kept for tests.",
        source if isinstance(source, (str, os.PathLike)) else "The data set",
        test_split,
        len(kept),
        len(dataset),
    )
    return dataset.select(np.setdiff1d(np.arange(len(dataset)), kept))


def _with_label_sets(dataset: datasets.Dataset, columns: Sequence[str]) -> datasets.Dataset:
    """Replace columns of ones and zeros by one of lists, `labels`: of the labels that an example has.

    Raises:
        ValueError: There is no such column, or it holds anything else.
    """
    if unknown := [column for column in columns if column not in dataset.column_names]:
        raise ValueError(f"There is no column {unknown[0]!r}; the data set has {dataset.column_names}.")
    sets: list[list[int]] = [[] for _ in range(len(dataset))]
    for number, column in enumerate(columns):
        for row, value in enumerate(dataset.with_format(None)[column]):
            if value not in (0, 1):
                raise ValueError(
                    f"Column {column!r} holds {value!r} at row {row}: of several label columns each holds 1 (true) "
                    "where an example has the label, else 0 (false)."
                )
            if value:
                sets[row].append(number)
    feature = datasets.List(datasets.ClassLabel(names=list(columns)))
    others = [column for column in ("labels", *columns) if column in dataset.column_names]
    return dataset.remove_columns(others).add_column("labels", sets, feature=feature)


def hash_row(row: Mapping[str, Any], label: str | None, words: bool = False) -> str:
    """Hash a row's pictures and sounds; in a row without any, its texts and lists: a number may count rows.

    Args:
        row: Column name -> value, decoded.
        label: The label column, which is left out.
        words: Take texts for equal that differ in case and spaces only.
    """
    values = [value for column, value in row.items() if column != label]
    media: list[Any] = [v for v in values if kind_of_cell(v) in ("images", "audio")]
    digest = hashlib.blake2b(digest_size=16)
    for value in media or [v for v in values if isinstance(v, (str, list))] or values:
        if isinstance(value, Image):
            value = (value.mode, value.size, value.tobytes())
        elif isinstance(value, dict):
            content, path = value.get("bytes"), value.get("path")
            if not content and path and os.path.isfile(path):
                content = Path(path).read_bytes()
            value = content or value
        elif words and isinstance(value, str):
            value = " ".join(value.casefold().split())
        digest.update(repr(value).encode())
    return digest.hexdigest()

"""Domains: the original domain S and the restricted domain A, from whatever a user has at hand."""

from __future__ import annotations

import hashlib
import logging
import os
import random
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from sophon_hf.data.fingerprint import remember_source
from sophon_hf.data.labels import class_names, label_column, read_labels
from sophon_hf.data.preprocessing import (
    Example,
    ModelInputs,
    Preprocessor,
    prepare_audio,
    prepare_images,
    prepare_ready,
    prepare_text,
)

logger = logging.getLogger(__name__)

Source = str | os.PathLike | datasets.Dataset | datasets.IterableDataset | datasets.DatasetDict

MEMORY_LIMIT = 4 * 2**30
STREAM_LIMIT = 100_000
_CHUNK = 256


def load_domain(source: Source, split: str = "train") -> datasets.Dataset:
    """Load one split of a domain.

    Args:
        source: A Hub id (`owner/name`, or `owner/name:configuration` where it has several), a folder (parquet files, an image folder, an audio folder), or an object of `datasets`.
            An `IterableDataset` is read once, up to its first 100,000 examples, because halves, streams and resuming
            need random access.
        split: The split to take where there are several.

    Raises:
        ValueError: No such split, or no examples.
        ConnectionError: A Hub id that cannot be reached.
        FileNotFoundError: Neither a folder nor a data set on the Hub.
    """
    if isinstance(source, (str, os.PathLike)):
        source = _load_dataset(os.fspath(source))
    if isinstance(source, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        if split not in source:
            raise ValueError(f"The data set has no split {split!r}; it has {sorted(source)}. Name one of them.")
        source = source[split]
    if isinstance(source, datasets.IterableDataset):
        source = _read_stream(source)
    if not isinstance(source, datasets.Dataset):
        raise TypeError(
            f"A domain must be a Hub id, a folder, or a Dataset, IterableDataset or DatasetDict, not {type(source).__name__}."
        )
    if len(source) == 0:
        raise ValueError("The data set is empty: check its path, its split and any filter on it.")
    return source


def _load_dataset(name: str) -> datasets.DatasetDict:
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if not os.path.isdir(name) and (os.path.isabs(name) or name.startswith(".") or name.count("/") > 1):
        raise FileNotFoundError(f"There is no folder {name!r}, and it is not the form of a Hub id ('owner/name').")
    try:
        return _load_undecoded(name)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise FileNotFoundError(
            f"{name!r} is neither a folder here nor a data set on the Hub that you can read. Check the spelling; "
            "for a private one run `hf auth login` first."
        ) from error
    except (ConnectionError, OfflineModeIsEnabled, HfHubHTTPError) as error:
        raise ConnectionError(
            f"{name!r} is no folder here, and the Hub cannot be reached to look it up there. Check the connection "
            "(and HF_HUB_OFFLINE), or download the data set and pass its folder."
        ) from error


def _load_undecoded(name: str) -> datasets.DatasetDict:
    """Load a data set; encoding the sounds of an audio folder through their feature would need torchcodec."""
    on_hub, whole = not os.path.isdir(name), name
    name, _, configuration = name.partition(":") if on_hub else (name, "", "")
    builder = datasets.load_dataset_builder(name, configuration or None)
    if builder.name != "audiofolder":
        loaded = datasets.load_dataset(name, configuration or None)
        if on_hub:
            for part in loaded.values():
                remember_source(part, whole, builder.hash)
        return loaded
    features = next(iter(datasets.load_dataset(name, streaming=True).values())).features
    sounds = _audio_columns(features)
    paths = datasets.Features({**features, **dict.fromkeys(sounds, datasets.Value("string"))})
    return _undecoded(datasets.load_dataset(name, features=paths), sounds)


def _read_stream(source: datasets.IterableDataset) -> datasets.Dataset:
    features = source.features
    sounds = _audio_columns(features or {})
    source = _undecoded(source, sounds)
    if sounds:
        files = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
        features = datasets.Features({**features, **dict.fromkeys(sounds, files)})
    rows = list(source.take(STREAM_LIMIT + 1))
    if len(rows) > STREAM_LIMIT:
        logger.warning("Only the first %d examples of the iterable data set are read: shuffle it first.", STREAM_LIMIT)
    return _undecoded(datasets.Dataset.from_list(rows[:STREAM_LIMIT], features=features), sounds)


def _audio_columns(features: dict[str, Any]) -> list[str]:
    return [column for column, feature in features.items() if isinstance(feature, datasets.Audio)]


def _undecoded(dataset: Any, sounds: list[str]) -> Any:
    for column in sounds:
        dataset = dataset.cast_column(column, datasets.Audio(decode=False))
    return dataset


class Domain:
    """Examples ready for a model, kept as tensors where they fit in memory and prepared on the fly where not.

    Attributes:
        name: "original" or "restricted", for messages.
        labels: Shape (n,), int64, or None.
        class_names: One a class; empty without labels.
        transformed: Whether the data set has a transform of the user's.
        fingerprint: Changes with the content: that of all examples, or, where they are not kept in memory, that of the data set
            and of its first examples as they are prepared.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        preprocessor: Preprocessor,
        name: str = "domain",
        memory_limit: int = MEMORY_LIMIT,
        row_numbers: np.ndarray | None = None,
    ):
        self.name, self.dataset, self.preprocessor = name, dataset, preprocessor
        self._row_numbers = np.arange(len(dataset)) if row_numbers is None else row_numbers
        self._lengths: dict[str, Tensor] = {}
        column = preprocessor.label_column
        self.labels = None if column is None else torch.from_numpy(read_labels(dataset, column))
        self.class_names = [] if column is None else class_names(dataset, column)
        # A transform of the user's may be random, so its examples must not be frozen.
        self.transformed = dataset.format["type"] == "custom"
        self._tensors = None if self.transformed else self._materialize(memory_limit)
        self.fingerprint = self._fingerprint()

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def num_classes(self) -> int:
        """How many classes there are; 0 without labels."""
        return len(self.class_names)

    def rows(self, indices: Tensor, seeds: Sequence[int] | None = None) -> Example:
        """The examples at `indices`, stacked: input name -> tensor of shape (len(indices), ...).

        Args:
            indices: Shape (n,), int64.
            seeds: One an example: decide a random transform of the data set, where it has one; its index by default.

        Raises:
            ValueError: An example holds NaN or infinity.
        """
        if self._tensors is not None:
            return {name: self._select(name, indices) for name in self._tensors}
        if self.transformed:
            examples = []
            for index, seed in zip(indices.tolist(), seeds or indices.tolist(), strict=True):
                with _seeded(seed):
                    examples += self._prepare([index])
        else:
            examples = self._prepare(indices.tolist())
        batch = self.preprocessor.stack(examples)
        self._check_finite(batch, indices)
        return batch

    def _prepare(self, indices: list[int]) -> list[Example]:
        examples = self.preprocessor(self.dataset[indices])
        if self.labels is not None:
            for example, label in zip(examples, self.labels[indices], strict=True):
                example["labels"] = label
        return examples

    def _select(self, name: str, indices: Tensor) -> Tensor:
        """Rows of one input, without the padding that no row of them uses: a short one does not pay for a long one."""
        values = self._tensors[name][indices]
        return values[:, : int(self._lengths[name][indices].max())] if name in self._lengths else values

    def _materialize(self, memory_limit: int) -> Example | None:
        examples: list[Example] = []
        for start in range(0, len(self), _CHUNK):
            examples += self._prepare(list(range(start, min(start + _CHUNK, len(self)))))
            size = sum(t.numel() * t.element_size() for t in examples[0].values())
            if size * len(self) > memory_limit:
                return None
        tensors = self.preprocessor.stack(examples)
        for name in tensors:
            if tensors[name].ndim > 1:
                lengths = torch.tensor([len(example[name]) for example in examples])
                if lengths.min() < lengths.max():
                    self._lengths[name] = lengths
        self._check_finite(tensors, torch.arange(len(self)))
        return tensors

    def _check_finite(self, tensors: Example, indices: Tensor) -> None:
        for name, values in tensors.items():
            if values.is_floating_point() and not values.isfinite().all():
                bad = (~values.flatten(1).isfinite().all(dim=1)).nonzero().flatten()
                raise ValueError(
                    f"{len(bad)} examples of the {self.name} domain hold NaN or infinity in {name!r}, the first at row "
                    f"{int(self._row_numbers[int(indices[bad[0]])])}: drop or repair them."
                )

    def example_hashes(self, raw: bool = False) -> list[str]:
        """A hash of each example's inputs (labels left out), to find examples that two domains share.

        Args:
            raw: Of the inputs as the data set holds them, before a transform, which may be random, or another one.
        """
        if raw:
            return [_hash_raw(row, self.preprocessor.label_column) for row in self.dataset.with_format(None)]
        hashes = []
        for start in range(0, len(self), _CHUNK):
            for example in self._prepare(list(range(start, min(start + _CHUNK, len(self))))):
                digest = hashlib.blake2b(digest_size=16)
                for name in sorted(set(example) - {"labels"}):
                    digest.update(example[name].contiguous().numpy().data)
                hashes.append(digest.hexdigest())
        return hashes

    def _fingerprint(self) -> str:
        digest, tensors = hashlib.blake2b(digest_size=16), [self._tensors]
        if self._tensors is None:
            # The data set's own fingerprint knows nothing of how a processor prepares its rows.
            digest.update(self.dataset._fingerprint.encode())
            with _seeded(0):
                tensors = self._prepare(list(range(min(_CHUNK, len(self)))))
        for part in tensors:
            for name, values in sorted(part.items()):
                digest.update(name.encode())
                digest.update(values.contiguous().numpy().data)
        return digest.hexdigest()


def _hash_raw(row: dict[str, Any], label: str | None) -> str:
    """Of pictures and sounds, or, in a row without any, of all else but numbers: a file's name or number is no input."""
    values = [value for column, value in row.items() if column != label]
    inputs = [v for v in values if isinstance(v, (Image, dict))] or [v for v in values if isinstance(v, (str, list))]
    digest = hashlib.blake2b(digest_size=16)
    for value in inputs or values:
        if isinstance(value, Image):
            value = (value.mode, value.size, value.tobytes())
        elif isinstance(value, dict):
            value = value.get("bytes") or value
        digest.update(repr(value).encode())
    return digest.hexdigest()


class _seeded:
    """Set Python's, NumPy's and torch's CPU random state for a block, and put them back."""

    def __init__(self, seed: int):
        self.seed = seed

    def __enter__(self) -> None:
        self.states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
        random.seed(self.seed)
        np.random.seed(self.seed % 2**32)
        torch.default_generator.manual_seed(self.seed)  # Not the GPUs', which are not put back.

    def __exit__(self, *_: object) -> None:
        random.setstate(self.states[0])
        np.random.set_state(self.states[1])
        torch.random.set_rng_state(self.states[2])


def build_domain(
    dataset: datasets.Dataset,
    needs: ModelInputs,
    processing_class: Any | None = None,
    *,
    name: str = "domain",
    input_column: str | None = None,
    label: str | None = None,
    memory_limit: int = MEMORY_LIMIT,
    row_numbers: np.ndarray | None = None,
) -> Domain:
    """Make a domain's examples ready for a model.

    Args:
        dataset: Raw columns (image, text or audio, and label) or columns that already are model inputs.
        needs: What the model takes: `task.inputs(model)`.
        processing_class: Image processor, tokenizer or feature extractor. Images can do without.
        name: For messages.
        input_column: The raw column, where it is not found by itself.
        label: The label column, where it is not found by itself.
        memory_limit: Bytes up to which prepared examples are kept in memory.
        row_numbers: What messages call each row, where `dataset` is a part of the user's.

    Raises:
        ValueError: No label where the task needs one, an unknown or ambiguous column, NaN, missing or negative labels.
    """
    labels = label_column(dataset, label) if needs.labelled else None
    if needs.labelled and labels is None:
        raise ValueError(
            f"The {name} domain has no label column among {dataset.column_names}: a classifier needs one, named where it is called "
            "otherwise (`--restricted_label` or `--original_label`, in Python `label_columns`)."
        )
    dataset = _with_plain_media(dataset)
    with _seeded(0):
        row = dataset[0]
    if input_column is not None and input_column not in row:
        raise ValueError(f"The {name} domain has no column {input_column!r}; it has {list(row)}.")
    candidates = {c: v for c, v in row.items() if c != labels and c in (input_column or c, input_column)}
    pad = getattr(processing_class, "pad_token_id", None)
    padding = {"input_ids": (needs.pad_token_id or 0) if pad is None else pad}
    return Domain(
        dataset,
        Preprocessor(_choose_inputs(candidates, needs, processing_class, name), labels, padding),
        name,
        memory_limit,
        row_numbers,
    )


def _with_plain_media(dataset: datasets.Dataset) -> datasets.Dataset:
    """Images decoded by Pillow and sounds left as files, whatever the data set's format asks for."""
    for column, feature in dataset.features.items():
        if isinstance(feature, datasets.Audio) and feature.decode:
            dataset = dataset.cast_column(column, datasets.Audio(decode=False))
        if isinstance(feature, datasets.Image) and not feature.decode:
            dataset = dataset.cast_column(column, datasets.Image())
    media = any(isinstance(feature, (datasets.Audio, datasets.Image)) for feature in dataset.features.values())
    return dataset.with_format(None) if media and dataset.format["type"] != "custom" else dataset


def _choose_inputs(row: dict[str, Any], needs: ModelInputs, processing_class: Any | None, name: str):
    ready = {c: c for c, value in row.items() if needs.accepts(c) and _kind(value) == "tensors"}
    if ready:
        return prepare_ready(ready)
    by_kind = {"images": [], "audio": [], "text": [], "tensors": []}
    for column, value in row.items():
        if kind := _kind(value):
            by_kind[kind].append(column)
    prepare = {"images": prepare_images, "audio": prepare_audio, "text": prepare_text}
    for kind, columns in by_kind.items():
        if len(columns) > 1:
            raise ValueError(f"The {name} domain has several columns of {kind}, {columns}: name one as `input_column`.")
        if columns and kind != "tensors":
            return prepare[kind](columns[0], needs, processing_class)
        if columns:
            return prepare_ready({columns[0]: needs.main})
    raise ValueError(
        f"The {name} domain has no column that the model could take: it has {list(row)}, the model takes "
        f"{list(needs.names)}. Rename the column, or pass raw images, text or audio."
    )


def _kind(value: Any) -> str | None:
    if isinstance(value, Image):
        return "images"
    if isinstance(value, str):
        return "text"
    if isinstance(value, dict) and ({"array", "sampling_rate"} <= set(value) or {"bytes", "path"} <= set(value)):
        return "audio"
    if isinstance(value, (list, np.ndarray, Tensor)) and np.ndim(value) >= 1:
        return "tensors"
    return None

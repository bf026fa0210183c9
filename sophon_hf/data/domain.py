"""A domain, the original one S or the restricted one A, as tensors that are ready for a model."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor

from sophon_hf.data.labels import Classes, number_classes
from sophon_hf.data.media import kind_of_cell, media_columns, read_cell, undecoded
from sophon_hf.data.preprocessing import Example, InputColumn, ModelInputs, Preprocessor, make_preprocessor
from sophon_hf.data.splits import hash_row
from sophon_hf.utils import kept_random_state

_MEMORY_LIMIT = 4 * 2**30
CHUNK = 256


class Domain:
    """Hold examples ready for a model: as tensors where they fit in memory, else prepared when they are read.

    Attributes:
        name: "original" or "restricted", for messages.
        labels: What is to be predicted, shape (n,), int64, or of several labels shape (n, classes), float32; or None.
        classes: How they are numbered, or None.
        transformed: Whether the data set has a transform of the user's.
        hashes: Of each example's inputs without its label, where examples are kept in memory.
        fingerprint: Changes with the content: of all examples, or, where they are not kept in memory, of the data set
            and of its first examples as they are prepared.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        preprocessor: Preprocessor,
        name: str,
        memory_limit: int,
        row_numbers: np.ndarray | None,
        classes: Classes | None,
        conditioned: bool,
    ):
        self.name, self.dataset, self.preprocessor, self.classes = name, dataset, preprocessor, classes
        self._row_numbers = np.arange(len(dataset)) if row_numbers is None else row_numbers
        self.hashes: list[str] | None = None
        self._lengths: dict[str, Tensor] = {}
        self._widths: dict[str, int] = {}
        numbers = None if classes is None else torch.from_numpy(classes.read(dataset))
        # They are what a classifier predicts, and what a diffusion model is told.
        self.labels = None if conditioned else numbers
        self._attached = ("class_labels" if conditioned else "labels", numbers)
        # A transform of the user's may be random, so its examples must not be frozen.
        self.transformed = dataset.format["type"] == "custom"
        self._tensors = None if self.transformed else self._materialize(memory_limit)
        self.fingerprint = self._fingerprint()

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def num_classes(self) -> int:
        """Return how many classes there are; 0 without labels."""
        return 0 if self.labels is None or self.classes is None else len(self.classes)

    def rows(self, indices: Tensor, seeds: Sequence[int] | None = None) -> Example:
        """Return the examples at `indices`, stacked: input name -> tensor of shape (len(indices), ...).

        Args:
            indices: Shape (n,), int64.
            seeds: One for each example; decides what a random transform of the data set draws. The index by default.

        Raises:
            ValueError: An example holds NaN or infinity.
        """
        if self._tensors is not None:
            batch = {name: values[indices] for name, values in self._tensors.items()}
            # Padding that no row of the batch uses is cut off: a short one does not pay for a long one.
            for name, lengths in self._lengths.items():
                batch[name] = batch[name][:, : int(lengths[indices].max())]
            return batch
        if self.transformed:
            examples = []
            for index, seed in zip(indices.tolist(), seeds or indices.tolist(), strict=True):
                with _seeded(seed):
                    examples += self._prepare([index])
        else:
            examples = self._prepare(indices.tolist())
        batch = self.preprocessor.stack(examples, self._widths)
        self._check_finite(batch, indices)
        return batch

    def _prepare(self, indices: list[int]) -> list[Example]:
        try:
            examples = self.preprocessor.prepare(self.dataset[indices])
        except ImportError:
            raise  # What is missing here is a library.
        except Exception as error:  # Pillow, soundfile, a tokenizer or a user's transform may raise anything.
            raise self._first_unreadable(indices, error) from error
        name, labels = self._attached
        if labels is not None:
            for example, label in zip(examples, labels[indices], strict=True):
                example[name] = label
        return examples

    def _first_unreadable(self, indices: list[int], error: Exception) -> Exception:
        """Return an error that names the row and the column; the one that was raised where no row has it alone."""
        for index in indices:
            try:
                self.preprocessor.prepare(self.dataset[[index]])
            except Exception as reason:
                columns = [c for c in self.preprocessor.columns if c in self.dataset.column_names]
                return _unreadable(self.dataset, index, self.name, int(self._row_numbers[index]), reason, columns)
        return error

    def _materialize(self, memory_limit: int) -> Example | None:
        chunks: list[Example] = []
        hashes: list[str] = []
        lengths: dict[str, list[int]] = {}
        fits, sequences = True, []
        for indices in torch.arange(len(self)).split(CHUNK):
            examples = self._prepare(indices.tolist())
            size = sum(t.numel() * t.element_size() for t in examples[0].values())
            fits &= size * len(self) <= memory_limit
            if not fits:
                chunks = []
                # Without a mask the model reads its padding, so all batches have to be as wide as the longest example.
                sequences = [n for n, t in examples[0].items() if t.ndim == 1 and "attention_mask" not in examples[0]]
                if not sequences:
                    return None
            for name in (name for name, values in examples[0].items() if values.ndim):
                lengths.setdefault(name, []).extend(len(example[name]) for example in examples)
            if fits:
                hashes += map(_hash_inputs, examples)
                chunks.append(self.preprocessor.stack(examples))
        if not fits:
            self._widths = {name: max(lengths[name]) for name in sequences}
            return None
        self.hashes, tensors = hashes, self.preprocessor.join(chunks)
        for name, of_rows in lengths.items():
            if "attention_mask" in tensors and min(of_rows) < max(of_rows):
                self._lengths[name] = torch.tensor(of_rows)
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

    def refuse_constant(self) -> None:
        """Raise a ValueError where the model is given the same numbers for every example, or there is only one."""
        if len(self) == 1:
            raise ValueError(f"The {self.name} domain has one example, of which nothing can be learned: give more.")
        first = self.rows(torch.arange(1))
        for indices in torch.arange(len(self)).split(CHUNK):
            for name, values in self.rows(indices).items():
                same = values.shape[1:] == first[name].shape[1:] and bool((values == first[name]).all())
                if name != "labels" and not same:
                    return
        raise ValueError(
            f"All {len(self)} examples of the {self.name} domain are the same to the model: look at what their column "
            "holds, and at what the processor makes of it."
        )

    def example_hashes(self, raw: bool = False, most: int | None = None) -> list[str]:
        """Hash each example's inputs without its label, to find examples that two domains share.

        Args:
            raw: Hash what the data set holds, before any transform: two domains may have different ones, or random
                ones.
            most: Of more raw examples only so many are hashed, drawn at random, the same each time.

        Raises:
            ValueError: A raw example that cannot be read.
        """
        if raw:
            label, plain = None if self.classes is None else self.classes.column, self.dataset.with_format(None)
            rows = np.arange(len(self))
            if most is not None and most < len(rows):
                rows = np.sort(np.random.default_rng(0).choice(rows, most, replace=False))
            hashes = []
            for row in rows.tolist():
                try:
                    hashes.append(hash_row(plain[row], label))
                except Exception as error:
                    raise _unreadable(self.dataset, row, self.name, int(self._row_numbers[row]), error) from error
            return hashes
        if self.hashes is not None:
            return self.hashes
        chunks = torch.arange(len(self)).split(CHUNK)
        return [_hash_inputs(example) for indices in chunks for example in self._prepare(indices.tolist())]

    def _fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        if self._tensors is not None:
            parts = [self._tensors]
        else:
            # The data set's own fingerprint does not follow how a processor prepares its rows.
            digest.update(self.dataset._fingerprint.encode())
            with _seeded(0):
                parts = self._prepare(list(range(min(CHUNK, len(self)))))
        for part in parts:
            for name, values in sorted(part.items()):
                digest.update(name.encode())
                digest.update(values.contiguous().numpy().data)
        return digest.hexdigest()


def _hash_inputs(example: Example) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(set(example) - {"labels"}):
        digest.update(example[name].contiguous().numpy().data)
    return digest.hexdigest()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Set the random states of Python, NumPy and torch's CPU in the block, and put them back after it."""
    with kept_random_state():
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would seed GPUs too, which are not put back.
        yield


def build_domain(
    dataset: datasets.Dataset,
    needs: ModelInputs,
    processing_class: Any | None = None,
    *,
    name: str = "domain",
    input_column: InputColumn = None,
    label: str | None = None,
    memory_limit: int = _MEMORY_LIMIT,
    row_numbers: np.ndarray | None = None,
    classes: Classes | None = None,
) -> Domain:
    """Return a domain whose examples are ready for a model.

    Args:
        dataset: Raw columns (image, text or audio, and label) or columns that already are model inputs.
        needs: What the model takes: `task.inputs(model)`.
        processing_class: Image processor, tokenizer or feature extractor. Images can do without.
        name: For messages; the labels of the "original" one have to mean what the model's outputs mean.
        input_column: The raw column, where it is not found by itself, or two columns of text that make one input.
        label: The label column, where it is not found by itself.
        memory_limit: Bytes up to which prepared examples are kept in memory.
        row_numbers: What messages call each row, where `dataset` is a part of the user's.
        classes: How labels are numbered, where other splits of the domain have a say in it (`number_classes`).

    Raises:
        ValueError: No label where the task needs one, an unknown or ambiguous column, NaN, labels that are missing, no
            classes, or classes that an original domain's model does not know.
    """
    if classes is None:
        classes = number_classes(name, [dataset], needs, label)
    labels = None if classes is None else classes.column
    dataset = _with_plain_media(dataset)
    number = 0 if row_numbers is None else int(row_numbers[0])
    try:
        with _seeded(0):
            row = dataset[0]
    except Exception as error:
        raise _unreadable(dataset, 0, name, number, error) from error
    chosen = [input_column] if isinstance(input_column, str) else list(input_column or ())
    if len(chosen) > 2:
        raise ValueError(f"The input columns of the {name} domain are {chosen}: name one, or two of text.")
    if unknown := [column for column in chosen if column not in row]:
        raise ValueError(f"The {name} domain has no column {unknown[0]!r}; it has {list(row)}.")
    candidates = {c: row[c] for c in chosen or row if c != labels}
    outer = {c: value for c, value in candidates.items() if "." not in c}
    if not chosen and any(kind_of_cell(value) for value in outer.values()):
        candidates = outer  # Fields of a column are often notes.
    if empty := [c for c, value in candidates.items() if value is None and (chosen or len(candidates) == 1)]:
        raise _unreadable(dataset, 0, name, number, ValueError("it is missing"), empty)
    preprocessor = make_preprocessor(candidates, needs, processing_class, name, pair=len(chosen) == 2)
    return Domain(dataset, preprocessor, name, memory_limit, row_numbers, classes, needs.conditioned is not None)


def _unreadable(
    dataset: datasets.Dataset, index: int, name: str, number: int, reason: Exception, columns: Sequence[str] = ()
) -> ValueError:
    """Return the error that an example cannot be read, by domain, row and column; `columns` are looked at first."""
    guilty, file = columns[0] if columns else None, ""
    for column in dict.fromkeys([*columns, *media_columns(dataset.features)]):
        cell = undecoded(dataset.with_format(None).select_columns([column]))[index][column]
        try:
            read_cell(cell, dataset.features[column])
        except Exception:
            guilty = column
            path = cell.get("path") if isinstance(cell, dict) else None
            file = f"{path}: " if path and path not in str(reason) else ""
            break
    where = "" if guilty is None else f"column {guilty!r}: {file}"
    why = str(reason).rstrip(".") or type(reason).__name__
    if not file:
        # A row of a half is another one of the file: what else it holds finds it there.
        cells = dataset.with_format(None).remove_columns(media_columns(dataset.features))[index]
        texts = {c: cell for c, cell in cells.items() if isinstance(cell, str) and cell and c != guilty}
        if texts:
            longest = max(texts, key=lambda c: len(texts[c]))
            why += f" (column {longest!r} of that row: {texts[longest][:60]!r})"
    return ValueError(
        f"Row {number} of the {name} domain cannot be read: {where}{why}. Repair the row or drop it; `skip_unreadable` "
        "leaves out what cannot be decoded."
    )


def _with_plain_media(dataset: datasets.Dataset) -> datasets.Dataset:
    """Have Pillow decode images, and leave sounds as files, in every format of the data set."""
    for column, feature in dataset.features.items():
        if isinstance(feature, datasets.Audio) and feature.decode:
            dataset = dataset.cast_column(column, datasets.Audio(decode=False))
        if isinstance(feature, datasets.Image) and not feature.decode:
            dataset = dataset.cast_column(column, datasets.Image())
    plain = media_columns(dataset.features) and dataset.format["type"] != "custom"
    return dataset.with_format(None) if plain else dataset

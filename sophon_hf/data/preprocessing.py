"""Turn raw columns (image, text, audio) into model inputs, one example at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL.Image import Image
from PIL.Image import Resampling as PillowResampling
from torch import Tensor

from sophon_hf.data.media import convert_picture, kind_of_cell, read_sound, resample

_Rows: TypeAlias = Mapping[str, list]
Example: TypeAlias = dict[str, Tensor]
InputColumn: TypeAlias = str | Sequence[str] | None


@dataclass(frozen=True)
class ModelInputs:
    """Describe what a model takes, as far as preparing examples for it needs to know.

    Attributes:
        names: The parameters of its `forward`.
        main: The one that raw images go to.
        labelled: Whether the task needs class labels.
        multi_label: Whether an example may have several.
        conditioned: How many class labels the model takes as an input, `class_labels` (0: any number); None where none.
        null_label: The one that stands for none, where there is one.
        channels: Image channels, or None where the model has no convolution to tell.
        image_size: (height, width) where the model takes one size only, else None.
        symmetric: Whether pixels lie in [-1, 1] (diffusion) and not in [0, 1].
        pad_token_id: What the model takes for padding, where it is told.
        longest: How many tokens the model has positions for, where it is told.
        class_names: What the model calls its classes, in its order; empty where it does not tell.
    """

    names: tuple[str, ...]
    main: str
    labelled: bool
    channels: int | None = None
    image_size: tuple[int, int] | None = None
    symmetric: bool = False
    pad_token_id: int | None = None
    longest: int | None = None
    class_names: tuple[str, ...] = ()
    multi_label: bool = False
    conditioned: int | None = None
    null_label: int | None = None


@dataclass(frozen=True)
class Preprocessor:
    """Turn rows of a dataset into examples ready for the model.

    Attributes:
        prepare: Takes rows (column name -> list) and returns a dict of tensors for each example.
        columns: Where the inputs are.
        padding: What variable-length inputs are filled up with, by input name; 0 where not named.
    """

    prepare: Callable[[_Rows], list[Example]]
    columns: tuple[str, ...]
    padding: Mapping[str, float]

    def stack(self, examples: list[Example], widths: Mapping[str, int] | None = None) -> Example:
        """Return one tensor for each input, filled up at the end of the first dimension where lengths differ.

        Args:
            examples: At least one.
            widths: The length that inputs get at least, by name.
        """
        return self.join([{name: value[None] for name, value in example.items()} for example in examples], widths)

    def join(self, batches: list[Example], widths: Mapping[str, int] | None = None) -> Example:
        """Return batches as one, filled up as `stack` does it; they are emptied, so that memory holds them once."""
        return {
            name: _join([b.pop(name) for b in batches], self.padding.get(name, 0), (widths or {}).get(name, 0))
            for name in list(batches[0])
        }


def _join(parts: list[Tensor], fill: float, width: int) -> Tensor:
    shapes = {tuple(part.shape[1:]) for part in parts}
    if len({shape[1:] for shape in shapes}) > 1:
        raise ValueError(
            f"The examples have different sizes, {min(shapes)} and {max(shapes)} among them. Give images of one size, "
            "or save with the model a processor that resizes them (in Python pass it as `processing_class`)."
        )
    shape = parts[0].shape[1:]
    if shape:
        shape = torch.Size((max(width, *(part.shape[1] for part in parts)), *shape[1:]))
    if shapes == {tuple(shape)} and len(parts[-1]) == 1:
        return torch.cat(parts)  # Single examples, of one size: faster than one by one.
    joined = parts[0].new_empty((sum(map(len, parts)), *shape))
    if shapes != {tuple(shape)}:
        joined.fill_(fill)
    parts.reverse()
    row = 0
    while parts:
        part = parts.pop()
        rows = joined[row : row + len(part)]
        (rows[:, : part.shape[1]] if shape else rows).copy_(part)
        row += len(part)
    return joined


def make_preprocessor(
    row: Mapping[str, Any],
    needs: ModelInputs,
    processing_class: Any | None,
    name: str,
    pair: bool = False,
) -> Preprocessor:
    """Choose how rows like `row` become model inputs: ready columns first, else images, sounds, text or numbers.

    Args:
        row: One row, without its label: column name -> value.
        needs: What the model takes.
        processing_class: Image processor, tokenizer or feature extractor. Images can do without.
        name: What messages call the domain.
        pair: Whether two columns of text are one input, as for entailment.

    Raises:
        ValueError: No column or several could be meant, or text or audio lacks its `processing_class`.
    """
    pad = getattr(processing_class, "pad_token_id", None)
    # The model's own goes first: one that looks for the last token would take another one's padding for text.
    padding = {"input_ids": (pad or 0) if needs.pad_token_id is None else needs.pad_token_id}
    ready = {column: column for column, v in row.items() if column in needs.names and kind_of_cell(v) == "tensors"}
    if "latents" in row and "encoder_hidden_states" in ready:
        ready["latents"] = needs.main
    if ready:
        # The row may hold more columns, which are left out.
        masked = "input_ids" in ready and "attention_mask" in needs.names
        return Preprocessor(partial(_ready, columns=ready, masked=masked), tuple(ready), padding)
    for kind in ("images", "audio", "text", "tensors"):
        columns = [column for column, value in row.items() if kind_of_cell(value) == kind]
        if len(columns) > 1 and not (pair and kind == "text"):
            more = ", or two texts that are one input" if kind == "text" else ""
            raise ValueError(
                f"The {name} domain has several columns of {kind}, {columns}: name one{more}, with "
                "`--restricted_input` or `--original_input` (in Python `input_columns`)."
            )
        if columns:
            prepare = _prepare_columns(kind, columns, needs, processing_class)
            return Preprocessor(prepare, tuple(columns), padding)
    raise ValueError(
        f"The {name} domain has no column that the model could take: it has {list(row)}, the model takes "
        f"{list(needs.names)}. Rename the column, or pass raw images, text or audio."
    )


def _prepare_columns(kind: str, columns: list[str], needs: ModelInputs, processing_class: Any | None) -> Callable:
    # Partial functions, not closures: a data loader's workers are sent them by pickle.
    column = columns[0]
    if kind == "tensors":
        return partial(_ready, columns={column: needs.main})
    # Each kind of processor has something that the others lack.
    marks = {"text": "model_max_length", "audio": "sampling_rate"}
    made_for = [other for other, mark in marks.items() if hasattr(processing_class, mark)]
    if processing_class is not None and kind not in (made_for or ["images"]):
        raise ValueError(
            f"Column {column!r} holds {kind}, but the model's {type(processing_class).__name__} prepares "
            f"{' and '.join(made_for) or 'images'}: give such data, or name another column."
        )
    if kind == "images":
        mode = {1: "L", 3: "RGB", 4: "RGBA"}.get(needs.channels or 3)
        if mode is None:
            raise ValueError(f"The model takes {needs.channels} channels, images have 1, 3 or 4: pass ready tensors.")
        return partial(_images, column=column, mode=mode, needs=needs, processing_class=processing_class)
    if processing_class is None:
        what, ready = {
            "text": ("tokenizer", "`input_ids` and `attention_mask`"),
            "audio": ("feature extractor", "`input_values`"),
        }[kind]
        raise ValueError(
            f"Column {column!r} holds {kind}: save the model's {what} with it (in Python pass it as "
            f"`processing_class`), or give data with {ready}."
        )
    if kind == "text":
        return partial(_text, columns=columns, needs=needs, processing_class=processing_class)
    return partial(_audio, column=column, needs=needs, processing_class=processing_class)


def _ready(rows: _Rows, columns: Mapping[str, str], masked: bool = False) -> list[Example]:
    count = len(next(iter(rows.values())))
    examples = [{name: _to_tensor(rows[column][i]) for column, name in columns.items()} for i in range(count)]
    for example in examples if masked else ():
        # Without a mask a model would read the padding, and its prediction would depend on the batch.
        example.setdefault("attention_mask", torch.ones_like(example["input_ids"]))
    return examples


def _to_tensor(value: Any) -> Tensor:
    tensor = torch.as_tensor(np.asarray(value))
    # Lists of numbers come out of Arrow as float64.
    return tensor.to(torch.get_default_dtype()) if tensor.dtype == torch.float64 else tensor


def _images(rows: _Rows, column: str, mode: str, needs: ModelInputs, processing_class: Any | None) -> list[Example]:
    images = [convert_picture(image, mode, exact=processing_class is None) for image in rows[column]]
    if processing_class is None:
        return [{needs.main: _pixels(image, len(mode), needs)} for image in images]
    pixels = processing_class(images=images, return_tensors="pt")["pixel_values"]
    return [{needs.main: p} for p in pixels]


def _pixels(image: Image, channels: int, needs: ModelInputs) -> Tensor:
    if needs.image_size is not None and image.size != needs.image_size[::-1]:
        image = image.resize(needs.image_size[::-1], PillowResampling.BILINEAR)
    pixels = torch.from_numpy(np.array(image, dtype=np.float32) / 255)
    pixels = pixels[None].repeat(min(channels, 3), 1, 1) if pixels.ndim == 2 else pixels.permute(2, 0, 1)
    if len(pixels) < channels:
        pixels = torch.cat([pixels, torch.ones_like(pixels[:1])])  # A grey picture of 16 bits has no transparency.
    return (pixels * 2 - 1 if needs.symmetric else pixels).contiguous()


def _text(rows: _Rows, columns: list[str], needs: ModelInputs, processing_class: Any) -> list[Example]:
    texts = [list(rows[column]) for column in columns]
    if any(text is None for column in texts for text in column):
        raise ValueError("it is missing")
    # Many saved tokenizers know no length, and would cut nothing. RoBERTa's kind counts its positions from the padding
    # token on, which takes two of them.
    longest = min(processing_class.model_max_length, (needs.longest or 10**9) - 2)
    masked = {"return_attention_mask": True} if "attention_mask" in needs.names else {}
    encoded = processing_class(*texts, truncation=True, max_length=longest, **masked)
    if not all(encoded["input_ids"]):
        raise ValueError("it has no words")
    names = [name for name in encoded if name in needs.names]
    return [{name: torch.tensor(encoded[name][i]) for name in names} for i in range(len(texts[0]))]


def _audio(rows: _Rows, column: str, needs: ModelInputs, processing_class: Any) -> list[Example]:
    examples, rate = [], processing_class.sampling_rate
    for cell in rows[column]:
        encoded = processing_class(resample(*read_sound(cell), rate), sampling_rate=rate, return_tensors="pt")
        examples.append({name: encoded[name][0] for name in encoded if name in needs.names})
    return examples

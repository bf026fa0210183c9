"""From raw columns (image, text, audio) to model inputs, one example at a time."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from PIL.Image import Resampling as PillowResampling
from torch import Tensor

Rows = Mapping[str, list]
Example = dict[str, Tensor]


@dataclass(frozen=True)
class ModelInputs:
    """What a model takes, as far as preparing examples for it needs to know.

    Attributes:
        names: The parameters of its `forward`.
        main: The one that raw images go to.
        labelled: Whether the task needs class labels.
        channels: Image channels, or None where the model has no convolution to tell.
        image_size: (height, width) where the model takes one size only, else None.
        symmetric: Whether pixels lie in [-1, 1] (diffusion) and not in [0, 1].
        pad_token_id: What the model takes for padding, where it is told.
        longest: How many tokens the model has positions for, where it is told.
    """

    names: tuple[str, ...]
    main: str
    labelled: bool
    channels: int | None = None
    image_size: tuple[int, int] | None = None
    symmetric: bool = False
    pad_token_id: int | None = None
    longest: int | None = None

    def accepts(self, name: str) -> bool:
        """Whether the model's `forward` has a parameter of this name."""
        return name in self.names


@dataclass(frozen=True)
class Preprocessor:
    """Turns rows of a dataset into examples ready for the model.

    Attributes:
        inputs: Takes rows (column name -> list) and returns one dict of tensors an example.
        label_column: Where the labels are, or None.
        padding: What variable-length inputs are filled up with, by input name; 0 where not named.
    """

    inputs: Callable[[Rows], list[Example]]
    label_column: str | None
    padding: Mapping[str, float] = field(default_factory=dict)

    def __call__(self, rows: Rows) -> list[Example]:
        """One example a row."""
        return self.inputs(rows)

    def stack(self, examples: list[Example]) -> Example:
        """One tensor an input, filled up at the end of the first dimension where lengths differ."""
        return {name: _stack([e[name] for e in examples], self.padding.get(name, 0)) for name in examples[0]}


def _stack(tensors: list[Tensor], fill: float) -> Tensor:
    if all(t.shape == tensors[0].shape for t in tensors):
        return torch.stack(tensors)
    if any(t.shape[1:] != tensors[0].shape[1:] for t in tensors):
        shapes = sorted({tuple(t.shape) for t in tensors})
        raise ValueError(
            f"The examples have different sizes, {shapes[0]} and {shapes[-1]} among them. Pass a `processing_class` "
            "that resizes them, or a dataset whose images all have one size."
        )
    stacked = tensors[0].new_full((len(tensors), max(len(t) for t in tensors), *tensors[0].shape[1:]), fill)
    for row, tensor in zip(stacked, tensors, strict=True):
        row[: len(tensor)] = tensor
    return stacked


def prepare_ready(columns: Mapping[str, str]) -> Callable[[Rows], list[Example]]:
    """Columns that already are model inputs. `columns`: column name -> input name."""
    return partial(_ready, columns=columns)


def _ready(rows: Rows, columns: Mapping[str, str]) -> list[Example]:
    count = len(next(iter(rows.values())))
    return [{name: _to_tensor(rows[column][i]) for column, name in columns.items()} for i in range(count)]


def _to_tensor(value: Any) -> Tensor:
    tensor = torch.as_tensor(np.asarray(value))
    # Lists of numbers come out of Arrow as float64.
    return tensor.to(torch.get_default_dtype()) if tensor.dtype == torch.float64 else tensor


def prepare_images(column: str, needs: ModelInputs, processing_class: Any | None) -> Callable[[Rows], list[Example]]:
    """Images through an image processor, or, without one, resized where the model needs a size and scaled to its range."""
    mode = {1: "L", 3: "RGB", 4: "RGBA"}.get(needs.channels or 3)
    if mode is None:
        raise ValueError(f"The model takes {needs.channels} channels, but images have 1, 3 or 4: pass ready tensors.")
    return partial(_images, column=column, mode=mode, needs=needs, processing_class=processing_class)


def _images(rows: Rows, column: str, mode: str, needs: ModelInputs, processing_class: Any | None) -> list[Example]:
    images = [image.convert(mode) for image in rows[column]]
    if processing_class is None:
        return [{needs.main: _pixels(image, needs)} for image in images]
    pixels = processing_class(images=images, return_tensors="pt")["pixel_values"]
    return [{needs.main: p} for p in pixels]


def _pixels(image: Image, needs: ModelInputs) -> Tensor:
    if needs.image_size is not None and image.size != needs.image_size[::-1]:
        image = image.resize(needs.image_size[::-1], PillowResampling.BILINEAR)
    pixels = torch.from_numpy(np.array(image, dtype=np.float32) / 255)
    pixels = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
    return (pixels * 2 - 1 if needs.symmetric else pixels).contiguous()


def prepare_text(column: str, needs: ModelInputs, processing_class: Any | None) -> Callable[[Rows], list[Example]]:
    """Sentences through a tokenizer."""
    if processing_class is None:
        raise ValueError(
            f"Column {column!r} holds text: pass the model's tokenizer as `processing_class`, "
            "or a dataset with `input_ids` and `attention_mask`."
        )
    return partial(_text, column=column, needs=needs, processing_class=processing_class)


def _text(rows: Rows, column: str, needs: ModelInputs, processing_class: Any) -> list[Example]:
    # Many saved tokenizers know no length, and would cut nothing. Two positions are for those that count from the padding.
    longest = min(processing_class.model_max_length, (needs.longest or 10**9) - 2)
    encoded = processing_class(list(rows[column]), truncation=True, max_length=longest)
    names = [name for name in encoded if needs.accepts(name)]
    return [{name: torch.tensor(encoded[name][i]) for name in names} for i in range(len(rows[column]))]


def prepare_audio(column: str, needs: ModelInputs, processing_class: Any | None) -> Callable[[Rows], list[Example]]:
    """Sounds through a feature extractor, resampled to its rate."""
    if processing_class is None:
        raise ValueError(
            f"Column {column!r} holds audio: pass the model's feature extractor as `processing_class`, "
            "or a dataset with `input_values`."
        )
    return partial(_audio, column=column, needs=needs, processing_class=processing_class)


def _audio(rows: Rows, column: str, needs: ModelInputs, processing_class: Any) -> list[Example]:
    examples, rate = [], processing_class.sampling_rate
    for cell in rows[column]:
        encoded = processing_class(_resample(*_decode(cell), rate), sampling_rate=rate, return_tensors="pt")
        examples.append({name: encoded[name][0] for name in encoded if needs.accepts(name)})
    return examples


def _decode(cell: Mapping[str, Any]) -> tuple[np.ndarray, int]:
    if cell.get("array") is not None:
        return np.asarray(cell["array"], dtype=np.float32), int(cell["sampling_rate"])
    try:
        import soundfile
    except ImportError as error:
        raise ImportError("Decoding audio files needs soundfile: pip install -e '.[audio]' in a clone.") from error
    source = io.BytesIO(cell["bytes"]) if cell.get("bytes") else cell["path"]
    samples, rate = soundfile.read(source, dtype="float32", always_2d=True)
    return samples.mean(axis=1), rate


def _resample(samples: np.ndarray, source: int, target: int) -> np.ndarray:
    if source == target:
        return samples
    try:
        from scipy.signal import resample_poly
    except ImportError as error:
        raise ImportError(
            f"Resampling from {source} to {target} Hz needs scipy: pip install -e '.[audio]' in a clone."
        ) from error
    common = np.gcd(source, target)
    return resample_poly(samples, target // common, source // common).astype(np.float32)

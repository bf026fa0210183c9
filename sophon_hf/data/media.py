"""Pictures and sounds as people have them: from a cell of a data set to numbers that keep their meaning."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from typing import Any

import datasets
import numpy as np
from datasets.packaged_modules.audiofolder.audiofolder import AudioFolder
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from PIL import Image as Pillow
from PIL.Image import Image
from torch import Tensor

# Cells at the start of a column that show what it holds.
_LOOKED_AT = 100


def media_columns(features: Mapping[str, Any]) -> list[str]:
    """Return the columns of pictures and sounds."""
    return [column for column, feature in features.items() if isinstance(feature, (datasets.Image, datasets.Audio))]


def kind_of_cell(value: Any) -> str | None:
    """Return what kind of input a value could be, "images", "audio", "text" or "tensors", or None."""
    if isinstance(value, Image):
        return "images"
    if isinstance(value, str):
        return "text"
    if isinstance(value, dict) and ({"array", "sampling_rate"} <= set(value) or {"bytes", "path"} <= set(value)):
        return "audio"
    if isinstance(value, (list, np.ndarray, Tensor)) and np.ndim(value) >= 1:
        return "tensors"
    return None


def undecoded(dataset: Any) -> Any:
    """Return a data set, or a stream, whose pictures and sounds are read as their bytes and paths."""
    for column in media_columns(dataset.features or {}):
        dataset = dataset.cast_column(column, type(dataset.features[column])(decode=False))
    return dataset


def with_media(dataset: datasets.Dataset, folder: str | None) -> datasets.Dataset:
    """Return a data set whose files are pictures and sounds, also where no feature says so, and whose fields are flat.

    Files are columns of bytes, of bytes and path, and of paths in `folder`, where it is known. Another column of
    several fields becomes one column for each, called `column.field`.
    """
    if dataset.format["type"] == "custom":
        return dataset
    while True:
        for column, feature in dataset.features.items():
            plain = isinstance(feature, datasets.Value) and feature.dtype.endswith(("string", "binary"))
            if not plain and not (isinstance(feature, dict) and set(feature) == {"bytes", "path"}):
                continue
            cells = dataset.with_format(None).select_columns([column])
            first = next((cell for cell in cells[:_LOOKED_AT][column] if cell), None)
            media = _media_of(first, folder)
            if media is not None and isinstance(first, str):
                paths = [cell and os.path.join(folder or "", cell) for cell in cells[column]]
                dataset = dataset.remove_columns(column).add_column(column, paths)
            if media is not None:
                dataset = dataset.cast_column(column, media)
        if not any(isinstance(feature, dict) for feature in dataset.features.values()):
            return dataset
        # `flatten` would take pictures apart, and refuses sounds.
        kept = dataset.select_columns(media_columns(dataset.features))
        flat = dataset.remove_columns(kept.column_names).flatten(max_depth=2)  # One level: it counts from 1 to below.
        if kept.column_names:
            joined = datasets.concatenate_datasets([flat, kept], axis=1)
            info = dataset.info.copy()
            info.features = joined.features
            flat = datasets.Dataset(joined.data, info, split=dataset.split)
        dataset = flat


def _media_of(cell: Any, folder: str | None) -> datasets.Image | datasets.Audio | None:
    """Return the feature of a file that a cell holds or, as text, names; None where it does not."""
    image, sound = datasets.Image(), datasets.Audio(decode=False)
    if isinstance(cell, str):
        suffix = os.path.splitext(cell)[1].lower()
        there = folder is not None and os.path.isfile(os.path.join(folder, cell))
        is_image, is_sound = suffix in ImageFolder.EXTENSIONS, suffix in AudioFolder.EXTENSIONS
        return (image if is_image else sound) if there and (is_image or is_sound) else None
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    if not content:
        return None
    try:
        Pillow.open(io.BytesIO(content)).close()
        return image
    except OSError:
        pass
    try:
        import soundfile

        soundfile.info(io.BytesIO(content))
        return sound
    except (ImportError, RuntimeError):
        return None


def read_cell(cell: Any, feature: Any) -> None:
    """Decode a picture or a sound as it is stored, and raise what its decoder raises; anything else must be there.

    Raises:
        ValueError: There is nothing in the cell.
    """
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        raise ValueError("it is missing")
    if isinstance(feature, datasets.Image):
        datasets.Image().decode_example(cell)
    elif isinstance(feature, datasets.Audio):
        read_sound(cell)


def convert_picture(image: Image | None, mode: str, exact: bool) -> Image:
    """Return a picture in `mode`; one of 16 bits, whose white is 65535, keeps its fractions where asked.

    Args:
        image: As Pillow has read it.
        mode: "L", "RGB" or "RGBA".
        exact: Return a picture of 16 bits in mode F, from 0 to 255, and leave its one channel to be repeated.

    Raises:
        ValueError: It is missing, or its values have no range that is known (modes I and F).
    """
    if image is None:
        raise ValueError("it is missing")
    if image.mode in ("I", "F"):
        raise ValueError(
            f"its mode is {image.mode}, whose values have no known range: give `pixel_range`, what is black and what "
            "is white, such as 0 and 4095"
        )
    if not image.mode.startswith("I;16"):
        return image.convert(mode)
    values = np.asarray(image).astype(np.float32) / 257
    return Pillow.fromarray(values) if exact else Pillow.fromarray(values.round().astype(np.uint8)).convert(mode)


def with_pixel_range(dataset: datasets.Dataset, low: float, high: float) -> datasets.Dataset:
    """Scale pictures of more than 8 bits so that `low` is black and `high` white; what lies beyond is cut off.

    Raises:
        ValueError: `low` is not below `high`, or there are no pictures.
    """
    if not low < high:
        raise ValueError(f"pixel_range is [{low}, {high}]: what is black must be below what is white.")
    columns = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    if not columns:
        raise ValueError(f"pixel_range is for pictures, and no column of {dataset.column_names} holds any.")

    def scaled(image: Image | None) -> Image | None:
        if image is None or not image.mode.startswith(("I", "F")):
            return image
        values = (np.asarray(image).astype(np.float64) - low) / (high - low)
        return Pillow.fromarray((values.clip(0, 1) * 65535).round().astype(np.uint16))

    def scale(rows: dict[str, list]) -> dict[str, list]:
        return {column: [scaled(image) for image in rows[column]] for column in columns}

    return dataset.map(scale, batched=True, batch_size=100, features=dataset.features, desc="Scaling pictures")


def read_sound(cell: Mapping[str, Any] | None) -> tuple[np.ndarray, int]:
    """Return samples, shape (n,), float32, and their rate; several channels are averaged.

    Raises:
        ValueError: There is no sound in the cell.
        ImportError: soundfile is not installed.
    """
    if cell is None:
        raise ValueError("it is missing")
    if cell.get("array") is not None:
        samples = np.asarray(cell["array"], dtype=np.float32)
        if samples.ndim > 2 or samples.size == 0:
            raise ValueError(f"its samples have shape {samples.shape}, not (samples,) or (channels, samples)")
        # Libraries differ in which axis comes first; a sound has more samples than channels.
        mono = samples if samples.ndim == 1 else samples.mean(axis=int(np.argmin(samples.shape)))
        return mono, int(cell["sampling_rate"])
    try:
        import soundfile
    except ImportError as error:
        raise ImportError("Decoding audio files needs soundfile: pip install -e '.[audio]' in a clone.") from error
    source = io.BytesIO(cell["bytes"]) if cell.get("bytes") else cell["path"]
    samples, rate = soundfile.read(source, dtype="float32", always_2d=True)
    if len(samples) == 0:
        raise ValueError("it has no samples")
    return samples.mean(axis=1), rate


def resample(samples: np.ndarray, source: int, target: int) -> np.ndarray:
    """Return samples of another rate, shape (n,), float32.

    Raises:
        ImportError: scipy is not installed.
    """
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

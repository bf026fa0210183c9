"""Load a domain: a Hub id, a folder, or an object of `datasets`."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import datasets
from datasets.packaged_modules.audiofolder.audiofolder import AudioFolder
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from sophon_hf.data.media import media_columns, read_cell, undecoded, with_media, with_pixel_range
from sophon_hf.utils import hint, quiet, unreachable

logger = logging.getLogger(__name__)

Source: TypeAlias = str | os.PathLike | datasets.Dataset | datasets.IterableDataset | datasets.DatasetDict

_STREAM_LIMIT = 100_000
_LABEL_COLUMNS = ("labels", "label")
_SPLIT_FOLDERS = {"train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation"}
_FILES: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
}


class MissingSplitError(ValueError):
    """A data set has no split of this name."""


def load_domain(
    source: Source,
    split: str = "train",
    *,
    skip_unreadable: bool = False,
    pixel_range: tuple[float, float] | None = None,
    label: str | None = None,
    inputs: Sequence[str] | None = None,
) -> datasets.Dataset:
    """Load one split of a domain.

    Args:
        source: A Hub id (`owner/name`, or `owner/name:configuration` where it has several); a folder of images, sounds,
            or files of the following kinds, or one that `save_to_disk` wrote; a CSV, TSV, JSON, JSONL, Parquet or Arrow
            file; an object of `datasets`. An `IterableDataset` is read once, up to its first 100,000 examples, because
            halves, streams and resuming need random access.
        split: The split to take where there are several.
        skip_unreadable: Leave out examples with a picture, sound or text that is missing or cannot be decoded (in other
            data: with an empty cell), or without a label where others have one, and tell how many. Otherwise they are
            refused when they are read.
        pixel_range: What is black and what is white in pictures of more than 8 bits, such as (0, 4095). Without it,
            white is 65535 in pictures of 16 bits, and those of other depths are refused.
        label: The label column, where it is not found by itself.
        inputs: The input columns, where others may be empty.

    Returns:
        The examples as they were stored; sounds are not decoded yet.

    Raises:
        ValueError: There is no such split, or there are no examples.
        ConnectionError: A Hub id cannot be looked up.
        FileNotFoundError: `source` is neither a file, a folder nor a data set on the Hub.
    """
    return take_split(open_source(source), source, split, skip_unreadable, pixel_range, label, inputs)


def take_split(
    loaded: datasets.Dataset | Mapping[str, datasets.Dataset],
    source: Source,
    split: str,
    skip_unreadable: bool = False,
    pixel_range: tuple[float, float] | None = None,
    label: str | None = None,
    inputs: Sequence[str] | None = None,
) -> datasets.Dataset:
    """Return one split of what `open_source` has loaded from `source`; arguments and errors as of `load_domain`."""
    if isinstance(loaded, Mapping):
        if split not in loaded:
            names = [str(name) for name in loaded]
            advice = hint(split, names, " Name one of them.")
            raise MissingSplitError(f"The data set has no split {split!r}; it has {sorted(names)}.{advice}")
        loaded = loaded[split]
    if skip_unreadable:
        loaded = _readable(loaded, source, label, inputs)
    if len(loaded) == 0:
        raise ValueError("The data set is empty: check its path, its split and any filter on it.")
    return loaded if pixel_range is None else with_pixel_range(loaded, *pixel_range)


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


def is_missing_label(value: Any, feature: Any) -> bool:
    """Return whether a cell of a label column holds no label: it is empty, or a `ClassLabel` of -1."""
    unlabelled = isinstance(feature, datasets.ClassLabel) and value == -1
    return unlabelled or value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def open_source(source: Source) -> datasets.Dataset | dict[str, datasets.Dataset]:
    """Return a data set, or its splits by name; arguments and errors as of `load_domain`."""
    loaded: Any = source
    folder = None
    if isinstance(source, (str, os.PathLike)):
        if os.path.exists(source):
            folder = os.fspath(source) if os.path.isdir(source) else os.path.dirname(source)
        try:
            with quiet("datasets", "huggingface_hub.repocard"):  # They tell of each file what an error says once.
                loaded = _load_from(os.fspath(source))
        except ValueError as error:
            if "corresponds to no data" not in str(error):
                raise
            raise ValueError(f"{os.fspath(source)!r} holds no examples.") from error
    if isinstance(loaded, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        return {name: with_media(_as_table(part), folder) for name, part in loaded.items()}
    return with_media(_as_table(loaded), folder)


def _as_table(loaded: Any) -> datasets.Dataset:
    if isinstance(loaded, datasets.IterableDataset):
        return _read_stream(loaded)
    if not isinstance(loaded, datasets.Dataset):
        raise TypeError(
            "A domain must be a Hub id, a file, a folder, or a Dataset, IterableDataset or DatasetDict, not "
            f"{type(loaded).__name__}."
        )
    return loaded


def _load_from(source: str) -> Any:
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if os.path.isfile(source):
        return _load_file(source)
    on_hub = not os.path.isdir(source)
    local = os.path.isabs(source) or source.startswith((".", "~")) or source.count("/") > 1
    if on_hub and (local or os.path.splitext(source)[1].lower() in _FILES):
        raise FileNotFoundError(
            f"There is no file or folder {source!r}, and it is not the form of a Hub id ('owner/name')."
        )
    if any(os.path.exists(os.path.join(source, name)) for name in ("state.json", "dataset_dict.json")):
        return datasets.load_from_disk(source)
    # A colon names a configuration on the Hub, but may be part of a folder's name.
    name, _, configuration = source.partition(":") if on_hub else (source, "", "")
    where: tuple[Any, ...] = (name, configuration or None)
    try:
        builder = datasets.load_dataset_builder(*where)
        if not on_hub and (kind := _kind_of_folder(source, builder)) is not None:
            where = (kind, None, source)
            builder = datasets.load_dataset_builder(*where)
        if builder.name == "audiofolder":
            features = next(iter(builder.as_streaming_dataset().values())).features
            sounds = [column for column, feature in features.items() if isinstance(feature, datasets.Audio)]
            files = datasets.Features({**features, **dict.fromkeys(sounds, _SoundFile(decode=False))})
            loaded = datasets.load_dataset(*where, features=files)
            for column in sounds:
                loaded = loaded.cast_column(column, datasets.Audio(decode=False))
        else:
            builder.download_and_prepare()  # `load_dataset` would look up every file again.
            loaded = builder.as_dataset()
    except datasets.exceptions.DatasetNotFoundError as error:
        raise FileNotFoundError(
            f"{source!r} is neither a file or folder here nor a data set on the Hub that you can read. Check the "
            "spelling; for a private one run `hf auth login` first."
        ) from error
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"The folder {source!r} holds no data: put images (PNG, JPEG, ...), sounds (WAV, FLAC, ...), or CSV, JSON "
            "or Parquet files there."
        ) from error
    except (ConnectionError, OfflineModeIsEnabled, HfHubHTTPError) as error:
        raise ConnectionError(unreachable(source, "data set")) from error
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(f"{source!r} cannot be read: {error.__cause__ or error}") from error
    for part in loaded.values():
        if on_hub:
            remember_source(part, source, builder.hash)
        else:
            part.info.dataset_name = os.path.basename(os.path.abspath(source))
    if on_hub:
        return loaded
    if isinstance(builder, (ImageFolder, AudioFolder)):
        _tell_folders(source, builder, {name for part in loaded.values() for name in part.column_names})
    return _without_split_names(loaded)


def _tell_folders(source: str, builder: ImageFolder | AudioFolder, columns: set[str]) -> None:
    """Warn where folders are taken for other classes than one might think: the innermost ones are, all equally deep."""
    for files in (builder.config.data_files or {}).values():
        places = [os.path.relpath(str(file), source) for file in files]
        places = sorted(place for place in places if os.path.splitext(place)[1].lower() in builder.EXTENSIONS)
        depths = {place.count(os.sep): place for place in places}
        by_name: dict[str, set[str]] = {}
        for folder in map(os.path.dirname, places):
            by_name.setdefault(os.path.basename(folder), set()).add(folder)
        alike = next((sorted(folders) for folders in by_name.values() if len(folders) > 1), None)
        if len(depths) > 1 and len(by_name) > 1 and len(columns) == 1:
            said = "no folder is a class, since files lie at several depths", list(depths.values())
        elif alike and "label" in columns:
            said = "the innermost folders are the classes, and those of one name are one class", alike
        else:
            continue
        logger.warning("In %s %s: %s, for instance.", source, said[0], " and ".join(said[1][:2]))


def _kind_of_folder(source: str, builder: datasets.DatasetBuilder) -> str | None:
    """Return "imagefolder" or "audiofolder" where texts lie beside pictures or sounds of the same names; else None.

    Raises:
        ValueError: Folders called as splits are, but for the case, would be taken for classes.
    """
    top = [entry.name for entry in os.scandir(source) if entry.is_dir()]
    splits = [name for name in top if name.lower() in _SPLIT_FOLDERS]
    if len(splits) > 1 and (misread := [name for name in splits if name not in _SPLIT_FOLDERS]):
        raise ValueError(f"The folders {misread} of {source!r} are splits only in lower case: rename them.")
    if isinstance(builder, (ImageFolder, AudioFolder)):
        return None
    read = {os.path.splitext(str(file))[0] for files in (builder.config.data_files or {}).values() for file in files}
    found = [os.path.splitext(os.path.join(place, name)) for place, _, names in os.walk(source) for name in names]
    for kind in (ImageFolder, AudioFolder):
        media = {os.path.abspath(stem) for stem, suffix in found if suffix.lower() in kind.EXTENSIONS}
        if read and 2 * len(media & read) >= len(read):
            return kind.__name__.lower()
    return None


class _SoundFile(datasets.Audio):
    """A sound by its path: `Audio` itself would encode every file once more, which needs torchcodec."""

    def encode_example(self, value: Any) -> Any:
        return {"bytes": None, "path": value} if isinstance(value, str) else value


def _load_file(path: str) -> datasets.DatasetDict:
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in _FILES:
        raise ValueError(f"{path!r} is no file that a domain could be read from: {', '.join(_FILES)} are.")
    kind, settings = _FILES[suffix]
    if suffix == ".csv":
        with open(path, encoding="utf-8", errors="replace") as file:
            head = file.readline()
        if ";" in head and "," not in head:
            settings = {"sep": ";"}  # As spreadsheets write it in much of Europe.
    try:
        loaded = datasets.load_dataset(kind, data_files=path, **settings)
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, UnicodeError):
            raise ValueError(f"{path!r} is no text in UTF-8: save it as 'CSV UTF-8'. ({error.__cause__})") from error
        raise ValueError(f"{path!r} cannot be read as {kind}: {error.__cause__ or error}") from error
    if suffix == ".json" and len(loaded["train"]) == 1:
        # Exports often keep the examples in a list beside a version and the like.
        cells = loaded["train"][0].items()
        lists = [name for name, cell in cells if isinstance(cell, list) and cell and isinstance(cell[0], dict)]
        if len(lists) == 1:
            loaded = datasets.load_dataset(kind, data_files=path, field=lists[0])
    for part in loaded.values():
        part.info.dataset_name = os.path.basename(path)
    return loaded


def _without_split_names(loaded: datasets.DatasetDict) -> datasets.DatasetDict:
    """Drop the labels of folders `train` and `test` without labels, which are the names of these folders."""
    for name, part in loaded.items():
        label = part.features.get("label")
        if isinstance(label, datasets.ClassLabel) and set(label.names) <= _SPLIT_FOLDERS and len(label.names) > 1:
            loaded[name] = part.remove_columns("label")
    return loaded


def _readable(
    dataset: datasets.Dataset, source: Source, label: str | None, inputs: Sequence[str] | None
) -> datasets.Dataset:
    plain, reasons = undecoded(dataset.with_format(None)), {}
    try:
        label = label_column(dataset, label)
    except ValueError:
        label = None  # A model that needs labels refuses it, and can name the domain.
    if label is not None:
        unlabelled = [is_missing_label(value, dataset.features[label]) for value in plain[label]]
        if not all(unlabelled):
            reasons = {row: f"column {label!r}: it has no label" for row, missing in enumerate(unlabelled) if missing}
    others = {column: feature for column, feature in dataset.features.items() if column != label}
    texts = [column for column, feature in others.items() if feature == datasets.Value("string")]
    if unknown := [column for column in inputs or () if column not in others]:
        raise ValueError(f"There is no input column {unknown[0]!r}; the data set has {list(others)} beside its labels.")
    looked_at = inputs or media_columns(dataset.features) or texts or list(others)
    for row in range(len(dataset)):
        cells = plain[row]
        for column in looked_at:
            try:
                read_cell(cells[column], dataset.features[column])
            except Exception as error:  # Pillow and soundfile raise what they like.
                reasons[row] = f"column {column!r}: {error}"
    if not reasons:
        return dataset
    row, reason = min(reasons.items())
    logger.warning(
        "%d of %d examples of %s cannot be read and are left out, the first at row %d, %s",
        len(reasons),
        len(dataset),
        source if isinstance(source, (str, os.PathLike)) else "the data set",
        row,
        reason,
    )
    return dataset.select([row for row in range(len(dataset)) if row not in reasons])


def _read_stream(source: datasets.IterableDataset) -> datasets.Dataset:
    features = source.features
    media = media_columns(features or {})
    if media:
        files = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
        features = datasets.Features({**features, **dict.fromkeys(media, files)})
    rows = list(undecoded(source).take(_STREAM_LIMIT + 1))
    if len(rows) > _STREAM_LIMIT:
        logger.warning("Only the first %d examples of the iterable data set are read: shuffle it first.", _STREAM_LIMIT)
    table = datasets.Dataset.from_list(rows[:_STREAM_LIMIT], features=features)
    for column in media:
        feature = source.features[column]
        table = table.cast_column(
            column, datasets.Audio(decode=False) if isinstance(feature, datasets.Audio) else feature
        )
    return table


def remember_source(dataset: datasets.Dataset, name: str, revision: str | None) -> None:
    """Note where a data set was loaded from, for `hub_source`, in the form that `datasets` records downloads in.

    Args:
        dataset: As it was loaded; what is selected from it keeps the note.
        name: `owner/name`, or `owner/name:configuration`.
        revision: The commit; anything else says nothing and is left out.
    """
    commit = revision if re.fullmatch(r"[0-9a-f]{40}", revision or "") else "unknown"
    url = f"hf://datasets/{name}@{commit}"
    dataset.info.download_checksums = {url: {"num_bytes": None, "checksum": None}}


def hub_source(dataset: datasets.Dataset) -> tuple[str | None, str | None]:
    """Return the Hub id and commit that `remember_source` noted, or that `datasets` did; None for what is unknown."""
    for url in dataset.info.download_checksums or {}:
        if found := re.match(r"hf://datasets/([^@]+)@([^/]+)", url):
            return found[1], None if found[2] == "unknown" else found[2]
    return None, None

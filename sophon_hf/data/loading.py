"""Load a domain: a Hub id, a folder, or an object of `datasets`."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from typing import Any, TypeAlias

import datasets

from sophon_hf.utils import unreachable

logger = logging.getLogger(__name__)

Source: TypeAlias = str | os.PathLike | datasets.Dataset | datasets.IterableDataset | datasets.DatasetDict

# What a data set of the Hub keeps of where it is from, in the form that `datasets` records downloads in.
HUB_SOURCE = re.compile(r"hf://datasets/(?P<name>[^@]+)@(?P<revision>[^/]+)")
_STREAM_LIMIT = 100_000


def load_domain(source: Source, split: str = "train") -> datasets.Dataset:
    """Load one split of a domain.

    Args:
        source: A Hub id (`owner/name`, or `owner/name:configuration` where it has several), a folder (parquet files,
            an image folder, an audio folder), or an object of `datasets`. An `IterableDataset` is read once, up to its
            first 100,000 examples, because halves, streams and resuming need random access.
        split: The split to take where there are several.

    Returns:
        The examples as they were stored; sounds are not decoded yet.

    Raises:
        ValueError: There is no such split, or there are no examples.
        ConnectionError: A Hub id cannot be looked up.
        FileNotFoundError: `source` is neither a folder nor a data set on the Hub.
    """
    loaded: Any = _load_from(os.fspath(source)) if isinstance(source, (str, os.PathLike)) else source
    if isinstance(loaded, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        if split not in loaded:
            raise ValueError(f"The data set has no split {split!r}; it has {sorted(loaded)}. Name one of them.")
        loaded = loaded[split]
    if isinstance(loaded, datasets.IterableDataset):
        loaded = _read_stream(loaded)
    if not isinstance(loaded, datasets.Dataset):
        raise TypeError(
            "A domain must be a Hub id, a folder, or a Dataset, IterableDataset or DatasetDict, not "
            f"{type(loaded).__name__}."
        )
    if len(loaded) == 0:
        raise ValueError("The data set is empty: check its path, its split and any filter on it.")
    return loaded


def _load_from(source: str) -> datasets.DatasetDict:
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    on_hub = not os.path.isdir(source)
    if on_hub and (os.path.isabs(source) or source.startswith(".") or source.count("/") > 1):
        raise FileNotFoundError(f"There is no folder {source!r}, and it is not the form of a Hub id ('owner/name').")
    # A colon names a configuration on the Hub, but may be part of a folder's name.
    name, _, configuration = source.partition(":") if on_hub else (source, "", "")
    try:
        builder = datasets.load_dataset_builder(name, configuration or None)
        if builder.name == "audiofolder":
            # Its own feature would encode every sound once more, which needs torchcodec: read the paths only.
            features = next(iter(datasets.load_dataset(name, streaming=True).values())).features
            sounds = _audio_columns(features)
            paths = datasets.Features({**features, **dict.fromkeys(sounds, datasets.Value("string"))})
            return _undecoded(datasets.load_dataset(name, features=paths), sounds)
        loaded = datasets.load_dataset(name, configuration or None)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise FileNotFoundError(
            f"{source!r} is neither a folder here nor a data set on the Hub that you can read. Check the spelling; "
            "for a private one run `hf auth login` first."
        ) from error
    except (ConnectionError, OfflineModeIsEnabled, HfHubHTTPError) as error:
        raise ConnectionError(unreachable(source, "data set")) from error
    for part in loaded.values() if on_hub else ():
        remember_source(part, source, builder.hash)
    return loaded


def _read_stream(source: datasets.IterableDataset) -> datasets.Dataset:
    features = source.features
    sounds = _audio_columns(features or {})
    if features is not None and sounds:
        files = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
        features = datasets.Features({**features, **dict.fromkeys(sounds, files)})
    rows = list(_undecoded(source, sounds).take(_STREAM_LIMIT + 1))
    if len(rows) > _STREAM_LIMIT:
        logger.warning("Only the first %d examples of the iterable data set are read: shuffle it first.", _STREAM_LIMIT)
    return _undecoded(datasets.Dataset.from_list(rows[:_STREAM_LIMIT], features=features), sounds)


def _audio_columns(features: Mapping[str, Any]) -> list[str]:
    return [column for column, feature in features.items() if isinstance(feature, datasets.Audio)]


def _undecoded(dataset: Any, sounds: list[str]) -> Any:
    for column in sounds:
        dataset = dataset.cast_column(column, datasets.Audio(decode=False))
    return dataset


def remember_source(dataset: datasets.Dataset, name: str, revision: str | None) -> None:
    """Note the Hub id and commit that a data set was loaded from, in the form that `datasets` records downloads in.

    Args:
        dataset: As it was loaded; what is selected from it keeps the note.
        name: `owner/name`, or `owner/name:configuration`.
        revision: The commit; anything else says nothing and is left out.
    """
    commit = revision if re.fullmatch(r"[0-9a-f]{40}", revision or "") else "unknown"
    url = f"hf://datasets/{name}@{commit}"
    dataset.info.download_checksums = {url: {"num_bytes": None, "checksum": None}}

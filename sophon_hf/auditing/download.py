"""A stranger's repository, fetched so that it can do no harm: safetensors, JSON and text only."""

from __future__ import annotations

import fnmatch
import glob
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from sophon_hf.hub.schema import parse_json

logger = logging.getLogger(__name__)

READ = ("*.safetensors", "*.json", "*.txt", "README.md")
# An adapter's configuration makes transformers fetch another repository.
NOT_READ = ("adapter_*", "*/adapter_*")
MOST_FILES = 2000
LARGEST_TEXT = 64 * 2**20

# Fields of a configuration that lead to code of the repository's, or to another repository.
_CODE_FIELDS = ("auto_map", "custom_pipelines", "quantization_config", "kernel_config", "use_pretrained_backbone")
_NO_CONFIGURATION = ("tokenizer.json", "vocab.json", "sophon.json")  # Words of a vocabulary may be called like a field.
_NAME_FIELDS = ("attn_implementation", "_attn_implementation", "experts_implementation", "architecture", "backbone")


@dataclass(frozen=True)
class Download:
    """What was fetched.

    Attributes:
        folder: Holds links to the files that may be read, and nothing else.
        commit: Of the Hub's repository; None for a local folder.
        refused: File -> why it was not touched: its name leads out of the folder, or it is too large.
        ignored: Files of other kinds, which are not touched either.
    """

    folder: Path
    commit: str | None
    refused: dict[str, str]
    ignored: list[str]


def fetch(source: str | os.PathLike, folder: Path, revision: str | None = None) -> Download:
    """Fetch a repository of the Hub, pinned to one commit, or take a local folder.

    Args:
        source: Hub id or folder.
        folder: Empty or missing; gets links to the files.
        revision: Branch, tag or commit on the Hub; the newest commit by default.

    Raises:
        FileNotFoundError: Neither a folder nor a repository that can be read.
        ConnectionError: The Hub cannot be reached.
        ValueError: It holds too many files.
    """
    source = os.fspath(source)
    if os.path.isdir(source):
        origin, commit = Path(source), None
        sizes, refused = _in_folder(origin)
    else:
        commit, sizes = _on_hub(source, revision)
        origin, refused = None, {}
    refused |= {name: why for name in sizes if (why := _why_unsafe(name, sizes[name])) is not None}
    chosen = [name for name in sizes if name not in refused and _is_read(name)]
    if origin is None:
        origin = _download(source, commit, chosen)
    for name in chosen:
        link = folder / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to((origin / name).resolve())
    return Download(folder, commit, refused, sorted(set(sizes) - set(chosen) - set(refused)))


def check_configurations(folder: Path) -> None:
    """Whether every JSON file there is one that stock libraries read without code or files from elsewhere.

    Raises:
        ValueError: It is not JSON, or it asks for code of the repository's or for another repository.
    """
    for path in sorted(folder.rglob("*.json")):
        name = path.relative_to(folder).as_posix()
        if path.name in _NO_CONFIGURATION:
            continue
        values = parse_json(path.read_bytes(), name)
        if name.endswith(".index.json"):
            _check_index(name, values)
        for field, value in _fields(values):
            if (field in _CODE_FIELDS and value) or (field in _NAME_FIELDS and _leads_elsewhere(value)):
                raise ValueError(
                    f"{name} sets {field!r} to {json.dumps(value)[:80]}, which asks for code or for another repository."
                )


def _check_index(name: str, values: Any) -> None:
    files = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(files, dict) or not all(isinstance(file, str) and "/" not in file for file in files.values()):
        raise ValueError(f"{name} must map each weight to a file beside it.")


def _fields(values: Any) -> Iterator[tuple[str, Any]]:
    """Every field at any depth; without recursion, since a stranger decides on the depth."""
    waiting = [values]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield from value.items()
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def _leads_elsewhere(value: Any) -> bool:
    return isinstance(value, (dict, list)) or (isinstance(value, str) and ("/" in value or ":" in value))


def _is_read(name: str) -> bool:
    hidden = any(part.startswith((".", "checkpoint-")) for part in name.split("/"))
    matches = any(fnmatch.fnmatchcase(name, pattern) for pattern in READ)
    return matches and not hidden and not any(fnmatch.fnmatchcase(name, pattern) for pattern in NOT_READ)


def _why_unsafe(name: str, size: int) -> str | None:
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\\" in name or ":" in parts[0] or not name.isprintable():
        return "its name leads out of the folder, or cannot be shown"
    if not name.endswith(".safetensors") and _is_read(name) and size > LARGEST_TEXT:
        return f"it has {size / 2**20:.0f} MiB, more than the {LARGEST_TEXT / 2**20:.0f} that a text may have"
    return None


def _in_folder(origin: Path) -> tuple[dict[str, int], dict[str, str]]:
    """Files with their sizes, and those refused: links that lead out of the folder, pipes and devices."""
    sizes, refused, inside = {}, {}, origin.resolve()
    for root, folders, names in os.walk(origin):
        for entry in [*folders, *names]:
            path = Path(root, entry)
            name = path.relative_to(origin).as_posix()
            if path.is_symlink() and not path.resolve().is_relative_to(inside):
                refused[name] = "it is a link that leads out of the folder"
            elif entry in names and not path.is_file():
                refused[name] = "it is no plain file"
            elif entry in names:
                sizes[name] = path.stat().st_size
        if len(sizes) > MOST_FILES:
            raise ValueError(f"{origin} holds more than {MOST_FILES} files: it is no published model.")
    return sizes, refused


def _on_hub(source: str, revision: str | None) -> tuple[str, dict[str, int]]:
    """The commit, and its files with their sizes."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )
    from huggingface_hub.hf_api import RepoFile

    api = HfApi()
    try:
        commit = api.model_info(source, revision=revision).sha
        entries = api.list_repo_tree(source, recursive=True, revision=commit)
        files = {entry.path: entry.size for entry in islice(entries, MOST_FILES + 1) if isinstance(entry, RepoFile)}
    except HFValidationError as error:
        raise FileNotFoundError(
            f"There is no folder {source!r}, and it is not the form of a Hub id ('user/name')."
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{source!r} is neither a folder here nor a model on the Hub that you can read. Check the spelling; for a "
            "private one run `hf auth login` first."
        ) from error
    except HfHubHTTPError as error:
        raise ConnectionError(
            f"The Hub refuses {source!r}{f' at {revision!r}' if revision else ''}: {error.response.status_code}."
        ) from error
    except (OfflineModeIsEnabled, HTTPError) as error:
        raise ConnectionError(
            f"{source!r} is no folder here, and the Hub cannot be reached to look it up there. Check the connection "
            "(and "
            "HF_HUB_OFFLINE), or download the model and pass its folder."
        ) from error
    if len(files) > MOST_FILES:
        raise ValueError(f"{source!r} holds more than {MOST_FILES} files: it is no published model.")
    return commit, files


def _download(source: str, commit: str, names: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    # No name may be read as a pattern.
    return Path(snapshot_download(source, revision=commit, allow_patterns=[glob.escape(name) for name in names]))

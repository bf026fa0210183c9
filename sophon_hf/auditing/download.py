"""A stranger's repository, fetched so that it can do no harm: safetensors, JSON and text only."""

from __future__ import annotations

import fnmatch
import glob
import json
import os
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from sophon_hf.hub.claim import parse_json
from sophon_hf.utils import unreachable

_READ = ("*.safetensors", "*.json", "*.txt", "README.md")
# An adapter's configuration makes transformers fetch another repository.
_NOT_READ = ("adapter_*", "*/adapter_*")
_MOST_FILES = 2000
_LARGEST_TEXT = 64 * 2**20
# What `sophon-hf attack` and `sophon-hf audit` leave beside a model on this machine; publishing leaves it there.
_FOUND_HERE = ("attacks", "audit")

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
    is_folder = os.path.isdir(source)
    if is_folder:
        commit = None
        sizes, refused = _in_folder(Path(source))
    else:
        commit, sizes = _on_hub(source, revision)
        refused = {}
    for name, size in sizes.items():
        parts = name.split("/")
        if any(part in ("", ".", "..") for part in parts) or "\\" in name or ":" in parts[0] or not name.isprintable():
            refused[name] = "its name leads out of the folder, or cannot be shown"
        elif not name.endswith(".safetensors") and _is_read(name) and size > _LARGEST_TEXT:
            largest = f"{_LARGEST_TEXT / 2**20:.0f} that a text may have"
            refused[name] = f"it has {size / 2**20:.0f} MiB, more than the {largest}"
    chosen = [name for name in sizes if name not in refused and _is_read(name)]
    if is_folder:
        origin = Path(source)
    else:
        # No name may be read as a pattern.
        patterns = [glob.escape(name) for name in chosen]
        origin = Path(snapshot_download(source, revision=commit, allow_patterns=patterns))
    for name in chosen:
        link = folder / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to((origin / name).resolve())
    return Download(folder, commit, refused, sorted(set(sizes) - set(chosen) - set(refused)))


def check_configurations(folder: Path) -> None:
    """Check that stock libraries read every JSON file there without code or files from elsewhere.

    Raises:
        ValueError: It is not JSON, or it asks for code of the repository's or for another repository.
    """
    for path in sorted(folder.rglob("*.json")):
        name = path.relative_to(folder).as_posix()
        if path.name in _NO_CONFIGURATION:
            continue
        values = parse_json(path.read_bytes(), name)
        if name.endswith(".index.json"):
            files = values.get("weight_map") if isinstance(values, dict) else None
            beside = isinstance(files, dict) and all(isinstance(f, str) and "/" not in f for f in files.values())
            if not beside:
                raise ValueError(f"{name} must map each weight to a file beside it.")
        # Every field at any depth; without recursion, since a stranger decides on the depth.
        waiting = [values]
        while waiting:
            value = waiting.pop()
            if isinstance(value, list):
                waiting += value
            elif isinstance(value, dict):
                waiting += value.values()
                for field, setting in value.items():
                    if (field in _CODE_FIELDS and setting) or (field in _NAME_FIELDS and _leads_elsewhere(setting)):
                        raise ValueError(
                            f"{name} sets {field!r} to {json.dumps(setting)[:80]}, which asks for code or for another "
                            "repository."
                        )


def _leads_elsewhere(value: Any) -> bool:
    return isinstance(value, (dict, list)) or (isinstance(value, str) and ("/" in value or ":" in value))


def _is_read(name: str) -> bool:
    hidden = any(part.startswith((".", "checkpoint-")) for part in name.split("/"))
    matches = any(fnmatch.fnmatchcase(name, pattern) for pattern in _READ)
    return matches and not hidden and not any(fnmatch.fnmatchcase(name, pattern) for pattern in _NOT_READ)


def _in_folder(origin: Path) -> tuple[dict[str, int], dict[str, str]]:
    """Return files with their sizes, and those refused: links that lead out of the folder, pipes and devices."""
    sizes, refused, inside = {}, {}, origin.resolve()
    for root, folders, names in os.walk(origin):
        if root == str(origin):
            folders[:] = [folder for folder in folders if folder not in _FOUND_HERE]
        for entry in [*folders, *names]:
            path = Path(root, entry)
            name = path.relative_to(origin).as_posix()
            if path.is_symlink() and not path.resolve().is_relative_to(inside):
                refused[name] = "it is a link that leads out of the folder"
            elif entry in names and not path.is_file():
                refused[name] = "it is not a plain file"
            elif entry in names:
                sizes[name] = path.stat().st_size
        if len(sizes) > _MOST_FILES:
            raise ValueError(f"{origin} holds more than {_MOST_FILES} files: a published model has fewer.")
    return sizes, refused


def _on_hub(source: str, revision: str | None) -> tuple[str | None, dict[str, int]]:
    """Return the commit, and its files with their sizes."""
    api = HfApi()
    try:
        commit = api.model_info(source, revision=revision).sha
        entries = api.list_repo_tree(source, recursive=True, revision=commit)
        files = {entry.path: entry.size for entry in islice(entries, _MOST_FILES + 1) if isinstance(entry, RepoFile)}
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
        where = f" at {revision!r}" if revision else ""
        raise ConnectionError(f"The Hub refuses {source!r}{where}: {error.response.status_code}.") from error
    except (OfflineModeIsEnabled, HTTPError) as error:
        raise ConnectionError(unreachable(source, "model")) from error
    if len(files) > _MOST_FILES:
        raise ValueError(f"{source!r} holds more than {_MOST_FILES} files: a published model has fewer.")
    return commit, files

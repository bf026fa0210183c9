"""The unmodified clients of huggingface_hub, transformers and diffusers against a Hub on this machine."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys

import pytest
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from sophon_hf.models.loading import check_readable

LARGE = bytes(range(256)) * 4096


@pytest.fixture
def folder(tmp_path):
    """What a client uploads: a card, a text file, and a large file."""
    path = tmp_path / "upload"
    path.mkdir()
    (path / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(LARGE)
    return path


# The server is strict where a real one is.


def test_a_push_is_one_commit_and_earlier_ones_stay_readable(hub, folder):
    api = HfApi()
    url = api.create_repo("alice/model")
    assert url == f"{hub.endpoint}/alice/model" and url.repo_id == "alice/model"
    first = api.upload_folder(repo_id="alice/model", folder_path=folder).oid
    (folder / "config.json").write_text('{"changed": true}')
    second = api.upload_folder(repo_id="alice/model", folder_path=folder).oid
    assert len(hub.repositories["alice/model"].commits) == 3 and first != second == api.model_info("alice/model").sha
    for revision, text in ((first, "{}"), (second, '{"changed": true}'), ("main", '{"changed": true}')):
        with open(hf_hub_download("alice/model", "config.json", revision=revision)) as file:
            assert file.read() == text
    stored = api.list_repo_tree("alice/model", recursive=True)
    large = next(file for file in stored if file.path == "model.safetensors")
    assert large.lfs.sha256 == hashlib.sha256(LARGE).hexdigest()
    with open(snapshot_download("alice/model", revision=first) + "/model.safetensors", "rb") as file:
        assert file.read() == LARGE


def test_what_is_missing_is_named(hub, folder):
    api = HfApi()
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("alice/nothing")
    api.create_repo("alice/model")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download("alice/model", "config.json", revision="0" * 40)
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download("alice/model", "config.json")


def test_rights(hub, folder):
    bob = hub.add_user("bob")
    HfApi(token=bob).create_repo("bob/model")
    HfApi(token=bob).create_repo("bob/secret", private=True)
    with pytest.raises(HfHubHTTPError, match="403"):
        HfApi().create_repo("bob/other")
    with pytest.raises(HfHubHTTPError, match="403"):
        HfApi().upload_folder(repo_id="bob/model", folder_path=folder)
    with pytest.raises(RepositoryNotFoundError):
        HfApi().model_info("bob/secret")
    with pytest.raises(HfHubHTTPError, match="401"):
        HfApi(token="hf_wrong").create_repo("alice/model")
    with pytest.raises(HfHubHTTPError, match="409"):
        HfApi(token=bob).create_repo("bob/model")
    assert set(hub.repositories) == {"bob/model", "bob/secret"}
    assert list(hub.repositories["bob/model"].files) == [".gitattributes"]


@pytest.mark.parametrize(
    "metadata, message",
    [
        ("license: all-mine", '"license" must be one of'),
        ("base_model: ./original", '"base_model" with value'),
        ("license: mit\ntags: sophon", '"tags" must be an array'),
        ("license: mit\nmodel-index: [{name: m, results: [{task: {type: t}}]}]", "dataset.name"),
        ("license: [mit", "invalid yaml"),
    ],
)
def test_a_card_with_invalid_metadata_is_refused(hub, folder, metadata, message):
    HfApi().create_repo("alice/model")
    (folder / "README.md").write_text(f"---\n{metadata}\n---\n")
    with pytest.raises(ValueError, match=message):
        HfApi().upload_folder(repo_id="alice/model", folder_path=folder)
    assert len(hub.repositories["alice/model"].commits) == 1


@pytest.mark.parametrize("where", ["upload", "commit"])
def test_a_cut_connection_publishes_nothing_and_a_second_try_completes(hub, folder, where):
    api = HfApi()
    api.create_repo("alice/model")
    hub.cut(where)
    with pytest.raises(Exception, match=r"(?i)disconnected|uploading|broken|reset|closed|write"):
        api.upload_folder(repo_id="alice/model", folder_path=folder)
    assert len(hub.repositories["alice/model"].commits) == 1
    hub.mend()
    api.upload_folder(repo_id="alice/model", folder_path=folder)
    assert hub.repositories["alice/model"].files["model.safetensors"].content == LARGE


def test_a_single_cut_is_mended_by_the_client(hub, folder):
    HfApi().create_repo("alice/model")
    hub.cut("upload", times=1)
    HfApi().upload_folder(repo_id="alice/model", folder_path=folder)
    assert hub.cuts == 0 and hub.repositories["alice/model"].files["model.safetensors"].content == LARGE


# The whole circle, in a process of its own that knows the Hub by its environment alone.


CIRCLE = """
import sys
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification
from sophon_hf.cli.main import main

folder = sys.argv[1]
main(["publish", f"{folder}/model", "alice/model", "--report", f"{folder}/attacks"])
model = AutoModelForImageClassification.from_pretrained("alice/model")
local = AutoModelForImageClassification.from_pretrained(f"{folder}/model")
assert AutoImageProcessor.from_pretrained("alice/model").size["height"] == 8
assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), local.state_dict().values(), strict=True))
main(["audit", "alice/model", "--output_dir", f"{folder}/audit"])
"""


def test_publish_load_and_audit_a_classifier(hub, protected_classifier, tmp_path):
    """What is published is what stock transformers loads; who audits it needs nothing but its name."""
    folder = shutil.copytree(protected_classifier[0], tmp_path / "home")
    process = subprocess.run([sys.executable, "-c", CIRCLE, str(folder)], capture_output=True, text=True, timeout=1200)
    assert process.returncode == 0, process.stderr
    assert hub.repositories["alice/model"].head in process.stdout
    assert_no_token(hub, tmp_path, process.stdout + process.stderr)


def assert_no_token(hub, folder, printed: str) -> None:
    """In nothing that was printed, logged, written or published, save huggingface_hub's own file."""
    token = next(iter(hub.users))
    assert token not in printed
    written = [path for path in folder.rglob("*") if path.is_file() and path != folder / "huggingface" / "token"]
    assert len(written) > 10 and all(token.encode() not in path.read_bytes() for path in written)
    for repository in hub.repositories.values():
        assert all(token.encode() not in file.content for file in repository.files.values())


def test_a_wrong_token_is_in_no_message(hub, protected_classifier, tmp_path, monkeypatch):
    """Not even with every library at its most talkative."""
    folder = shutil.copytree(protected_classifier[0] / "model", tmp_path / "out")
    (tmp_path / "huggingface" / "token").write_text("hf_wrongwrongwrong")
    for name in ("HF_HUB_VERBOSITY", "TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        monkeypatch.setenv(name, "debug")
    command = [sys.executable, "-m", "sophon_hf.cli", "publish", str(folder), "alice/model", "--traceback"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert process.returncode != 0
    assert "hf_wrong" not in process.stdout + process.stderr
    assert not hub.repositories


def test_a_model_without_weights_is_told_before_it_is_downloaded(hub):
    config = b'{"model_type": "resnet", "architectures": ["ResNetForImageClassification"]}'
    hub.add_repository("alice/old", {"config.json": config, "tf_model.h5": b"x", "unet/model.safetensors": b"x"})
    hub.add_repository("alice/new", {"config.json": config, "model.safetensors": b"not downloaded"})
    with pytest.raises(FileNotFoundError, match="'alice/old' has a configuration, but no weights"):
        check_readable("alice/old")
    check_readable("alice/new")
    with pytest.raises(OSError, match="alice/none"):
        check_readable("alice/none")

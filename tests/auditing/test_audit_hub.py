"""An audit of a repository on the Hub: pinned to a commit, and careful about what it downloads."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from audited import edit_claim, full_audit, verdict_of, why_of
from huggingface_hub import HfApi

from sophon_hf.auditing.audit import audit as audit_model
from sophon_hf.auditing.verdicts import NOT_CHECKABLE, REPRODUCED, TAMPERED
from sophon_hf.cli import main as cli


def push(hub, folder, repo_id: str = "alice/model") -> str:
    """The folder as it lies there, by the stock client; the commit."""
    HfApi().create_repo(repo_id, exist_ok=True)
    return HfApi().upload_folder(repo_id=repo_id, folder_path=folder).oid


def test_an_audit_is_pinned_to_a_commit(hub, folder, tmp_path):
    first = push(hub, folder)
    weights = hub.repositories["alice/model"].files["model.safetensors"].content
    (folder / "model.safetensors").write_bytes(weights[:-1] + b"\x00\x01"[weights[-1:] == b"\x00" :][:1])
    second = push(hub, folder)
    assert first != second
    audit = audit_model("alice/model", tmp_path / "audit", revision=first)
    assert audit.commit == first and audit.exit_code == 0
    audit = audit_model("alice/model", tmp_path / "audit")
    assert audit.commit == second and audit.exit_code == 1 and verdict_of(audit, "weights") == TAMPERED


def test_the_unprotected_model_comes_from_where_the_claim_says(hub, truth, folder, tmp_path):
    commit = push(hub, truth["root"] / "original", "alice/original")
    edit_claim(folder, base_model="alice/original", base_revision=commit)
    push(hub, folder)
    # What has become of the original since is of no concern.
    hub.repositories["alice/original"].commit({"README.md": hub.repositories["alice/model"].files["README.md"]})
    audit = full_audit(truth, "alice/model", tmp_path / "audit", unprotected=None)
    assert {v.verdict for v in audit.verdicts} == {REPRODUCED} and audit.exit_code == 0
    del hub.repositories["alice/original"]
    shutil.rmtree(tmp_path / "huggingface" / "hub" / "models--alice--original")
    audit = full_audit(truth, "alice/model", tmp_path / "audit", unprotected=None)
    assert "'alice/original', which the claim names, cannot be had" in why_of(audit, "recovered transfer")


def test_an_original_with_pickled_weights_is_not_unpickled(hub, truth, folder, tmp_path):
    class Attack:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "owned"),))

    torch.save({"x": Attack()}, tmp_path / "pytorch_model.bin")
    config = (truth["root"] / "original" / "config.json").read_bytes()
    pickled = (tmp_path / "pytorch_model.bin").read_bytes()
    hub.add_repository("mallory/original", {"config.json": config, "pytorch_model.bin": pickled})
    edit_claim(folder, base_model="mallory/original", base_revision=None)
    audit = full_audit(truth, folder, tmp_path / "audit", unprotected=None)
    assert verdict_of(audit, "recovered transfer") == NOT_CHECKABLE and not (tmp_path / "owned").exists()
    assert not any("pytorch_model.bin" in request[1] for request in hub.requests)


HOSTILE = ["../escaped.json", "/absolute.json", "a/../../escaped.json", "C:\\evil.json", "..\\escaped.json", "x\n.json"]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_names_on_the_hub_are_not_downloaded(hub, folder, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    content = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    hub.add_repository("mallory/model", {**content, name: b"{}"})
    before = {str(path) for path in tmp_path.rglob("*")}
    audit = audit_model("mallory/model", tmp_path / "audit")
    assert verdict_of(audit, "files") == TAMPERED and audit.exit_code == 1
    assert not any(
        "escaped" in request[1] or "evil" in request[1] for request in hub.requests if "resolve" in request[1]
    )
    made = {str(path) for path in tmp_path.rglob("*")} - before
    assert not any(word in path for path in made for word in ("escaped", "absolute", "evil"))


@pytest.mark.parametrize("name", ["sophon.json", "config.json"])
def test_a_huge_file_is_not_downloaded(hub, folder, tmp_path, name):
    content = {p.name: p.read_bytes() for p in folder.iterdir()}
    hub.add_repository("mallory/model", {**content, name: b" " * (2**26 + 1)})
    audit = audit_model("mallory/model", tmp_path / "audit")
    assert verdict_of(audit, "files") == TAMPERED and audit.exit_code == 1
    assert not any(request[1].endswith(f"/{name}") for request in hub.requests)


def test_a_repository_of_very_many_files_is_refused(hub, tmp_path):
    hub.add_repository("mallory/model", {f"{i}.txt": b"" for i in range(2002)})
    with pytest.raises(ValueError, match="more than 2000 files"):
        audit_model("mallory/model", tmp_path / "audit")


def test_only_safetensors_json_and_text_are_downloaded(hub, folder, tmp_path):
    content = {p.name: p.read_bytes() for p in folder.iterdir()}
    other = {"pytorch_model.bin": b"x", "evil.py": b"x", "checkpoint-1/model.safetensors": b"x", "a.pkl": b"x"}
    hub.add_repository("mallory/model", {**content, **other})
    assert audit_model("mallory/model", tmp_path / "audit").exit_code == 0
    fetched = {
        request[1].split("/resolve/")[1].split("/", 1)[1] for request in hub.requests if "/resolve/" in request[1]
    }
    assert fetched and fetched.isdisjoint(other)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"token": "hf_wrong"}, "The Hub refuses 'bob/model': 401"),
        ({"name": "bob/nothing"}, "neither a folder here nor a model on the Hub"),
        ({"name": "bob/secret"}, "neither a folder here nor a model on the Hub"),
        ({"revision": "0" * 40}, "The Hub refuses 'bob/model' at '0000"),
        ({"offline": True}, "the Hub cannot be reached"),
        ({"gone": True}, "the Hub cannot be reached"),
    ],
)
def test_what_cannot_be_fetched_exits_with_2(hub, tmp_path, monkeypatch, capsys, change, message):
    hub.add_user("bob")
    hub.add_repository("bob/model", {"config.json": b"{}"})
    hub.add_repository("bob/secret", {"config.json": b"{}"}, private=True)
    if "token" in change:
        (tmp_path / "huggingface" / "token").write_text(change["token"])
    if change.get("offline"):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if change.get("gone"):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    arguments = ["audit", change.get("name", "bob/model"), "--output_dir", str(tmp_path / "audit")]
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments, *(["--revision", change["revision"]] if "revision" in change else [])])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and message in error and "hf_wrong" not in error

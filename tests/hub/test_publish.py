"""Publishing, by the trainer and by the command, against a Hub on this machine."""

from __future__ import annotations

import json
import logging
import os
import pickletools
import resource
import shutil
from contextlib import contextmanager

import pytest
import torch
from audited import make_claim
from diffusers import DDPMPipeline
from huggingface_hub import HfApi, ModelCard, load_torch_model, snapshot_download
from points import TinyNet
from published import classifier, make_trainer, protect, save_untrained, unet
from transformers import AutoImageProcessor, AutoModelForImageClassification
from two_processes import launch

from sophon_hf import SophonConfig
from sophon_hf.cli.main import main
from sophon_hf.hub.claim import Claim, hash_weights
from sophon_hf.hub.publish import publish, with_report, write_card_and_claim
from sophon_hf.hub.saving import load_weights, replaced_together, save_protected
from sophon_hf.models.loading import load_model

CLASSIFIER = {
    ".gitattributes",
    "README.md",
    "config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "sophon.json",
}
PLOTS = {"plots/best_so_far.png", "plots/curves.png", "plots/heat_map.png"}


@pytest.fixture
def folder(protected_classifier, tmp_path):
    """A protected classifier that a test may change, beside what should never leave a machine."""
    shutil.copytree(protected_classifier[0], tmp_path / "home")
    model = tmp_path / "home" / "model"
    for name in (
        "training_args.bin",
        "optimizer.pt",
        "trainer_state.json",
        "runs/events.out",
        "secrets.json",
        "all.log",
    ):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_bytes(b"private")
    return model


def files(hub, repo_id="alice/model") -> set[str]:
    return set(hub.repositories[repo_id].files)


def assert_clean(hub, repo_id="alice/model") -> None:
    """In no commit a pickle, a state, a token, or a name of this machine."""
    for commit in hub.repositories[repo_id].commits.values():
        for name, file in commit.items():
            assert not name.endswith((".bin", ".pt", ".pth", ".pkl", ".log")) and "checkpoint" not in name, name
            assert b"private" not in file.content
            for token in hub.users:
                assert token.encode() not in file.content
            assert b"/tmp/" not in file.content and os.getcwd().encode() not in file.content, name
            with pytest.raises(ValueError):
                list(pickletools.genops(file.content))


# The command.


def test_the_command_publishes_what_is_needed_and_nothing_else(hub, folder, capsys, caplog):
    commits_before = len(hub.requests)
    with caplog.at_level(logging.DEBUG):
        main(["publish", str(folder), "alice/model", "--report", str(folder.parent / "attacks")])
    assert files(hub) == CLASSIFIER | PLOTS
    assert_clean(hub)
    assert len(hub.repositories["alice/model"].commits) == 2, "the empty repository, and one commit"
    assert len([r for r in hub.requests[commits_before:] if "/commit/" in r[1]]) == 1
    shown = capsys.readouterr()
    assert f"{hub.endpoint}/alice/model/commit/" in shown.out
    for token in hub.users:
        assert token not in caplog.text + shown.out + shown.err
    assert "Not published: all.log, checkpoint-1/" in caplog.text
    card = hub.repositories["alice/model"].files["README.md"].content.decode()
    assert "Recovered transfer" in card and 'from_pretrained("alice/model")' in card
    claim = Claim.from_json(hub.repositories["alice/model"].files["sophon.json"].content)
    assert claim.attacks is not None and claim == Claim.read(folder)


def test_stock_libraries_load_what_was_published(hub, folder):
    publish(folder, "alice/model")
    loaded = AutoModelForImageClassification.from_pretrained("alice/model")
    local = AutoModelForImageClassification.from_pretrained(folder)
    for name, tensor in local.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert AutoImageProcessor.from_pretrained("alice/model").size["height"] == 8
    downloaded = snapshot_download("alice/model")
    assert hash_weights(downloaded) == Claim.read(downloaded).weights


@pytest.mark.parametrize("private", [True, False])
def test_a_new_repository_is_private_where_asked(hub, folder, private):
    main(["publish", str(folder), "alice/model", *(["--private"] if private else [])])
    assert hub.repositories["alice/model"].private is private


def test_a_public_repository_does_not_take_what_is_to_be_private(hub, folder):
    hub.add_repository("alice/model", {"README.md": b"# x\n"})
    with pytest.raises(SystemExit, match="exists and is public"):
        main(["publish", str(folder), "alice/model", "--private"])
    assert files(hub) == {"README.md"}


def test_publishing_again_replaces_the_weights_and_keeps_other_files(hub, folder):
    old = {"model-00001-of-00002.safetensors": b"old", "model.safetensors.index.json": b"{}", "notes.txt": b"mine"}
    # Left there, they are the model before protection.
    formats = ("pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "onnx/model.onnx", "unet/model.ckpt")
    hub.add_repository("alice/model", {**old, **dict.fromkeys(formats, b"unprotected")})
    publish(folder, "alice/model")
    assert files(hub) == CLASSIFIER - {".gitattributes"} | {"notes.txt"}


def test_an_edited_card_is_published_as_it_is(hub, folder, caplog):
    card = (folder / "README.md").read_text() + "\nMy own words.\n"
    (folder / "README.md").write_text(card)
    with caplog.at_level(logging.WARNING):
        publish(folder, "alice/model")
    assert hub.repositories["alice/model"].files["README.md"].content.decode() == card
    assert "was edited" in caplog.text


def test_license_and_base_model_come_from_the_original_on_the_hub(hub, tmp_path):
    classifier().save_pretrained(tmp_path / "base")
    card = b"---\nlicense: mit\nlanguage: en\ntags: [trusted]\n---\n# The original\n"
    content = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()} | {"README.md": card}
    commit = hub.add_repository("owner/base", content).head
    save_untrained("classifier", tmp_path / "out", load_model("owner/base")).push_to_hub("alice/model")
    data = ModelCard.load("alice/model").data
    assert (data.license, data.language, data.base_model, data.tags) == ("mit", "en", "owner/base", ["sophon"])
    claim = Claim.read(tmp_path / "out")
    assert (claim.base_model, claim.base_revision, claim.remote_code) == ("owner/base", commit, False)


# What is refused.


def test_without_a_token_it_says_how_to_log_in(hub, folder, tmp_path):
    (tmp_path / "huggingface" / "token").unlink()
    with pytest.raises(SystemExit, match="hf auth login"):
        main(["publish", str(folder), "alice/model"])
    assert "alice/model" not in hub.repositories


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_without_a_token_a_report_leaves_the_folder_as_it_was(hub, folder, tmp_path):
    """Card and claim disagreed: the claim held the attacks already, the card said that there were none."""
    (tmp_path / "huggingface" / "token").unlink()
    before = contents(folder)
    with pytest.raises(SystemExit, match="hf auth login"):
        main(["publish", str(folder), "alice/model", "--report", str(folder.parent / "attacks")])
    assert contents(folder) == before and not (folder / "plots").exists()


@contextmanager
def full_disk(size: int):
    """No file gets larger than `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_claim_that_cannot_be_written_leaves_the_card_as_it_was(folder):
    claim, _ = with_report(folder, Claim.read(folder), folder.parent / "attacks")
    before = contents(folder)
    with full_disk(len(claim.to_json()) - 1), pytest.raises(OSError, match="too large"):
        write_card_and_claim(folder, claim, "alice/model")
    assert contents(folder).items() >= before.items()


def test_a_card_that_cannot_be_written_leaves_the_claim_as_it_was(hub, folder):
    (folder / "README.md").unlink()
    (folder / "README.md").mkdir()
    before = (folder / "sophon.json").read_bytes()
    with pytest.raises(OSError, match="directory"):
        publish(folder, "alice/model", report=folder.parent / "attacks")
    assert (folder / "sophon.json").read_bytes() == before and files(hub) == {".gitattributes"}


def test_a_wrong_token_says_how_to_log_in_and_does_not_show_it(hub, folder, tmp_path, caplog, capsys):
    wrong = "hf_" + "w" * 34
    (tmp_path / "huggingface" / "token").write_text(wrong)
    with (
        caplog.at_level(logging.DEBUG),
        pytest.raises(SystemExit, match="does not accept the token.*hf auth login") as error,
    ):
        main(["publish", str(folder), "alice/model"])
    out = capsys.readouterr()
    assert wrong not in str(error.value) + caplog.text + out.out + out.err


@pytest.mark.parametrize("exists", [True, False])
def test_the_repository_of_another_owner_is_refused(hub, folder, exists):
    hub.add_user("bob")
    if exists:
        hub.add_repository("bob/model", {"README.md": b"# bob's\n"})
    with pytest.raises(SystemExit, match="may not write to bob/model"):
        main(["publish", str(folder), "bob/model"])
    assert not exists or files(hub, "bob/model") == {"README.md"}


def test_a_folder_without_a_claim_is_refused(hub, tmp_path):
    classifier().save_pretrained(tmp_path / "plain")
    with pytest.raises(SystemExit, match=r"has no sophon\.json"):
        main(["publish", str(tmp_path / "plain"), "alice/model"])
    assert "alice/model" not in hub.repositories


@pytest.mark.parametrize("change", ["has changed", "is missing", "is new"])
def test_weights_that_are_not_the_claims_are_refused(hub, folder, change):
    weights = folder / "model.safetensors"
    if change == "has changed":
        weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    elif change == "is missing":
        weights.unlink()
    else:
        shutil.copy(weights, folder / "adapter_model.safetensors")
    with pytest.raises(SystemExit, match=f"safetensors {change} since"):
        main(["publish", str(folder), "alice/model"])
    assert "alice/model" not in hub.repositories


def test_a_report_about_another_model_is_refused(hub, folder, tmp_path):
    make_trainer("classifier", folder.parent / "unused").save_model(str(folder))
    with pytest.raises(SystemExit, match="about other weights"):
        main(["publish", str(folder), "alice/model", "--report", str(folder.parent / "attacks")])
    with pytest.raises(SystemExit, match=r"no results\.json"):
        main(["publish", str(folder), "alice/model", "--report", str(tmp_path / "nothing")])
    assert Claim.read(folder).attacks is None
    assert "alice/model" not in hub.repositories


@pytest.mark.parametrize("repo_id", ["a/b/c", "alice/", "../x", "alice/mo del"])
def test_an_invalid_id_is_refused(hub, folder, repo_id):
    with pytest.raises(SystemExit, match="publish"):
        main(["publish", str(folder), repo_id])
    assert not hub.repositories


# A connection that is cut.


@pytest.mark.parametrize("where", ["upload", "commit"])
def test_a_cut_leaves_nothing_half_published_and_a_second_try_completes(hub, folder, where):
    publish(folder, "alice/model", commit_message="first")
    before = dict(hub.repositories["alice/model"].files)
    # Other weights, so that there is something to upload.
    save_untrained("classifier", folder.parent / "other")
    hub.cut(where)
    with pytest.raises(ConnectionError, match="nothing is published"):
        publish(folder.parent / "other", "alice/model")
    assert hub.repositories["alice/model"].files == before
    hub.mend()
    publish(folder.parent / "other", "alice/model")
    claim = Claim.from_json(hub.repositories["alice/model"].files["sophon.json"].content)
    assert claim.weights["model.safetensors"] == hub.repositories["alice/model"].files["model.safetensors"].sha256


# The trainer.


def test_the_trainer_pushes_the_same(hub, tmp_path):
    trainer = protect("classifier", tmp_path / "out")
    assert not any(name.endswith((".bin", ".pkl")) for name in os.listdir(tmp_path / "out"))
    commit = trainer.push_to_hub("alice/model", private=True)
    assert commit.commit_url.startswith(f"{hub.endpoint}/alice/model/commit/")
    assert files(hub) == CLASSIFIER and hub.repositories["alice/model"].private
    assert_clean(hub)


def test_a_trainer_made_anew_pushes_the_protected_model_and_not_its_own(hub, folder):
    """In a session of its own, after the attacks, which the model's next push tells too."""
    saved, trainer = Claim.read(folder), make_trainer("classifier", folder)
    trainer.push_to_hub("alice/model", report=folder.parent / "attacks")
    assert files(hub) == CLASSIFIER | PLOTS
    trainer.push_to_hub("alice/model")
    claim = Claim.from_json(hub.repositories["alice/model"].files["sophon.json"].content)
    assert claim == Claim.read(folder) and claim.attacks is not None
    assert (claim.protection, claim.weights) == (saved.protection, saved.weights)
    assert claim.protection.status == "protected"
    assert claim.weights["model.safetensors"] == hub.repositories["alice/model"].files["model.safetensors"].sha256


@pytest.mark.parametrize("strategy", ["every_save", "end"])
def test_pushing_while_training(hub, tmp_path, strategy):
    protect("classifier", tmp_path / "out", push_to_hub=True, hub_model_id="alice/model", hub_strategy=strategy)
    assert files(hub) == CLASSIFIER
    assert_clean(hub)
    claims = [
        Claim.from_json(commit["sophon.json"].content)
        for commit in hub.repositories["alice/model"].commits.values()
        if "sophon.json" in commit
    ]
    statuses = [claim.protection.status for claim in claims]
    assert statuses == ["in progress"] * (2 if strategy == "every_save" else 0) + ["protected"]
    for commit in hub.repositories["alice/model"].commits.values():
        if "sophon.json" in commit:
            claim = Claim.from_json(commit["sophon.json"].content)
            assert claim.weights == {"model.safetensors": commit["model.safetensors"].sha256}


# What is read of the environment is read before a test file's own setting of it.
TWO_PROCESSES = """
import sys

import huggingface_hub.constants
from published import protect

hub = {"push_to_hub": True, "hub_model_id": "alice/model", "hub_strategy": "every_save"}
trainer = protect("classifier", sys.argv[1] + "/out", **hub)
assert trainer.args.world_size == 2
commit = trainer.push_to_hub("alice/again")
assert (commit is not None) == trainer.is_world_process_zero()
"""


def test_one_of_two_processes_pushes(hub, tmp_path):
    launch(tmp_path, TWO_PROCESSES, timeout=300)
    for repo_id, pushes in (("alice/model", 3), ("alice/again", 1)):
        published = [commit for commit in hub.repositories[repo_id].commits.values() if "sophon.json" in commit]
        assert files(hub, repo_id) == CLASSIFIER and len(published) == pushes
        assert_clean(hub, repo_id)
        claim = Claim.from_json(published[-1]["sophon.json"].content)
        assert claim.protection.status == "protected"
        assert claim.weights == {"model.safetensors": published[-1]["model.safetensors"].sha256}


def test_a_push_that_fails_does_not_end_the_training(hub, tmp_path, caplog):
    trainer = make_trainer("classifier", tmp_path / "out", push_to_hub=True, hub_model_id="alice/model")
    hub.cut("upload")
    with caplog.at_level(logging.WARNING), pytest.raises(ConnectionError):
        trainer.train()
    assert "it was not pushed, training goes on" in caplog.text
    assert Claim.read(tmp_path / "out").protection.status == "protected", "it was saved here all the same"
    hub.mend()
    publish(tmp_path / "out", "alice/model")
    assert files(hub) == CLASSIFIER


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"hub_strategy": "checkpoint"}, "optimizer states"),
        ({"hub_strategy": "all_checkpoints"}, "optimizer states"),
        ({"hub_token": "hf_secret"}, "hf auth login"),
    ],
)
def test_settings_that_would_publish_states_or_keep_tokens_are_refused(tmp_path, setting, message):
    with pytest.raises(ValueError, match=message) as error:
        SophonConfig(str(tmp_path), **setting)
    assert "hf_secret" not in str(error.value)


def test_pushing_without_a_login_is_refused_before_any_work(hub, tmp_path):
    (tmp_path / "huggingface" / "token").unlink()
    with pytest.raises(PermissionError, match="hf auth login"):
        make_trainer("classifier", tmp_path / "out", push_to_hub=True, hub_model_id="alice/model")


def test_a_unet_is_published_as_a_pipeline_that_generates(hub, tmp_path):
    trainer = save_untrained("unet", tmp_path / "out")
    trainer.push_to_hub("alice/model")
    assert files(hub) == {
        ".gitattributes",
        "README.md",
        "sophon.json",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    }
    assert_clean(hub)
    pipeline = DDPMPipeline.from_pretrained("alice/model")
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(pipeline.unet.state_dict()[name], tensor)
    assert pipeline.scheduler.config.num_train_timesteps == 20
    assert pipeline(num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 3)


def test_a_unet_that_came_from_a_folder_does_not_name_it(hub, tmp_path):
    (tmp_path / "secret-user").mkdir()
    unet().save_pretrained(tmp_path / "secret-user" / "base")
    base = load_model(tmp_path / "secret-user" / "base")
    save_untrained("unet", tmp_path / "out", base).push_to_hub("alice/model")
    assert not any(b"secret-user" in file.content for file in hub.repositories["alice/model"].files.values())
    assert Claim.read(tmp_path / "out").base_model == "base"


def test_a_plain_module_is_loaded_through_its_class(hub, tmp_path):
    trainer = save_untrained("module", tmp_path / "out")
    trainer.push_to_hub("alice/model")
    assert files(hub) == {".gitattributes", "README.md", "sophon.json", "model.safetensors"}
    loaded = TinyNet()
    load_torch_model(loaded, snapshot_download("alice/model"), strict=True)
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


@pytest.mark.parametrize("kind", ["classifier", "unet", "module"])
def test_large_models_are_sharded_and_load(hub, tmp_path, kind):
    trainer, folder = make_trainer(kind, tmp_path / "unused"), tmp_path / "out"
    model, task = trainer.model.cpu(), trainer.task

    def claim_for(staged):
        return make_claim(staged, model, None, metric=task.metric, greater_is_better=task.greater_is_better)

    def save(**settings):
        save_protected(folder, model, task, None, claim_for, "alice/model", **settings)

    save(max_shard_size=600 if kind == "module" else "2KB")
    shards = hash_weights(folder)
    assert len(shards) > 1 and Claim.read(folder).weights == shards
    publish(folder, "alice/model")
    assert set(shards) < files(hub) and any(name.endswith(".index.json") for name in files(hub))
    if kind == "module":
        loaded = TinyNet()
        load_torch_model(loaded, snapshot_download("alice/model"), strict=True)
    else:
        # As a stranger loads it, and as a trainer that goes on from a checkpoint.
        library = AutoModelForImageClassification if kind == "classifier" else DDPMPipeline
        published = library.from_pretrained("alice/model")
        loaded = {"classifier": classifier, "unet": unet}[kind]()
        torch.nn.init.zeros_(next(loaded.parameters()))
        load_weights(loaded, folder)
        assert_same_state(published if kind == "classifier" else published.unet, model)
    assert_same_state(loaded, model)
    save()
    assert len(hash_weights(folder)) == 1 and not list(folder.rglob("*.index.json"))
    publish(folder, "alice/model")
    assert not set(shards) & files(hub)


def assert_same_state(loaded, expected) -> None:
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in expected.state_dict().items())


def test_a_full_disk_leaves_the_earlier_save_whole(folder):
    trainer = make_trainer("classifier", folder.parent / "unused")
    before = contents(folder)
    weights = (folder / "model.safetensors").stat().st_size
    with full_disk(weights - 1), pytest.raises(OSError, match="(?i)too large"):
        trainer.save_model(str(folder))
    assert contents(folder) == before
    trainer.save_model(str(folder))
    assert Claim.read(folder).weights == hash_weights(folder) != json.loads(before["sophon.json"])["weights"]


def test_a_folder_is_replaced_together_or_not_at_all(tmp_path):
    folder = tmp_path / "folder"
    with replaced_together(folder) as beside:
        (beside / "unet").mkdir()
        (beside / "unet" / "a").write_text("1")
        assert os.listdir(folder) == [beside.name]
    with pytest.raises(KeyError), replaced_together(folder) as beside:
        (beside / "b").write_text("2")
        raise KeyError
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*")) == ["unet", "unet/a"]


def test_saving_removes_no_other_model_in_the_folder(folder):
    other = folder / "another" / "model.safetensors"
    other.parent.mkdir()
    other.write_bytes(b"weights")
    (folder / "mine.safetensors").write_bytes(b"weights")
    make_trainer("classifier", folder.parent / "unused").save_model(str(folder))
    assert other.exists() and (folder / "mine.safetensors").exists()
    assert set(Claim.read(folder).weights) == {"model.safetensors"}


def test_a_saved_model_takes_no_token_along(hub, folder, tmp_path):
    publish(folder, "alice/model")
    token = HfApi().token or (tmp_path / "huggingface" / "token").read_text()
    for path in folder.rglob("*"):
        assert not path.is_file() or token.encode() not in path.read_bytes()

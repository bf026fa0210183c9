"""An audit finds what was changed, and takes no harm from a stranger's files."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace

import pytest
import torch
from audited import edit_claim, full_audit, perturbed, publish_folder, verdict_of, why_of
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from sophon_hf import FineTuningStrategy
from sophon_hf.auditing.audit import audit as audit_model
from sophon_hf.auditing.card_check import read_metadata
from sophon_hf.auditing.verdicts import NOT_CHECKABLE, REPRODUCED, TAMPERED
from sophon_hf.hub.card import make_card
from sophon_hf.hub.claim import Claim

# Tampering.


def test_weights_that_were_changed_are_found(folder, tmp_path):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = next(n for n, t in tensors.items() if t.is_floating_point())
    tensors[name].view(-1)[0] += 1e-6
    save_file(tensors, path, {"format": "pt"})
    audit = audit_model(folder, tmp_path / "audit")
    assert verdict_of(audit, "weights") == TAMPERED and "'model.safetensors' differs" in why_of(audit, "weights")
    assert audit.exit_code == 1 and "state" not in {v.claim for v in audit.verdicts}


def test_weights_that_were_added_or_removed_are_found(folder, tmp_path):
    shutil.copy(folder / "model.safetensors", folder / "other.safetensors")
    audit = audit_model(folder, tmp_path / "audit")
    assert "'other.safetensors' is not claimed" in why_of(audit, "weights") and audit.exit_code == 1
    (folder / "other.safetensors").unlink()
    (folder / "model.safetensors").unlink()
    audit = audit_model(folder, tmp_path / "audit")
    assert "'model.safetensors' is missing" in why_of(audit, "weights") and audit.exit_code == 1


def test_another_state_under_right_hashes_is_found(folder, tmp_path):
    edit_claim(folder, state_hash="0" * 32)
    audit = audit_model(folder, tmp_path / "audit")
    assert verdict_of(audit, "state") == TAMPERED and audit.exit_code == 1


def test_a_configuration_that_does_not_fit_the_weights_is_found(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_sizes": [8, 32]}))
    audit = audit_model(folder, tmp_path / "audit")
    assert verdict_of(audit, "state") == TAMPERED and audit.exit_code == 1
    (folder / "config.json").unlink()
    audit = audit_model(folder, tmp_path / "audit")
    assert "config.json is missing" in why_of(audit, "state") and audit.exit_code == 1


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"attacks__recovered_transfer__value": 0.05}, "its own attacks give"),
        ({"attacks__recovered_transfer__interval": [-1.0, 3.0]}, "its own attacks give"),
        ({"attacks__recovered_transfer__interval": None}, "its own attacks give"),
        ({"attacks__original_metric": {"original": 0.9, "protected": 0.5}}, "its own figures void"),
        ({"attacks__chance__restricted": 0.99}, "its own figures void"),
        ({"metric": "mse"}, "greater_is_better is True, which does not go with mse"),
        ({"schema": 99}, "update sophon_hf"),
        ({"extra": 1}, "extra: Unexpected keyword argument"),
        ({"weights": {"../../model.safetensors": "0" * 64}}, "not a safetensors file inside"),
        ({"attacks__seeds": "all"}, "attacks.seeds: Input should be a valid (list|array)"),
    ],
)
def test_a_claim_that_was_changed_is_found(folder, tmp_path, changes, reason):
    edit_claim(folder, **changes)
    audit = audit_model(folder, tmp_path / "audit")
    assert verdict_of(audit, "sophon.json") == TAMPERED and re.search(reason, why_of(audit, "sophon.json"))
    assert audit.exit_code == 1


@pytest.mark.parametrize(
    "change", [("value: 1.", "value: 0."), ("- sophon", "- sophon\n- x"), ("Recovered transfer", "Protection")]
)
def test_a_card_that_says_something_else_is_found(folder, tmp_path, change):
    text = (folder / "README.md").read_text()
    head, body = text.split("\n---\n", 1)
    (folder / "README.md").write_text(head.replace(*change) + "\n---\n" + body)
    audit = audit_model(folder, tmp_path / "audit")
    harmless = change[0] == "- sophon"
    assert verdict_of(audit, "card") == (REPRODUCED if harmless else TAMPERED)
    assert audit.exit_code == (0 if harmless else 1)


def test_a_forged_figure_before_the_true_one_is_found(folder, tmp_path):
    card = ModelCard.load(folder / "README.md")
    forged = replace(card.data.eval_results[-1], metric_value=0.05)
    card.data.eval_results.insert(0, forged)
    card.save(folder / "README.md")
    audit = audit_model(folder, tmp_path / "audit")
    assert verdict_of(audit, "card") == TAMPERED and "it states 0.05 for 'Recovered transfer" in why_of(audit, "card")
    assert audit.exit_code == 1


@pytest.mark.parametrize("edit", ["", "\nMy own words.\n"])
def test_a_card_that_says_not_evaluated_of_a_claim_with_attacks_is_found(folder, tmp_path, edit):
    claim = replace(Claim.read(folder), attacks=None)
    (folder / "README.md").write_text(str(make_card(folder, claim, "alice/model")) + edit)
    audit = audit_model(folder, tmp_path / "audit")
    assert verdict_of(audit, "card") == TAMPERED and "not evaluated" in why_of(audit, "card")
    assert audit.exit_code == 1


def test_an_edited_text_is_told(folder, tmp_path):
    assert not any("text was edited" in note for note in audit_model(folder, tmp_path / "audit").notes)
    path = folder / "README.md"
    path.write_text(path.read_text().replace("Recovered transfer", "Full protection"))
    audit = audit_model(folder, tmp_path / "audit")
    assert any("text was edited" in note for note in audit.notes) or verdict_of(audit, "card") == TAMPERED


# A hostile repository is harmless.


def test_links_that_lead_out_of_a_folder_are_not_followed(folder, tmp_path):
    secret = tmp_path / "secret.json"
    secret.write_text('{"auto_map": 1}')
    (folder / "preprocessor_config.json").symlink_to(secret)
    (folder / "outside").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe.json")
    audit = audit_model(folder, tmp_path / "audit")
    assert verdict_of(audit, "files") == TAMPERED and "3 not touched" in why_of(audit, "files")
    assert audit.exit_code == 1


def test_code_and_pickles_are_not_read(folder, tmp_path):
    class Attack:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "owned"),))

    torch.save({"x": Attack()}, folder / "pytorch_model.bin")
    (folder / "modeling_evil.py").write_text(f"import os; os.mkdir({str(tmp_path / 'owned')!r})")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "mallory/evil", "peft_type": "LORA"}')
    audit = audit_model(folder, tmp_path / "audit")
    assert audit.exit_code == 0 and not (tmp_path / "owned").exists()
    note = next(note for note in audit.notes if note.startswith("An audit does not read"))
    assert all(name in note for name in ("pytorch_model.bin", "modeling_evil.py", "adapter_config.json"))


@pytest.mark.parametrize(
    "fields",
    [
        {"auto_map": {"AutoModelForImageClassification": "modeling_evil.Evil"}},
        {"attn_implementation": "mallory/kernel"},
        {"nested": [{"deep": {"auto_map": {"AutoModel": "x.Y"}}}]},
        {"quantization_config": {"quant_method": "x"}},
        {"architecture": "hf-hub:mallory/evil"},
    ],
)
def test_a_configuration_that_asks_for_code_is_refused(folder, tmp_path, fields):
    (folder / "modeling_evil.py").write_text(f"import os; os.mkdir({str(tmp_path / 'owned')!r})")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    audit = audit_model(folder, tmp_path / "audit")
    assert verdict_of(audit, "configuration") == TAMPERED and "asks for code" in why_of(audit, "configuration")
    assert audit.exit_code == 1 and not (tmp_path / "owned").exists()
    # Said openly, it is no forgery, but still not loaded.
    edit_claim(folder, remote_code=True)
    audit = audit_model(folder, tmp_path / "audit")
    assert verdict_of(audit, "configuration") == NOT_CHECKABLE and audit.exit_code == 0
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "name, content",
    [
        ("model.safetensors.index.json", '{"weight_map": {"a": "../../other.safetensors"}}'),
        ("config.json", "[" * 100_000),
        ("config.json", '{"a": NaN}'),
    ],
)
def test_malformed_files_are_found(folder, tmp_path, name, content):
    (folder / name).write_text(content)
    audit = audit_model(folder, tmp_path / "audit")
    assert verdict_of(audit, "configuration") == TAMPERED and audit.exit_code == 1


@pytest.mark.parametrize(
    "content", ["{" * 100_000, "[]", "null", '{"schema": 1', '{"schema": 1e999}', " " * (17 * 2**20)]
)
def test_a_malformed_claim_is_found(folder, tmp_path, content):
    (folder / "sophon.json").write_text(content)
    audit = audit_model(folder, tmp_path / "audit")
    assert verdict_of(audit, "sophon.json") == TAMPERED and audit.exit_code == 1


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "\n".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [" + ",".join([f"*{chr(97 + i)}"] * 9) + "]" for i in range(9)
)


@pytest.mark.parametrize(
    "metadata",
    [
        BOMB,
        "x: !!python/object/apply:os.mkdir ['owned']",
        "[" * 3000,
        "model-index: 3",
        "model-index: [{results: [{metrics: [{type: a, value: [1]}]}]}]",
        "- a list",
        "x: " + "y" * 200_000,
    ],
)
def test_hostile_yaml_in_the_card_is_harmless(folder, tmp_path, monkeypatch, metadata):
    monkeypatch.chdir(tmp_path)
    (folder / "README.md").write_text(f"---\n{metadata}\n---\ntext\n")
    audit = audit_model(folder, tmp_path / "audit")
    assert verdict_of(audit, "card") == NOT_CHECKABLE and "cannot be read" in why_of(audit, "card")
    assert not (tmp_path / "owned").exists()


def test_tags_of_another_kind_are_harmless(folder, tmp_path):
    (folder / "README.md").write_text("---\ntags: 3\n---\ntext\n")
    assert verdict_of(audit_model(folder, tmp_path / "audit"), "card") == REPRODUCED


@pytest.mark.parametrize("yaml, message", [(BOMB, "references"), ("[" * 30_000, "nested"), ("- " * 10_000, "nested")])
def test_yaml_that_would_take_for_ever_is_refused_at_its_start(yaml, message):
    with pytest.raises(ValueError, match=message):
        read_metadata(yaml)


def test_a_strangers_words_cannot_draw_in_the_report(folder, tmp_path):
    edit_claim(folder, base_model="<b>|x|](http:evil)")
    (folder / "\x1b[31mred.txt").write_text("x")
    audit = audit_model(folder, tmp_path / "audit", restricted_dataset=None)
    for text in (audit.to_text(), audit.to_markdown()):
        assert "\x1b" not in text
    assert "<b>" not in audit.to_markdown()


def test_strategies_that_would_take_for_ever_are_not_repeated(truth, tmp_path):
    claim = truth["claim"]
    endless = FineTuningStrategy("new_head", learning_rate=1e-2, batch_size=12, epochs=1e7)
    attacks = [
        replace(a, strategy=endless) if a.model == "protected" and a is best(claim) else a
        for a in claim.attacks.attacks
    ]
    publish_folder(
        tmp_path / "model", perturbed(truth["original"]), None, attacks=replace(claim.attacks, attacks=attacks)
    )
    audit = full_audit(truth, tmp_path / "model", tmp_path / "audit")
    assert verdict_of(audit, "recovered transfer") == NOT_CHECKABLE
    assert "not repeated" in why_of(audit, "recovered transfer")


def best(claim: Claim):
    return claim.scores.best("protected")

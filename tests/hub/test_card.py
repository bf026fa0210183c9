"""The model card: filled from the claim alone, valid for the Hub, and left alone where its author edited it."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace

import pytest
import yaml
from card_rules import metadata_errors
from huggingface_hub import ModelCard
from published import make_trainer, pixels, save_untrained, unet

from sophon_hf import AttackSuite, FineTuningStrategy, StrategySpace
from sophon_hf.attacks.checks import FailedCheck
from sophon_hf.attacks.score import RecoveredTransfer
from sophon_hf.hub.card import inherited_metadata, make_card, update_card
from sophon_hf.hub.claim import AttackReport, Claim
from sophon_hf.hub.publish import with_report, write_card_and_claim


@pytest.fixture(scope="module")
def saved(protected_classifier):
    """A protected classifier and what attacks found on it."""
    home, _, results = protected_classifier
    return home / "model", Claim.read(home / "model"), results


def with_attacks(claim: Claim, results, **changes) -> Claim:
    report = AttackReport.from_results(results)
    return Claim(**{**vars(claim), "attacks": AttackReport(**{**vars(report), **changes})})


def scored(claim, results, value=0.83, interval=(0.7, 0.95)) -> Claim:
    """As if the sweep had a score, which one this small need not have."""
    checks = [FailedCheck("few seeds", "only 3", False)]
    transfer = RecoveredTransfer(value, interval)
    return with_attacks(claim, results, recovered_transfer=transfer, failed_checks=checks)


def body(card: ModelCard) -> str:
    return " ".join(card.text.split())


def first_paragraph(card: ModelCard) -> str:
    return next(p for p in card.text.split("\n\n") if p.strip() and not p.strip().startswith("#"))


def test_the_trainer_fills_the_card_when_it_saves(saved):
    folder, claim, _ = saved
    card = ModelCard.load(folder / "README.md")
    assert first_paragraph(card).startswith("**Not evaluated**")
    before, after = claim.intactness
    assert f"{before:.1%} before protection, {after:.1%} after" in body(card)
    assert card.data.pipeline_tag == "image-classification" and card.data.library_name == "transformers"
    assert 'AutoModelForImageClassification.from_pretrained("model")' in card.text


def test_without_attacks_no_resistance_is_claimed(saved):
    folder, claim, _ = saved
    card = make_card(folder, claim, "alice/model")
    assert "non-fine-tunable" not in card.data.tags and "sophon" in card.data.tags
    assert "not evaluated" in card.text.lower()
    assert not re.search(r"resist(s|ant)|robust|secure|cannot be fine-tuned|prevents", card.text)
    metrics = [result.metric_name for result in card.data.eval_results]
    assert metrics == ["accuracy in the original domain, after protection"]


def test_a_score_without_an_interval_says_so(saved):
    folder, claim, results = saved
    first = " ".join(first_paragraph(make_card(folder, scored(claim, results, interval=None), "alice/model")).split())
    assert first.startswith("**Recovered transfer: 83%** (no interval: one seed does not tell the error of an MSE).")


def test_the_first_paragraph_has_the_strongest_attack_and_its_figure(saved):
    folder, claim, results = saved
    card = make_card(folder, scored(claim, results), "alice/model")
    first = " ".join(first_paragraph(card).split())
    assert first.startswith("**Recovered transfer: 83%** (95 % interval 70% to 95%).")
    best = results.best("protected")
    assert best.strategy.name.replace("_", r"\_") in first and f"accuracy {best.mean:.1%}" in first
    assert f"{results.best('original').mean:.1%} from the original model" in first
    assert f"{results.best('scratch').mean:.1%} from scratch" in first
    assert "few seeds: only 3" in body(card)
    assert card.data.tags == ["sophon", "non-fine-tunable"]
    values = {r.metric_name: r.metric_value for r in card.data.eval_results}
    assert list(values.values()) == pytest.approx([results.original_metric["protected"], best.mean, 0.83])


def test_an_untrained_model_is_explained_where_one_was_attacked(tmp_path, saved):
    folder, claim, results = saved
    assert "newly initialised model" not in body(make_card(folder, with_attacks(claim, results), "alice/model"))
    attacks = AttackReport.from_results(results).attacks
    control = replace(attacks[0], model="untrained")
    controlled = with_attacks(claim, results, attacks=[*attacks, control])
    controlled.write(tmp_path)
    card = make_card(folder, Claim.read(tmp_path), "alice/model")
    assert "*untrained*: a newly initialised model that warms up" in body(card)


def test_chance_level_and_precision_stand_beside_the_figures(saved):
    folder, claim, results = saved
    text = body(make_card(folder, with_attacks(claim, results), "alice/model"))
    assert "accuracy 35.0% on the restricted test split and 35.0% on the original test split." in text
    assert "The attacks ran in float32." in text
    mixed = body(make_card(folder, with_attacks(claim, results, precision="bf16", chance={}), "alice/model"))
    assert "The attacks ran in bf16, with weights in float32." in mixed and "Chance level" not in mixed


def test_a_strategy_space_is_told_in_words(saved):
    folder, claim, _ = saved
    method = replace(claim.method, strategy_space=StrategySpace(preparations=(None, "warm_up")))
    text = body(make_card(folder, replace(claim, method=method), "alice/model"))
    assert "initializations direct, new head;" in text and "preparations none, warm up; examples all." in text


def test_an_attack_of_which_no_seed_ended_is_not_counted(saved):
    folder, claim, results = saved
    report = AttackReport.from_results(results)
    first, *others = [a for a in report.attacks if a.model == "protected"]
    failed = replace(first, seeds=(), epoch=None, validation=None, test=(), final=(), failed=3)
    card = make_card(folder, with_attacks(claim, results, attacks=[failed, *others]), "alice/model")
    assert f"The strongest of {len(others)} attack" in first_paragraph(card)
    assert "3 failed" in card.text


def test_a_card_speaks_of_the_claims_metric(saved):
    folder, claim, results = saved
    # A check that failed on an accuracy would name it.
    told = with_attacks(claim, results, recovered_transfer=RecoveredTransfer(0.5, (0.4, 0.6)), failed_checks=[])
    card = make_card(folder, replace(told, metric="f1_macro"), "alice/model")
    assert rf"f1\_macro {results.best('protected').mean:.1%} in the restricted domain" in body(card)
    assert "accuracy" not in card.text and card.data.metrics == ["f1_macro"]


def test_a_void_score_is_no_score(saved):
    folder, claim, results = saved
    void = with_attacks(claim, results, recovered_transfer=RecoveredTransfer(None, None, "original collapsed"))
    card = make_card(folder, void, "alice/model")
    assert first_paragraph(card).startswith("**Recovered transfer: void** (original collapsed).")
    assert card.data.tags == ["sophon"]
    assert "recovered_transfer" not in [r.metric_type for r in card.data.eval_results]


@pytest.mark.parametrize(
    ("name", "type_", "listed"),
    [("owner/data:small", "owner/data", ["owner/data"]), ("imdb", "unknown", None), (None, "unknown", None)],
)
def test_only_a_hub_id_is_told_as_a_data_set_of_the_hub(saved, name, type_, listed):
    folder, claim, _ = saved
    data = {part: type(known)(**{**vars(known), "name": name}) for part, known in claim.data.items()}
    card = make_card(folder, Claim(**{**vars(claim), "data": data}), "alice/model")
    assert card.data.datasets == listed
    assert [result.dataset_type for result in card.data.eval_results] == [type_]
    assert [result.dataset_config for result in card.data.eval_results] == [name and (name.split(":")[1:] or [None])[0]]
    assert metadata_errors(str(card))[0] == []


@pytest.mark.parametrize("evaluated", [False, True])
def test_metadata_pass_the_validator(saved, evaluated):
    folder, claim, results = saved
    claim = scored(claim, results) if evaluated else claim
    card = make_card(folder, claim, "alice/model", {"license": "mit", "base_model": "owner/base"})
    assert metadata_errors(str(card)) == ([], [])
    again = ModelCard(str(card))
    assert again.data.license == "mit" and again.data.base_model == "owner/base"
    assert str(again) == str(card)


def test_every_section_is_there(saved):
    folder, claim, results = saved
    card = make_card(folder, scored(claim, results), "alice/model")
    headings = re.findall(r"^## (.+)$", card.text, re.MULTILINE)
    assert headings == [
        "Threat model",
        "What was measured",
        "How to load it",
        "How to audit it",
        "Limits",
        "Data and cost",
    ]
    assert "raises the cost of misuse" in card.text and "does not prevent" in card.text
    assert "sophon-hf audit alice/model --restricted DATA --original DATA" in card.text
    rows = [line for line in card.text.splitlines() if re.match(r"\| (protected|original|scratch) \| \w+.*\|$", line)]
    attacks = AttackReport.from_results(results).attacks
    assert len(rows) == len(attacks) + 3
    for line in rows:
        assert len(re.findall(r"(?<!\\)\|", line)) in (6, 7)


def test_a_model_that_is_not_protected_says_so(tmp_path, saved):
    folder, claim, _ = saved
    for status, words in (
        ("not protected", "NOT protected"),
        ("in progress", "has not ended"),
        ("not measured", "was not measured"),
    ):
        protection = type(claim.protection)(**{**vars(claim.protection), "status": status})
        card = make_card(folder, Claim(**{**vars(claim), "protection": protection}), "alice/model")
        assert words in card.text


def test_remote_code_is_said(saved):
    folder, claim, _ = saved
    assert "trust_remote_code" not in make_card(folder, claim, "alice/model").text
    card = make_card(folder, Claim(**{**vars(claim), "remote_code": True}), "alice/model")
    assert "trust_remote_code=True" in card.text and "read it first" in card.text


def test_a_plain_module_needs_its_class(tmp_path):
    save_untrained("module", tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name is None and card.data.pipeline_tag is None
    assert "`TinyNet`" in card.text and "load_torch_model" in card.text and "is needed to load" in card.text
    assert metadata_errors(str(card))[0] == []


def test_a_unet_is_a_pipeline(tmp_path):
    save_untrained("unet", tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("diffusers", "unconditional-image-generation")
    assert 'DDPMPipeline.from_pretrained("out")' in card.text
    assert metadata_errors(str(card))[0] == []


# Edited by its author.


def test_an_edited_text_is_left_alone_and_an_unedited_one_follows(tmp_path, saved):
    _, claim, results = saved
    folder = tmp_path
    assert update_card(folder, claim, "alice/model")
    before = (folder / "README.md").read_text()
    assert update_card(folder, scored(claim, results), "alice/model")
    assert "Recovered transfer: 83%" in (folder / "README.md").read_text() != before
    edited = (folder / "README.md").read_text().replace("## Limits", "## Limits\n\nMy own words.")
    (folder / "README.md").write_text(edited)
    assert not update_card(folder, claim, "alice/other")
    assert (folder / "README.md").read_text() == edited


def test_metadata_that_were_added_stay_and_ours_follow(tmp_path, saved):
    _, claim, results = saved
    update_card(tmp_path, claim, "alice/model")
    card = ModelCard.load(tmp_path / "README.md")
    card.data.license, card.data["thumbnail"] = "apache-2.0", "https://example.org/x.png"
    card.data.tags = [*card.data.tags, "mine"]
    card.save(tmp_path / "README.md")
    assert update_card(tmp_path, scored(claim, results), "alice/model")
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.license, data["thumbnail"]) == ("apache-2.0", "https://example.org/x.png")
    assert data.tags == ["sophon", "non-fine-tunable", "mine"] and len(data.eval_results) == 3


def test_saving_again_leaves_an_edited_card(tmp_path):
    trainer = save_untrained("classifier", tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text("---\nlicense: mit\n---\nAll my own.\n")
    trainer.save_model()
    trainer.create_model_card()
    assert (tmp_path / "out" / "README.md").read_text() == "---\nlicense: mit\n---\nAll my own.\n"


def test_a_card_on_windows_line_ends_is_still_ours(tmp_path, saved):
    _, claim, results = saved
    update_card(tmp_path, claim, "alice/model")
    path = tmp_path / "README.md"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert update_card(tmp_path, scored(claim, results), "alice/model")


# What comes from outside.


def test_license_and_base_model_are_inherited_from_a_folder(tmp_path):
    original = tmp_path / "original"
    trainer = make_trainer("classifier", tmp_path / "unused")
    trainer.model.save_pretrained(original)
    (original / "README.md").write_text(
        "---\nlicense: other\nlicense_name: my-license\nlicense_link: LICENSE.md\nbase_model: owner/base\n---\n# x\n"
    )
    save_untrained("classifier", tmp_path / "out", type(trainer.model).from_pretrained(original))
    data = ModelCard.load(tmp_path / "out" / "README.md").data
    assert (data.license, data.license_name, data.license_link) == ("other", "my-license", "LICENSE.md")
    assert data.base_model == "owner/base"
    assert Claim.read(tmp_path / "out").base_model == "original"


HOSTILE = [
    "license: 'mit\n\n  tags: [trusted]'",
    "license: {a: b}",
    "license: ['mit']",
    "license: !!python/object/apply:os.system ['touch /tmp/owned']",
    "license: |\n  mit\n  ---\n  # owned",
    "license_link: javascript:alert(1)",
    'license_link: https://x.org/a"><script>',
    "base_model: ../../etc/passwd",
    "base_model: [a/b, c/d]",
    "base_model: 'owner/base\\ntags: [owned]'",
    "model-index: [{name: x}]",
    "- a list",
    "tags: *missing",
]


@pytest.mark.parametrize("metadata", HOSTILE)
def test_a_hostile_base_card_cannot_inject(tmp_path, saved, metadata):
    folder, claim, _ = saved
    (tmp_path / "README.md").write_text(f"---\n{metadata}\n---\n# x\n")
    known = inherited_metadata(str(tmp_path))
    assert all(isinstance(value, str) and "\n" not in value for value in known.values())
    card = str(make_card(folder, claim, "alice/model", known))
    found = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    data = yaml.safe_load(found[1])
    assert data["tags"] == ["sophon"] and "owned" not in card and "<script>" not in card and "passwd" not in card
    assert metadata_errors(card)[0] == []


def test_names_from_outside_are_text(saved):
    folder, claim, results = saved
    evil = "x](https://evil.org) <img src=y onerror=z> | `a` {{ 7*7 }} **b** # c"
    sweep = "a | <b>"
    report = with_attacks(
        claim,
        results,
        sweep=sweep,
        failed_checks=[FailedCheck(evil, evil, False)],
        recovered_transfer=RecoveredTransfer(None, None, evil),
    )
    card = make_card(folder, report, "alice/model")
    assert "49" not in body(card).split("Checks that failed")[1].split("All attacks")[0]
    assert not re.search(r"(?<!\\)<img|(?<!\\)\]\(https://evil|(?<!\\)`a|(?<!\\)\*\*b", card.text)
    assert metadata_errors(str(card))[0] == []


def test_an_original_out_of_reach_costs_its_license_only(tmp_path, caplog, saved):
    folder, claim, _ = saved
    with caplog.at_level(logging.WARNING):
        known = inherited_metadata("owner/never-seen")
    assert known == {"base_model": "owner/never-seen"}
    assert "license is not known" in caplog.text


def test_a_report_is_shown_with_its_curve(saved, tmp_path):
    folder, claim, results = saved
    folder = tmp_path / "copy"
    folder.mkdir()
    claim.write(folder)
    results.save(tmp_path / "attacks" / "results.json")
    claim, results = with_report(folder, claim, tmp_path / "attacks")
    assert write_card_and_claim(folder, claim, "alice/model", results)
    text = (folder / "README.md").read_text()
    assert "(plots/curves.png)" in text and (folder / "plots" / "curves.png").exists()
    assert json.loads((folder / "sophon.json").read_text())["attacks"]["seeds"] == [0, 1, 2]


def test_a_diffusion_report_gives_errors_not_shares(tmp_path):
    trainer = save_untrained("unet", tmp_path / "out")
    suite = AttackSuite(
        [FineTuningStrategy(batch_size=10, steps=2)],
        tmp_path / "attacks",
        seeds=[0, 1],
        measured_epochs=[0, 0.5],
        task=trainer.task,
    )
    results = suite.run(
        protected=trainer.model,
        original=unet(),
        restricted_dataset=pixels(3, "sample"),
        eval_dataset=pixels(4, "sample"),
        original_eval_dataset=pixels(5, "sample"),
    )
    claim, _ = with_report(tmp_path / "out", Claim.read(tmp_path / "out"), tmp_path / "attacks")
    write_card_and_claim(tmp_path / "out", claim, "alice/model")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    best = results.best("protected")
    assert f"reaches mse {best.mean:.4g} in the restricted domain" in body(card)
    assert card.data.metrics == ["mse"] and metadata_errors(str(card))[0] == []
    values = [result.metric_value for result in card.data.eval_results if result.metric_type == "mse"]
    assert values == pytest.approx([results.original_metric["protected"], best.mean])

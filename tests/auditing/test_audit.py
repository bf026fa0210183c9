"""An audit passes what is true, finds what is overstated, and says what it cannot tell."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from audited import (
    EXAMPLES,
    SWEEP,
    as_parts,
    edit_claim,
    full_audit,
    make_images,
    perturbed,
    publish_folder,
    verdict_of,
    why_of,
)
from own_metrics import f1, make_metric
from points import TinyNet, make_points
from published import make_trainer, pixels, protect, unet

from sophon_hf import AttackSuite, FineTuningStrategy, load_metric
from sophon_hf.auditing import verdicts
from sophon_hf.auditing.audit import audit as audit_model
from sophon_hf.auditing.verdicts import NOT_CHECKABLE, REPRODUCED, TAMPERED, WEAKER, compare
from sophon_hf.cli import main as cli
from sophon_hf.data.domain import build_domain
from sophon_hf.data.fingerprint import fingerprint_domain
from sophon_hf.hub.claim import AttackReport, Claim, Protection
from sophon_hf.hub.publish import with_report, write_card_and_claim
from sophon_hf.tasks.base import infer_task
from sophon_hf.tasks.evaluation import evaluate_model

# A true claim.


def test_without_data_the_offline_part_is_checked(folder, tmp_path):
    audit = audit_model(folder, tmp_path / "audit")
    assert audit.exit_code == 0
    found = {v.claim: v.verdict for v in audit.verdicts}
    offline = ("files", "sophon.json", "weights", "configuration", "card", "state")
    assert {name: found.pop(name) for name in offline} == dict.fromkeys(offline, REPRODUCED)
    assert set(found.values()) == {NOT_CHECKABLE} and len(found) == 3
    written = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert written["exit_code"] == 0 and [v["claim"] for v in written["verdicts"]] == [v.claim for v in audit.verdicts]
    assert "| weights | reproduced |" in (tmp_path / "audit" / "audit.md").read_text()


def test_a_true_claim_is_reproduced_on_its_own_data(truth, tmp_path):
    audit = full_audit(truth, truth["folder"], tmp_path / "audit", fresh=True)
    assert {v.verdict for v in audit.verdicts} == {REPRODUCED} and audit.exit_code == 0
    assert why_of(audit, "recovered transfer") == "the same figure on the same data"
    assert {f"chance level in the {name} domain" for name in ("original", "restricted")} < {
        verdict.claim for verdict in audit.verdicts
    }
    assert audit.facts["precision"] == "float32"
    assert (tmp_path / "audit" / "report" / "index.html").exists()
    assert any("the claim's own data" in note for note in audit.notes)


def test_a_true_claim_is_reproduced_on_other_data_of_the_same_domains(truth, tmp_path):
    audit = full_audit(
        truth,
        truth["folder"],
        tmp_path / "audit",
        eval_dataset=make_images(14, 2000, shift=1),
        original_eval_dataset=make_images(12, 2000),
    )
    assert verdict_of(audit, "original accuracy after protection") == REPRODUCED
    assert verdict_of(audit, "recovered transfer") == REPRODUCED
    # An accuracy is one on certain data; only the score can be carried over.
    for name in ("strongest attack's accuracy", "chance level in the original domain"):
        assert verdict_of(audit, name) == NOT_CHECKABLE
    assert audit.exit_code == 0


# An imprecise audit lets no claim pass.


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"seeds": [0]}, "1 seeds tell little"),
        ({"sweep": SWEEP[:1], "eval_dataset": make_images(14, 40, shift=1)}, "exact to"),
        ({"sweep": SWEEP[:1], "eval_dataset": make_images(14, 8, shift=1)}, "void"),
    ],
)
def test_a_poor_audit_says_so(truth, tmp_path, changes, reason):
    audit = full_audit(truth, truth["folder"], tmp_path / "audit", **changes)
    assert verdict_of(audit, "recovered transfer") == NOT_CHECKABLE and reason in why_of(audit, "recovered transfer")


def test_an_adversary_with_fewer_examples_than_the_claims_passes_nothing(truth, folder, tmp_path):
    edit_claim(folder, attacks__data__training__examples=1000)
    audit = full_audit(truth, folder, tmp_path / "audit", examples=EXAMPLES)
    for name in ("recovered transfer", "strongest attack's accuracy"):
        assert verdict_of(audit, name) == NOT_CHECKABLE
        assert why_of(audit, name) == "the audit's adversary had 36 examples, the claim's 1000: give as many"


def test_few_examples_of_the_original_domain_tell_nothing(truth, tmp_path):
    audit = full_audit(
        truth,
        truth["folder"],
        tmp_path / "audit",
        restricted_dataset=None,
        eval_dataset=None,
        original_eval_dataset=make_images(12, 60),
    )
    assert verdict_of(audit, "original accuracy after protection") == NOT_CHECKABLE
    assert "exact to" in why_of(audit, "original accuracy after protection")


def test_without_the_unprotected_model_resistance_is_not_checkable(truth, tmp_path):
    audit = full_audit(truth, truth["folder"], tmp_path / "audit", unprotected=None)
    for name in ("recovered transfer", "strongest attack's accuracy"):
        assert verdict_of(audit, name) == NOT_CHECKABLE and "--model" in why_of(audit, name)
    # On the claim's own data, the metric after protection needs no other model.
    assert verdict_of(audit, "original accuracy after protection") == REPRODUCED


def test_a_model_without_attacks_claims_no_resistance(truth, tmp_path):
    protected = perturbed(truth["original"])
    publish_folder(tmp_path / "model", protected, None)
    audit = full_audit(truth, tmp_path / "model", tmp_path / "audit")
    assert {v.claim for v in audit.verdicts}.isdisjoint({"recovered transfer", "strongest attack's accuracy"})
    assert any("no resistance is claimed" in note for note in audit.notes)
    assert not (tmp_path / "audit" / "report").exists()


# A false claim.


def better(report: AttackReport, by: float) -> AttackReport:
    """A forger who is careful: every figure of the attacks on the protected model, and the score that follows."""
    attacks = [replace(a, test=tuple(t - by for t in a.test)) if a.model == "protected" else a for a in report.attacks]
    return replace(report, attacks=attacks)


def test_a_score_that_was_forged_with_care_is_found_by_measuring(truth, folder, tmp_path):
    claim = Claim.read(folder)
    forged = better(claim.attacks, 0.12)
    again = replace(claim, attacks=forged).scores.recovered_transfer()
    replace(claim, attacks=replace(forged, recovered_transfer=again)).write(folder)
    (folder / "README.md").unlink()
    assert verdict_of(audit_model(folder, tmp_path / "offline"), "sophon.json") == REPRODUCED
    audit = full_audit(truth, folder, tmp_path / "audit")
    assert verdict_of(audit, "recovered transfer") == WEAKER
    assert verdict_of(audit, "strongest attack's accuracy") == WEAKER
    assert audit.exit_code == 1


def test_a_chance_level_that_its_own_data_contradict_is_found(truth, folder, tmp_path):
    """Stated too low, it hides that a model is no better than a guess; too high, that an attack is."""
    edit_claim(folder, attacks__chance__original=0.2, attacks__chance__restricted=0.3)
    audit = full_audit(truth, folder, tmp_path / "audit")
    for name in ("original", "restricted"):
        found = next(v for v in audit.verdicts if v.claim == f"chance level in the {name} domain")
        # Every fourth example is of one class.
        assert found.verdict == TAMPERED and found.measured == "0.250"
    assert audit.exit_code == 1


def test_an_audit_attacks_in_the_precision_of_the_claim(truth, folder, tmp_path, monkeypatch):
    edit_claim(folder, attacks__precision="bf16")
    few = {"sweep": SWEEP[:1], "seeds": [0]}
    assert full_audit(truth, folder, tmp_path / "audit", **few).facts["precision"] == "bf16"
    monkeypatch.setattr(transformers.utils, "is_torch_bf16_available_on_device", lambda device: False)
    audit = full_audit(truth, folder, tmp_path / "without", **few)
    assert verdict_of(audit, "recovered transfer") == NOT_CHECKABLE
    why = "the claim's attacks ran in bf16, which this machine does not have"
    assert why_of(audit, "strongest attack's accuracy") == why
    assert verdict_of(audit, "original accuracy after protection") == REPRODUCED
    with pytest.raises(ValueError, match="bf16 is True, but this .* has no bfloat16"):
        AttackSuite(SWEEP, tmp_path / "attacks", bf16=True)


def test_a_broken_model_that_claims_to_be_intact_is_found(truth, tmp_path):
    torch.manual_seed(1)
    broken = perturbed(truth["original"])
    with torch.no_grad():
        for parameter in broken.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    claim = truth["claim"]
    publish_folder(tmp_path / "model", broken, None, attacks=claim.attacks)
    for data in (truth["data"]["original_test"], make_images(12, 2000)):
        audit = full_audit(
            truth,
            tmp_path / "model",
            tmp_path / "audit",
            restricted_dataset=None,
            eval_dataset=None,
            original_eval_dataset=data,
        )
        assert verdict_of(audit, "original accuracy after protection") == WEAKER and audit.exit_code == 1


def test_a_stronger_sweep_shows_a_claim_to_be_too_good(truth, tmp_path):
    """The claim tried one useless attack only; the audit's own finds what that left."""
    useless = [FineTuningStrategy(learning_rate=1e-6, batch_size=12, epochs=8)]
    claim = truth["claim"]
    report = claim.attacks
    weak = [
        replace(a, strategy=useless[0], test=(0.5,) * 3, final=(0.5,) * 3, validation=0.5, highest=0.5)
        for a in report.attacks
        if a.model == "protected"
    ][:1]
    report = replace(report, attacks=[*weak, *(a for a in report.attacks if a.model != "protected")])
    report = replace(report, recovered_transfer=replace(claim, attacks=report).scores.recovered_transfer())
    publish_folder(tmp_path / "model", perturbed(truth["original"]), None, attacks=report)
    audit = full_audit(truth, tmp_path / "model", tmp_path / "audit")
    assert verdict_of(audit, "recovered transfer") == WEAKER
    assert useless[0].to_dict() in audit.facts["attacks"]  # What the publisher found strongest is repeated.


def test_a_claim_of_another_metric_is_not_judged_by_accuracy(truth, tmp_path):
    claim = truth["claim"]
    publish_folder(tmp_path / "model", perturbed(truth["original"]), None, attacks=claim.attacks, metric="f1_macro")
    audit = full_audit(truth, tmp_path / "model", tmp_path / "audit")
    assert verdict_of(audit, "recovered transfer") == NOT_CHECKABLE
    assert why_of(audit, "original f1_macro after protection") == (
        "the claim measures f1_macro (greater is better), the audit accuracy (greater is better): pass the claim's as "
        "`metric`"
    )


def test_a_claim_of_ones_own_metric_is_judged_by_that_metric(truth, tmp_path):
    macro = load_metric(make_metric(f1), compute_kwargs={"average": "macro"})
    models = {"before": truth["original"], "after": perturbed(truth["original"])}
    task = infer_task(models["before"], macro)
    domain = build_domain(truth["data"]["original_test"], task.inputs(models["before"]), name="original")
    before, after = (evaluate_model(task, model, domain, 128).metric for model in models.values())
    for stated, given, expected in (
        (after, macro, REPRODUCED),
        (after + 0.02, macro, WEAKER),
        (after, None, NOT_CHECKABLE),
        (after, make_metric(f1), NOT_CHECKABLE),
    ):
        publish_folder(
            tmp_path / "model",
            models["after"],
            None,
            metric="f1_macro",
            protection=Protection("protected", 1, before, stated, 50, 0.8, 0.5, 0.4, 0, 0),
            data={"eval_original": fingerprint_domain(domain)},
        )
        audit = audit_model(
            tmp_path / "model",
            tmp_path / "audit",
            unprotected=truth["original"],
            original_eval_dataset=truth["data"]["original_test"],
            metric=given,
        )
        assert verdict_of(audit, "original f1_macro after protection") == expected


# The rule.


@pytest.mark.parametrize(
    "claimed, measured, error, expected",
    [
        (0.5, 0.5, 0.1, REPRODUCED),
        (0.5, 0.2, 0.1, REPRODUCED),
        (0.5, 0.59, 0.1, REPRODUCED),
        (0.5, 0.61, 0.1, WEAKER),
        (0.5, 0.5, 0.3, NOT_CHECKABLE),
        (0.5, 0.7, 0.3, NOT_CHECKABLE),
        (0.5, 0.9, 0.3, WEAKER),
        (math.nan, 0.5, 0.1, NOT_CHECKABLE),
        (0.5, 0.5, math.inf, NOT_CHECKABLE),
    ],
)
def test_the_rule(claimed, measured, error, expected):
    assert compare(claimed, measured, error, precision=0.2)[0] == expected


def test_an_imprecise_measurement_passes_only_as_the_same_figure_on_the_same_data():
    assert compare(0.5, 0.501, 0.9, 0.2, same_data=True)[0] == REPRODUCED
    assert compare(0.5, 0.4, 0.9, 0.2, same_data=True)[0] == NOT_CHECKABLE
    assert compare(0.5, 0.4, 0.1, 0.2, width=0.9)[0] == NOT_CHECKABLE


def test_a_true_claim_passes_as_often_as_the_error_says(truth):
    """Accuracies of two test splits of one truth: wrongly found weaker in one of forty, as a one-sided 2.5 % goes."""
    generator, examples, count = np.random.default_rng(0), 4000, 4000
    claim = replace(truth["claim"], attacks=None, data={"eval_original": replace_examples(truth, examples)})
    found = []
    for _ in range(count):
        before, after, ours_before, ours_after = (
            generator.binomial(examples, rate) / examples for rate in (0.9, 0.88, 0.9, 0.88)
        )
        stated = replace(claim, protection=replace(claim.protection, original_before=before, original_after=after))
        found.append(verdicts.judge_intactness(stated, ours_before, ours_after, examples, same_data=False).verdict)
    assert 0.01 < found.count(WEAKER) / count < 0.04
    assert found.count(NOT_CHECKABLE) == 0


@pytest.mark.parametrize(
    "metric, stated, before, after, same_data, expected",
    [
        ("accuracy", (0.90, 0.88), 0.90, 0.88, True, REPRODUCED),
        ("accuracy", (0.90, 0.88), 0.90, 0.87, True, WEAKER),
        # The drop is as claimed, but the model is worse than stated.
        ("accuracy", (0.90, 0.88), 0.80, 0.78, True, WEAKER),
        ("accuracy", (0.90, 0.88), 0.80, 0.78, False, REPRODUCED),
        ("accuracy", (0.90, 0.88), 0.80, 0.70, False, WEAKER),
        ("accuracy", (0.90, 0.88), 0.80, 0.95, False, REPRODUCED),
        ("accuracy", (0.90, 0.88), None, 0.88, False, NOT_CHECKABLE),
        ("accuracy", (0.90, 0.88), None, 0.88, True, REPRODUCED),
        ("accuracy", (0.90, 0.88), None, 0.70, True, WEAKER),
        ("accuracy", (None, None), 0.9, 0.9, True, NOT_CHECKABLE),
        ("mse", (0.020, 0.021), 0.020, 0.021, True, REPRODUCED),
        ("mse", (0.020, 0.021), 0.020, 0.022, True, WEAKER),
        ("mse", (0.020, 0.021), 0.040, 0.042, False, REPRODUCED),
        ("mse", (0.020, 0.021), 0.040, 0.043, False, REPRODUCED),
        ("mse", (0.020, 0.021), 0.040, 0.046, False, WEAKER),
        ("mse", (0.0, 0.021), 0.040, 0.042, False, NOT_CHECKABLE),
        ("mse", (0.020, 0.021), 0.0, 0.042, False, NOT_CHECKABLE),
    ],
)
def test_intactness(truth, metric, stated, before, after, same_data, expected):
    protection = replace(truth["claim"].protection, original_before=stated[0], original_after=stated[1])
    claim = replace(
        truth["claim"],
        attacks=None,
        protection=protection,
        data={"eval_original": replace_examples(truth, 4000)},
        metric=metric,
        greater_is_better=metric == "accuracy",
    )
    assert verdicts.judge_intactness(claim, before, after, 4000, same_data).verdict == expected


def replace_examples(truth, examples: int):
    return replace(truth["claim"].attacks.data["original_test"], examples=examples)


def test_a_claims_figures_give_its_own_score_again(truth):
    claim = truth["claim"]
    assert claim.scores.recovered_transfer() == truth["results"].recovered_transfer()
    assert claim.attacks.attacks == truth["results"].summaries()


# The command line.


def test_the_command_audits_folders_and_exits_with_the_verdict(truth, folder, tmp_path, capsys):
    parts = as_parts(truth["data"], tmp_path / "data")
    (tmp_path / "sweep.json").write_text(json.dumps([strategy.to_dict() for strategy in SWEEP]))
    arguments = [
        "audit",
        str(folder),
        "--restricted",
        parts["restricted"],
        "--no_adversary_half",
        "--original",
        parts["original"],
        "--sweep",
        str(tmp_path / "sweep.json"),
        "--model",
        str(truth["root"] / "original"),
        "--output_dir",
        str(tmp_path / "audit"),
    ]
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    out = capsys.readouterr().out
    assert ended.value.code == 0, out
    assert "reproduced" in out and "audit.md" in out
    edit_claim(folder, attacks__recovered_transfer__value=0.01)
    with pytest.raises(SystemExit) as ended:
        cli.main(["audit", str(folder), "--output_dir", str(tmp_path)])
    assert ended.value.code == 1 and "tampered" in capsys.readouterr().out


def test_the_folder_is_audited_without_what_the_commands_left_in_it(folder, tmp_path, monkeypatch):
    for i in range(2001):
        (folder / "attacks" / "runs").mkdir(parents=True, exist_ok=True)
        (folder / "attacks" / "runs" / f"{i}.json").write_text('{"auto_map": "x"}')
    with pytest.raises(SystemExit) as ended:
        cli.main(["audit", "--output_dir", str(folder)])
    assert ended.value.code == 0, "neither their number nor what is in them counts"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["missing/model"], "cannot be reached"),
        (["./missing"], "not the form of a Hub id"),
        (["FOLDER", "--restricted", "./nowhere"], "no file or folder"),
        (["FOLDER", "--model", "./nowhere"], "There is no folder './nowhere'"),
        (["FOLDER", "--sweep", "stron"], "There is no sweep 'stron'. Did you mean 'strong'?"),
        (["FOLDER", "--revision", "main", "--output_dir", "FILE"], "FILE"),
    ],
)
def test_what_cannot_be_carried_out_exits_with_2(folder, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("")
    arguments = [str(folder) if argument == "FOLDER" else argument for argument in arguments]
    with pytest.raises(SystemExit) as ended:
        cli.main(["audit", *arguments])
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_nothing_claimed_is_nothing_to_audit(truth, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["audit", str(truth["root"] / "original"), "--output_dir", str(tmp_path / "audit")])
    assert ended.value.code == 2 and "holds no sophon.json" in capsys.readouterr().err


def test_a_broken_library_ends_in_2_not_in_1(folder, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(torch.nn.Module, "to", fail)
    with pytest.raises(SystemExit) as ended:
        cli.main(["audit", str(folder)])
    assert ended.value.code == 2 and "CUDA error" in capsys.readouterr().err


# Other models.


def test_a_diffusion_model_is_audited_by_its_error(tmp_path):
    original, trainer = unet(), protect("unet", tmp_path / "out", simulated_examples=1)
    data = {
        "restricted_dataset": pixels(3, "sample", examples=20),
        "eval_dataset": pixels(4, "sample", examples=20),
        "original_eval_dataset": pixels(6, "sample"),
    }
    sweep = [FineTuningStrategy(batch_size=20, epochs=1)]  # One step on all of them.
    suite = AttackSuite(sweep, tmp_path / "attacks", task=trainer.task)
    suite.run(protected=trainer.model, original=original, **data)
    claim, _ = with_report(tmp_path / "out", Claim.read(tmp_path / "out"), tmp_path / "attacks")
    write_card_and_claim(tmp_path / "out", claim, "alice/model")
    original.save_pretrained(tmp_path / "original")
    told = {"unprotected": str(tmp_path / "original"), "sweep": sweep}
    audit = audit_model(tmp_path / "out", tmp_path / "audit", **told, **data)
    assert verdict_of(audit, "state") == REPRODUCED and audit.exit_code == 0
    assert verdict_of(audit, "strongest attack's mse") == REPRODUCED
    assert verdict_of(audit, "original mse after protection") in (REPRODUCED, NOT_CHECKABLE)


def test_a_plain_module_is_audited_with_the_module_itself(tmp_path):
    original, points = TinyNet(), make_points(2)
    protected = copy.deepcopy(original)
    trainer = make_trainer("module", tmp_path / "out", model=protected)
    trainer.train()
    audit = audit_model(tmp_path / "out", tmp_path / "audit", original_eval_dataset=points)
    assert verdict_of(audit, "state") == NOT_CHECKABLE and "no config.json" in why_of(audit, "state")
    audit = audit_model(tmp_path / "out", tmp_path / "audit", unprotected=original, original_eval_dataset=points)
    assert verdict_of(audit, "state") == REPRODUCED
    x, labels = torch.tensor(points["x"]), torch.tensor(points["label"])
    after, before = ((model.eval()(x).argmax(1) == labels).float().mean() for model in (trainer.model.cpu(), original))
    intact = next(v for v in audit.verdicts if v.claim == "original accuracy after protection")
    assert intact.measured == f"{after:.3f} ({before:.3f} before)"

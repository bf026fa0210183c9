"""A metric that the user names: guard, attacks, report, claim and card speak of it."""

from __future__ import annotations

import re

import pytest
import torch
from attacked import make_data, make_model, make_suite
from own_metrics import accuracy, f1, make_metric
from points import fitted, make_points
from sklearn.metrics import accuracy_score, f1_score

from sophon_hf import ClassificationTask, SophonConfig, SophonTrainer, load_metric
from sophon_hf.attacks.report import write_report
from sophon_hf.hub.claim import Claim

MACRO = load_metric(make_metric(f1), compute_kwargs={"average": "macro"})


def labels_of(model: torch.nn.Module, points) -> list[int]:
    with torch.no_grad():
        return model.eval()(torch.tensor(points["x"])).argmax(dim=1).tolist()


def test_the_guard_and_the_claim_go_by_it(tmp_path):
    original, held_out = make_points(2).select(range(90)), make_points(2).select(range(90, 120))
    restricted = make_points(1)
    model = make_model()
    expected = [labels_of(model, held_out)]
    trainer = SophonTrainer(
        model,
        restricted.select(range(90)),
        original,
        SophonConfig(str(tmp_path), max_steps=2, K=2, eval_steps=1, tolerance=1.0, disable_tqdm=True, use_cpu=True),
        eval_dataset={"original": held_out, "restricted": restricted.select(range(90, 120))},
        metric=MACRO,
    )
    trainer.train()
    expected.append(labels_of(trainer.model, held_out))
    before, after = (f1_score(held_out["label"], found, average="macro") for found in expected)
    assert before != pytest.approx(accuracy_score(held_out["label"], expected[0]), abs=0.01)
    claim = Claim.read(tmp_path)
    assert (claim.metric, claim.greater_is_better) == ("f1_macro", True)
    assert claim.intactness == (pytest.approx(before), pytest.approx(after))
    assert {"f1_macro_after", "eval_original_f1_macro", "eval_restricted_simulated_f1_macro"} <= {
        name for entry in trainer.state.log_history for name in entry
    }
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "f1_macro" in card and "accuracy" not in card.lower()


def test_attacks_are_chosen_and_reported_by_it(tmp_path):
    data = make_data() | {"original_eval_dataset": make_points(2)}
    results = make_suite(tmp_path, seeds=[0], metric=MACRO).run(**data)
    found = labels_of(data["original"], make_points(2))
    assert results.metric == "f1_macro"
    assert results.original_metric["original"] == pytest.approx(
        f1_score(make_points(2)["label"], found, average="macro")
    )
    assert write_report(results, tmp_path / "report")["metric"] == "f1_macro"
    page = (tmp_path / "report" / "report.md").read_text()
    assert "restricted f1_macro" in page and "accuracy" not in page.lower()
    # What was measured by another metric is measured again.
    again = make_suite(tmp_path, seeds=[0], metric=make_metric(accuracy)).run(**data)
    assert again.metric == "accuracy"
    for run, other in zip(results.runs, again.runs, strict=True):
        assert run.curve.test != other.curve.test


def test_a_metric_does_not_go_beside_a_task(tmp_path):
    task = ClassificationTask()
    message = "metric is given beside task, which measures accuracy"
    with pytest.raises(ValueError, match=message):
        make_suite(tmp_path, task=task, metric="accuracy")
    with pytest.raises(ValueError, match=message):
        SophonTrainer(fitted(), make_points(1), make_points(2), task=task, metric="accuracy")
    with pytest.raises(ValueError, match=re.escape("'f1' is not one of")):
        SophonTrainer(fitted(), make_points(1), make_points(2), metric="f1")

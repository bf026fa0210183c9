"""Several labels an example: losses against the two-class ones, metrics, and the whole way from a folder and back."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
import transformers
from attacked import NEW_HEAD, make_suite
from classifiers import TEXT, protect, settings
from labelled_data import WORDS, tokenizer
from torch.nn import functional as F

from sophon_hf import SophonTrainer, split_domain
from sophon_hf.data.domain import build_domain
from sophon_hf.models.loading import load_model
from sophon_hf.protection.config import PRESETS
from sophon_hf.protection.probes import leave_one_out_logits
from sophon_hf.tasks.base import infer_task
from sophon_hf.tasks.classification import ClassificationTask
from sophon_hf.tasks.losses import inverse_cross_entropy, kl_from_uniform
from sophon_hf.tasks.multi_label import MultiLabelTask


def model(labels: int = 3, **names) -> transformers.BertForSequenceClassification:
    torch.manual_seed(0)
    config = transformers.BertConfig(num_labels=labels, problem_type="multi_label_classification", **TEXT, **names)
    return transformers.BertForSequenceClassification(config)


def sentences(seed: int, count: int = 60, labels: int = 3, form: str = "ones") -> datasets.Dataset:
    """Words drawn at random; label i says whether word i is among them."""
    draw = np.random.default_rng(seed)
    words = [list(draw.choice(WORDS, draw.integers(3, 9))) for _ in range(count)]
    ones = [[int(WORDS[i] in chosen) for i in range(labels)] for chosen in words]
    values = {
        "ones": ones,
        "names": [[WORDS[i] for i, one in enumerate(row) if one] for row in ones],
        "numbers": [[i for i, one in enumerate(row) if one] for row in ones],
    }[form]
    return datasets.Dataset.from_dict({"text": [" ".join(w) for w in words], "labels": values})


def test_every_label_is_suppressed_as_a_choice_between_two():
    task, logits = MultiLabelTask(), 3 * torch.randn(5, 4)
    labels = (torch.rand(5, 4) < 0.5).float()
    pairs = torch.stack([torch.zeros(20), logits.flatten()], dim=1)
    for name, loss in (("inverse_cross_entropy", inverse_cross_entropy), ("kl_from_uniform", kl_from_uniform)):
        value = task.suppression_losses[name](logits, labels)
        torch.testing.assert_close(value, loss(pairs, labels.flatten().long()))
    wrong = torch.where(labels > 0, logits.sigmoid(), 1 - logits.sigmoid())  # The probability of what is true.
    torch.testing.assert_close(
        task.suppression_losses["inverse_cross_entropy"](logits, labels), -(1 - wrong).log().mean()
    )
    torch.testing.assert_close(task.loss(logits, labels), -wrong.log().mean())


def test_distance_is_a_divergence():
    task, ours, theirs = MultiLabelTask(), torch.randn(5, 4), torch.randn(5, 4)
    p, q = theirs.sigmoid(), ours.sigmoid()
    expected = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    torch.testing.assert_close(task.distance(ours, theirs), expected)
    assert float(task.distance(theirs, theirs)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("metric", "right", "wrong"), [("mean_average_precision", 1.0, 0.5), ("micro_f1", 1.0, 0.0)])
def test_metrics_of_right_and_wrong_logits(metric, right, wrong):
    task, labels = MultiLabelTask(metric=metric), torch.tensor([[1.0, 0], [0, 1]])
    for sign, value in ((1, right), (-1, wrong)):
        scores = {n: v.tolist() for n, v in task.scores(sign * (2 * labels - 1), labels).items()}
        assert task.compute_metric(scores) == pytest.approx(value)
    broken = task.scores(torch.full((2, 2), torch.nan), labels)
    assert task.compute_metric({n: v.tolist() for n, v in broken.items()}) == pytest.approx(wrong)
    assert task.greater_is_better and task.metric == metric


def test_a_metric_of_the_other_kind_is_refused():
    with pytest.raises(ValueError, match="'micro_f1' measures multi-label classifiers"):
        ClassificationTask(metric="micro_f1")
    with pytest.raises(ValueError, match="'accuracy' measures single-label classifiers"):
        MultiLabelTask(metric="accuracy")


def test_labels_that_are_no_answer_never_broadcast():
    with pytest.raises(ValueError, match=r"prediction has shape \(4, 3\), the labels \(4, 1\)"):
        MultiLabelTask().loss(torch.zeros(4, 3), torch.zeros(4, 1))


@pytest.mark.parametrize("form", ["ones", "names", "numbers"])
def test_labels_come_as_ones_names_or_numbers(form):
    bert = model(id2label=dict(enumerate(WORDS[:3])), label2id={w: i for i, w in enumerate(WORDS[:3])})
    domain = build_domain(sentences(1, form=form), infer_task(bert).inputs(bert), tokenizer(), name="original")
    expected = torch.tensor(sentences(1)["labels"]).float()
    assert torch.equal(domain.rows(torch.arange(60))["labels"], expected)
    assert domain.num_classes == 3


def test_one_label_is_refused():
    single = sentences(1).remove_columns("labels").add_column("labels", [0, 1] * 30)
    with pytest.raises(ValueError, match="holds 0 at row 0, but the model takes several labels an example"):
        build_domain(single, infer_task(model()).inputs(model()), tokenizer())


def test_halves_are_stratified_by_the_sets_of_labels():
    counts = [sum(map(sum, half["labels"])) for half in split_domain(sentences(1, 200))]
    assert abs(counts[0] - counts[1]) < 12


def test_a_probe_regresses_each_label_by_itself():
    features, labels = torch.randn(20, 6), (torch.rand(20, 3) < 0.5).float()
    together = leave_one_out_logits(features, labels, 3)
    for i in range(3):
        torch.testing.assert_close(leave_one_out_logits(features, labels[:, [i]], 1), together[:, [i]])
    shifted = leave_one_out_logits(labels.repeat(1, 2) + 0.01 * torch.randn(20, 6), labels, 3)
    assert ((shifted > 0) == (labels > 0)).float().mean() > 0.9


def test_a_multi_label_model_is_protected_and_attacked(tmp_path):
    """By the preset, with probes and distillation; the restricted domain has more labels than the head."""
    space = {"batch_sizes": [8], "reinitialized_blocks": [1], "learning_rates": [1e-3], "preparations": [None]}
    small = {"max_steps": 2, "K": 2, "horizon": 4, "strategy_space": space, "eval_steps": 2, "save_steps": 2}
    changes = {**PRESETS["representation"], **small, "eval_strategy": "steps", "tolerance": 1.0, "N": 1}
    bert = model()
    protect(bert, sentences(1, labels=5), sentences(2), tmp_path / "out", changes, processing_class=tokenizer())
    assert load_model(tmp_path / "out").config.problem_type == "multi_label_classification"
    suite = make_suite(tmp_path / "attacks", [NEW_HEAD.with_changes(epochs=1)], seeds=[0], measured_epochs=[0])
    model().save_pretrained(tmp_path / "before")
    tokenizer().save_pretrained(tmp_path / "before")
    results = suite.run(
        protected=str(tmp_path / "out"),
        original=str(tmp_path / "before"),
        restricted_dataset=sentences(3, labels=5).select(range(40)),
        eval_dataset=sentences(4, labels=5),
        original_eval_dataset=sentences(5),
    )
    assert results.metric == "mean_average_precision" and not any(run.failed for run in results.runs)
    assert 0 < results.original_metric["original"] <= 1


def test_an_original_domain_of_other_labels_is_refused(tmp_path):
    with pytest.raises(ValueError, match="The original domain has classes that the model does not know"):
        SophonTrainer(model(), sentences(1), sentences(2, labels=5), settings(tmp_path), processing_class=tokenizer())


def test_loss_is_the_librarys():
    bert, task = model(), infer_task(model())
    batch = build_domain(sentences(1), task.inputs(bert), tokenizer()).rows(torch.arange(8))
    with torch.no_grad():
        theirs = bert.eval()(**batch).loss
        ours = task.loss(task.predict(bert, batch), batch["labels"])
    torch.testing.assert_close(ours, theirs)
    assert torch.equal(ours, F.binary_cross_entropy_with_logits(task.predict(bert, batch), batch["labels"]).detach())

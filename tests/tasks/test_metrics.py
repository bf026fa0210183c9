"""ACC-k and MSE-k against sums written out, and any metric of the evaluate library in their place."""

from __future__ import annotations

import datasets
import evaluate
import pytest
import torch
from own_metrics import accuracy, f1, make_metric
from points import make_points
from sklearn.metrics import balanced_accuracy_score, f1_score

from sophon_hf import ClassificationTask, DiffusionTask
from sophon_hf.data.domain import build_domain
from sophon_hf.tasks.base import infer_task
from sophon_hf.tasks.evaluation import evaluate_model
from sophon_hf.tasks.metrics import load_metric

ERRORS = {"predictions": datasets.Value("float64")}


def balanced(predictions, references):
    return {"balanced_accuracy": balanced_accuracy_score(references, predictions)}


def mistakes(predictions, references):
    return {"mistakes": sum(p != r for p, r in zip(predictions, references))}


def mse(predictions):
    return {"mse": sum(predictions) / len(predictions)}


def test_accuracy_is_the_share_of_right_labels():
    scores = {"predictions": [0, 1, 2, -1, 2], "references": [0, 1, 1, 0, 2]}
    assert load_metric("accuracy").compute(scores) == 3 / 5


def test_mean_squared_error_is_the_mean_over_examples():
    scores = {"predictions": [0.5, 0.25, 4.0]}
    assert load_metric("mse").compute(scores) == pytest.approx(4.75 / 3)


def test_the_own_metrics_are_the_same_by_name_and_as_modules():
    for name, module in (("accuracy", make_metric(accuracy)), ("mse", make_metric(mse, ERRORS))):
        by_name, loaded = load_metric(name), load_metric(module)
        assert (loaded.name, loaded.greater_is_better) == (by_name.name, by_name.greater_is_better)
        assert loaded.needs_references == by_name.needs_references
        scores = {"predictions": [0, 1, 1], **({"references": [0, 1, 2]} if loaded.needs_references else {})}
        assert loaded.compute(scores) == by_name.compute(scores) == 2 / 3


def test_what_is_measured_is_what_the_metric_object_says(model):
    task, points = infer_task(model), make_points(1)
    domain = build_domain(points, task.inputs(model), name="restricted")
    model.train()
    measured = evaluate_model(task, model, domain, 7)
    assert model.training and model.norm.training, "the mode is put back"
    model.eval()
    with torch.no_grad():
        predictions = model(torch.tensor(points["x"])).argmax(dim=1).tolist()
    assert measured.metric == accuracy(predictions, points["label"])["accuracy"]
    macro = load_metric(make_metric(f1), compute_kwargs={"average": "macro"})
    task = infer_task(model, macro)
    assert (task.metric, task.greater_is_better) == ("f1_macro", True)
    expected = f1_score(points["label"], predictions, average="macro")
    assert evaluate_model(task, model, domain, 7).metric == pytest.approx(expected)
    assert measured.metric != pytest.approx(expected)


@pytest.mark.parametrize(("compute", "greater"), [(balanced, True), (mistakes, False)])
def test_whether_greater_is_better_is_found_by_trying(compute, greater):
    task = ClassificationTask(metric=make_metric(compute))
    assert (task.metric, task.greater_is_better) == (next(iter(compute([0], [0]))), greater)
    assert load_metric(make_metric(compute), greater_is_better=not greater).greater_is_better is not greater


@pytest.mark.parametrize(
    ("compute", "kwargs", "expected"),
    [(f1, {"average": "macro"}, 0.4), (f1, {}, 0.4), (balanced, {}, 5 / 12), (mistakes, {}, 3)],
)
def test_a_prediction_of_nan_counts_as_wrong(compute, kwargs, expected):
    logits = torch.tensor([[1.0, 0], [0, 1], [0, torch.nan], [torch.nan, 0], [1, 0]])
    labels = torch.tensor([0, 1, 0, 1, 1])
    task = ClassificationTask(metric=load_metric(make_metric(compute), compute_kwargs=kwargs))
    scores = {name: values.tolist() for name, values in task.scores(logits, labels).items()}
    assert scores["predictions"] == [0, 1, -1, -1, 0]
    assert task.compute_metric(scores) == pytest.approx(expected)


def test_several_metrics_are_measured_by_the_first():
    combined = evaluate.combine([make_metric(balanced), make_metric(accuracy)])
    scores = {"predictions": [0, 0, 0, 1], "references": [0, 0, 0, 0]}
    assert load_metric(combined).name == "balanced_accuracy"
    assert load_metric(combined).compute(scores) == pytest.approx(0.75)


def test_a_diffusion_metric_of_errors():
    median = make_metric(lambda predictions: {"median": sorted(predictions)[len(predictions) // 2]}, ERRORS)
    task = DiffusionTask(metric=median)
    assert (task.metric, task.greater_is_better) == ("median", False)
    assert task.compute_metric({"predictions": [0.5, 3.0, 1.0]}) == 1.0


@pytest.mark.parametrize("metric", ["accuracy", make_metric(balanced)])
def test_a_diffusion_model_has_no_references(metric):
    with pytest.raises(ValueError, match="needs references"):
        DiffusionTask(metric=metric)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("f1", r"'f1' is not one of \['accuracy', .*'mse'\].*evaluate.load\('f1'\)"),
        ("mse", "takes no references"),
        (make_metric(f1, {"prediction_scores": datasets.Value("float32")}), "takes \\['prediction_scores'\\]"),
        (make_metric(lambda predictions, references: {"f1": [0.5, 0.5]}), "not a number first"),
        (make_metric(lambda predictions, references: {}), "not a number first"),
        (make_metric(lambda predictions, references: {"constant": 1.0}), "pass `greater_is_better`"),
    ],
    ids=["unknown", "no references", "other inputs", "a value a class", "nothing", "no direction"],
)
def test_metrics_that_fit_no_classifier_are_refused(metric, message):
    with pytest.raises(ValueError, match=message):
        ClassificationTask(metric=metric)

"""ACC-k and MSE-k, plain and as metrics of the evaluate library, against sums written out."""

from __future__ import annotations

import pytest
import torch
from points import make_points

from sophon_hf.data.domain import build_domain
from sophon_hf.tasks.base import infer_task
from sophon_hf.tasks.evaluation import evaluate_model
from sophon_hf.tasks.metrics import Accuracy, MeanSquaredError, accuracy, mean_squared_error


def test_accuracy_is_the_share_of_right_labels():
    predictions, references = [0, 1, 2, -1, 2], [0, 1, 1, 0, 2]
    expected = sum(p == r for p, r in zip(predictions, references)) / 5
    assert accuracy(predictions, references) == expected
    assert Accuracy().compute(predictions=predictions, references=references) == {"accuracy": expected}


def test_mean_squared_error_is_the_mean_over_examples():
    errors = [0.5, 0.25, 4.0]
    assert mean_squared_error(errors) == pytest.approx(sum(errors) / 3)
    assert MeanSquaredError().compute(predictions=errors)["mse"] == pytest.approx(sum(errors) / 3)


def test_what_is_measured_is_what_the_metric_object_says(model):
    task, points = infer_task(model), make_points(1)
    domain = build_domain(points, task.inputs(model), name="restricted")
    model.train()
    measured = evaluate_model(task, model, domain, 7)
    assert model.training and model.norm.training, "the mode is put back"
    model.eval()
    with torch.no_grad():
        predictions = model(torch.tensor(points["x"])).argmax(dim=1).tolist()
    assert measured.metric == Accuracy().compute(predictions=predictions, references=points["label"])["accuracy"]

"""By which examples attacks are chosen, and what is printed beside the choice."""

from __future__ import annotations

import copy

import datasets
import numpy as np
import pytest
import torch
from attacked import DIRECT, NEW_HEAD, make_data, make_model, make_suite
from made_results import A, B, found, make_results, runs
from points import make_points

from sophon_hf.attacks.adversary import AdversaryData
from sophon_hf.attacks.report import to_markdown, write_report
from sophon_hf.attacks.results import AttackResults
from sophon_hf.attacks.run import AttackRun, run_attack
from sophon_hf.data.batches import Stream
from sophon_hf.finetuning.loop import FineTuning
from sophon_hf.tasks.base import infer_task
from sophon_hf.utils import derive_seed, set_seed


def built(training: datasets.Dataset, **settings):
    model = make_model()
    task = infer_task(model)
    return model, task, AdversaryData(training, make_points(9), **settings).build(task.inputs(model), None)


def test_few_examples_choose_by_cross_validation_each_once_and_stratified():
    points = make_points(1, 60)
    _, _, data = built(points)
    assert data.validation is None and len(data.training) == data.validation_examples == 60
    hashes = sorted(data.training.example_hashes())
    assert sorted(h for _, held_out in data.folds for h in held_out.example_hashes()) == hashes
    for training, held_out in data.folds:
        assert sorted([*training.example_hashes(), *held_out.example_hashes()]) == hashes
        counts = np.bincount(held_out.labels.numpy(), minlength=3)
        assert (np.abs(counts - np.bincount(points["label"]) / 5) < 2).all()


def test_copies_of_an_example_are_never_on_both_sides():
    points = make_points(1, 40)
    _, _, data = built(datasets.concatenate_datasets([points, points.select(range(25))]))
    for training, held_out in data.folds:
        assert not set(training.example_hashes()) & set(held_out.example_hashes())


@pytest.mark.parametrize("examples, folds", [(294, 5), (300, 0)])
def test_where_a_tenth_is_enough_it_chooses(examples, folds):
    _, _, data = built(make_points(1, examples))
    assert len(data.folds) == folds
    assert (data.validation is None) == bool(folds)
    assert data.validation_examples == (examples if folds else 30)


def test_validation_data_that_are_given_choose():
    _, _, data = built(make_points(1, 60), validation=make_points(5, 25))
    assert not data.folds and data.validation_examples == 25


def test_the_figure_is_the_share_of_all_examples_that_fits_without_them_get_right():
    model, task, data = built(make_points(1, 60))
    curve = run_attack(model, task, DIRECT, data, seed=3, measured=(0, 2))
    right = 0
    for training, held_out in data.folds:
        fitted = copy.deepcopy(model)
        set_seed(derive_seed(3, "attack"))
        batches = Stream(training, task.collate, derive_seed(3, "adversary's order")).batches(DIRECT.batch_size)
        structure = task.structure(fitted, next(batches))
        batches = Stream(training, task.collate, derive_seed(3, "adversary's order")).batches(DIRECT.batch_size)
        for _ in FineTuning(fitted, task, DIRECT, batches, 6, structure=structure):
            pass
        rows = held_out.rows(torch.arange(len(held_out)))
        right += int((task.predict(fitted.eval(), rows).argmax(dim=1) == rows["labels"]).sum())
    assert curve.validation[-1] == pytest.approx(right / 60)
    given = built(make_points(1, 60), validation=make_points(5, 25))[2]
    assert run_attack(model, task, DIRECT, given, seed=3, measured=(0, 2)).test == curve.test, "folds change no attack"


@pytest.mark.parametrize("examples, voids", [(19, True), (20, False)])
def test_too_few_examples_to_choose_by_void_the_score(tmp_path, examples, voids):
    results = make_suite(tmp_path, [NEW_HEAD], seeds=[0]).run(
        **{**make_data(), "validation_dataset": make_points(5, examples)}
    )
    failed = found(results)
    assert ("too few validation examples" in failed) == voids
    if voids:
        message, void = failed["too few validation examples"]
        assert void and "chosen by 19 examples, where 20 are needed" in message


def missed() -> AttackResults:
    """Validation data chose A, and B is far stronger on the test split at its first point."""
    results = make_results([0.43] * 3, [0.9] * 3, [0.4] * 3)
    for run in runs("protected", [0.9] * 3, B):
        run.curve.validation = [0.1, 0.2, 0.1]
        run.curve.test = [0.1, 0.9, 0.5]
        results.runs.append(AttackRun("protected", B, run.seed, run.curve))
    return results


def test_the_highest_test_figure_stands_beside_the_chosen_one(tmp_path):
    results = missed()
    scores = results.scores()
    assert (scores.best("protected").strategy, scores.highest("protected").strategy) == (A, B)
    transfer = scores.recovered_transfer()
    assert transfer.value == pytest.approx(0.03 / 0.5) and transfer.highest == pytest.approx(1.0)
    message, voids = found(results)["a stronger attack was not chosen"]
    assert f"{B.name} reached 0.900 on the test split, {A.name}, which was chosen, 0.430" in message and not voids
    summary = write_report(results, tmp_path)
    text = to_markdown(results, summary)
    assert f"is 0.900 on the protected model ({B.name}), and by such figures recovered transfer is 100%" in text
    assert "| protected | 0.430 ±0.000 | 0.900 |" in text


def test_a_choice_that_missed_little_is_not_complained_of():
    assert "a stronger attack was not chosen" not in found(make_results([0.7] * 3, [0.9] * 3, [0.6] * 3))

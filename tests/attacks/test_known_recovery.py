"""The suite, end to end, on models whose recovered transfer is known beforehand: printed letters, written digits."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sophon_hf import AttackSuite, FineTuningStrategy, split_domain
from sophon_hf.attacks.results import AttackResults
from sophon_hf.data.domain import build_domain
from sophon_hf.data.toy import handwritten_digits, printed_letters
from sophon_hf.finetuning.loop import pretrain
from sophon_hf.models.toy import small_classifier
from sophon_hf.protection.ntl import train_ntl
from sophon_hf.tasks.base import infer_task
from sophon_hf.tasks.evaluation import evaluate_model

SIZE = 16
SWEEP = [FineTuningStrategy(start, learning_rate=3e-3, batch_size=10) for start in ("direct", "new_head")]


def make_classifier(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return small_classifier()


@pytest.fixture(scope="module")
def letters():
    return printed_letters(600, SIZE)


@pytest.fixture(scope="module")
def digits() -> dict:
    defender, adversary = split_domain(handwritten_digits(SIZE)["train"])
    return {"defender": defender, "adversary": adversary, "test": handwritten_digits(SIZE)["test"].select(range(300))}


@pytest.fixture(scope="module")
def original(letters) -> nn.Module:
    model = make_classifier(0)
    task = infer_task(model)
    pretrain(model, task, build_domain(letters["train"], task.inputs(model), name="original"), steps=150)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Attacks that several tests need are run once."""
    return tmp_path_factory.mktemp("attacks")


def attack(folder, digits, protected, original, **settings) -> AttackResults:
    suite = AttackSuite(SWEEP, folder, seeds=[0, 1], epochs=10, measured_epochs=(5, 10), examples=30)
    return suite.run(
        protected=protected,
        original=original,
        restricted_dataset=digits["adversary"],
        eval_dataset=digits["test"],
        **settings,
    )


def test_an_unprotected_model_is_recovered_in_full(folder, digits, original):
    transfer = attack(folder, digits, copy.deepcopy(original), original).recovered_transfer()
    assert transfer.value == 1.0
    assert 0 < transfer.interval[0] <= 1 <= transfer.interval[1]


def test_a_model_that_forgot_everything_is_worth_nothing(folder, digits, original):
    transfer = attack(folder, digits, make_classifier(5), original).recovered_transfer()
    assert transfer.interval[0] <= 0 <= transfer.interval[1] < 0.6
    assert abs(transfer.value) < 0.4


def test_an_ntl_model_fails_at_first_and_is_recovered_by_fine_tuning(folder, digits, letters, original):
    model, task = copy.deepcopy(original), infer_task(original)
    needs = task.inputs(model)
    source = build_domain(letters["train"], needs, name="original")
    target = build_domain(digits["defender"], needs, name="restricted")
    train_ntl(model, task, source, target, steps=100, batch_size=32, learning_rate=3e-4)
    test = build_domain(digits["test"], needs, name="restricted")
    assert evaluate_model(task, model, test, 128).metric < 0.15
    assert evaluate_model(task, model, build_domain(letters["test"], needs, name="original"), 128).metric > 0.3

    results = attack(folder, digits, make_classifier(5), original, baselines={"ntl": model})
    of_ntl, of_original, scratch = (results.best(name).mean for name in ("ntl", "original", "scratch"))
    assert of_ntl - scratch > 0.8 * (of_original - scratch) > 0.1

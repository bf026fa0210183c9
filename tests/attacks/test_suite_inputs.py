"""What a suite is given: models, data and a budget, and what it refuses."""

from __future__ import annotations

import copy
import logging
import math
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from attacked import DIRECT, make_data, make_model, make_suite
from diffusers import DDPMPipeline, DDPMScheduler
from points import TinyNet, make_points
from published import classifier, pixels, unet
from raw_data import picture, pictures
from torch import nn
from transformers import ViTImageProcessor

from sophon_hf import DiffusionTask
from sophon_hf.attacks.results import AttackResults
from sophon_hf.utils import process_state


@pytest.fixture
def data() -> dict:
    return make_data()


def test_benign_fine_tunability_is_the_same_sweep_on_an_allowed_task(tmp_path, data):
    allowed = make_points(7)
    benign, test = allowed.select(range(60)), allowed.select(range(60, 120))
    results = make_suite(tmp_path / "both").run(**data, benign_dataset=benign, benign_eval_dataset=test)
    changed = {"restricted_dataset": benign, "eval_dataset": test}
    alone = make_suite(tmp_path / "alone").run(**{**data, **changed})
    means = {name: alone.best(name).mean for name in ("protected", "original", "scratch")}
    assert results.benign == {**means, "difference": means["protected"] - means["original"]}
    files = sum(len(list(folder.iterdir())) for folder in (tmp_path / "both").rglob("runs"))
    assert make_suite(tmp_path).plan(54, benign_examples=54)["runs"] == files == 20
    assert AttackResults.load(tmp_path / "both" / "results.json").benign == results.benign
    # The restricted domain's own result is what it is without.
    assert results.best("protected") == make_suite(tmp_path / "both").run(**data).best("protected")
    with pytest.raises(ValueError, match="go together"):
        make_suite(tmp_path).run(**data, benign_dataset=benign)


@pytest.mark.parametrize("name", ["protected", "original"])
def test_a_model_in_half_precision_is_refused(tmp_path, data, name):
    """Most of an adversary's small updates would be rounded away, and look like a protection."""
    half = copy.deepcopy(data[name]).to(torch.bfloat16)
    with pytest.raises(ValueError, match=f"The {name} model's weights are torch.bfloat16"):
        make_suite(tmp_path).run(**{**data, name: half})


@pytest.mark.parametrize("name", ["protected", "original"])
def test_a_model_that_is_not_finite_is_refused(tmp_path, data, name):
    """Nothing can be fine-tuned from it, which would pass for resistance."""
    torch.nn.init.constant_(data[name].body.bias, math.nan)
    with pytest.raises(ValueError, match=f"1 of the {name} model's parameters hold NaN or infinity, body.bias first"):
        make_suite(tmp_path).run(**data)


def test_labels_of_training_and_test_data_that_have_nothing_in_common_are_refused(tmp_path, data):
    named = [["cat", "dog", "eel"][label] for label in data["restricted_dataset"]["label"]]
    data["restricted_dataset"] = data["restricted_dataset"].remove_columns("label").add_column("label", named)
    with pytest.raises(ValueError, match="no class in common: cat, dog, eel, ... and c0, c1, c2, ...."):
        make_suite(tmp_path).run(**data)


def test_a_restricted_domain_of_one_class_is_refused(tmp_path, data):
    for name in ("restricted_dataset", "eval_dataset"):
        data[name] = data[name].filter(lambda row: row["label"] == 1)
    with pytest.raises(ValueError, match="has one class only"):
        make_suite(tmp_path).run(**data)


@pytest.mark.parametrize("name", ["restricted_dataset", "eval_dataset", "original_eval_dataset"])
def test_examples_that_the_model_cannot_take_are_told_by_domain(tmp_path, name):
    model = classifier()
    data = {"restricted_dataset": pixels(1), "eval_dataset": pixels(2), "original_eval_dataset": pixels(3)}
    grey = [[image[0]] for image in data[name]["pixel_values"]]
    data[name] = datasets.Dataset.from_dict({"pixel_values": grey, "label": data[name]["label"]})
    domain = "original" if name.startswith("original") else "restricted"
    with pytest.raises(
        ValueError, match=rf"cannot take the {domain} domain's examples.*\(1, 8, 8\).*takes \(3, 8, 8\)"
    ):
        make_suite(tmp_path).run(protected=model, original=model, **data)


def test_numbers_from_numpy_are_seeds(tmp_path):
    assert [type(seed) for seed in make_suite(tmp_path, seeds=np.arange(2)).seeds] == [int, int]


def test_a_benign_task_is_checked_before_anything_is_run(tmp_path, data):
    allowed = make_points(7)
    benign = {"benign_dataset": allowed.select(range(60)), "benign_eval_dataset": allowed.select(range(50, 120))}
    with pytest.raises(ValueError, match="training examples are in the test split too"):
        make_suite(tmp_path).run(**data, **benign)
    assert not (tmp_path / "runs").exists()


class Interrupted(TinyNet):
    """Is interrupted once results are there."""

    results: Path

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and self.results.exists():
            raise KeyboardInterrupt
        return super().forward(x)


def test_a_failure_on_the_benign_task_leaves_the_results(tmp_path, data, monkeypatch):
    monkeypatch.setattr(Interrupted, "results", tmp_path / "results.json", raising=False)
    data |= {"protected": Interrupted(), "original": Interrupted()}
    allowed = make_points(7)
    benign = {"benign_dataset": allowed.select(range(60)), "benign_eval_dataset": allowed.select(range(60, 120))}
    with pytest.raises(KeyboardInterrupt):
        make_suite(tmp_path, [DIRECT], seeds=[0]).run(**data, **benign)
    saved = AttackResults.load(tmp_path / "results.json")
    assert saved.best("protected") and saved.benign is None


def test_original_metric_and_baselines(tmp_path, data):
    held_out = make_points(3)
    results = make_suite(tmp_path, [DIRECT], seeds=[0]).run(
        **data, original_eval_dataset=held_out, baselines={"ntl": make_model(4)}
    )
    for name, model in (("protected", data["protected"]), ("original", data["original"]), ("ntl", make_model(4))):
        x, labels = torch.tensor(held_out["x"]), torch.tensor(held_out["label"])
        expected = (model.eval()(x).argmax(dim=1) == labels).float().mean().item()
        assert results.original_metric[name] == pytest.approx(expected)
    assert [c.model for c in results.runs] == ["protected", "original", "ntl", "scratch"]


def test_an_original_domain_of_more_classes_than_the_head_is_refused(tmp_path, data):
    with pytest.raises(ValueError, match="original domain has 5 classes with labels up to 4, .* too few outputs"):
        make_suite(tmp_path).run(**data, original_eval_dataset=make_points(3, num_classes=5))


def test_budget(tmp_path, data):
    """A tenth for validation first, then as many of the rest as are asked for; epochs keep their proportion."""
    long = DIRECT.with_changes(epochs=40, learning_rate=0.02)
    suite = make_suite(tmp_path, [DIRECT.with_changes(epochs=20), long], seeds=[0], examples=25, epochs=2)
    assert [s.epochs for s in suite.strategies] == [2, 4]
    results = suite.run(**data)
    assert results.facts["training_examples"] == 25
    assert {c.curve.step[-1] for c in results.runs} == {3, 5}


def test_a_length_in_steps_is_kept_whatever_the_epochs(tmp_path):
    in_steps = DIRECT.with_changes(steps=500)
    assert make_suite(tmp_path, [in_steps], epochs=5).strategies == [in_steps]


def test_fewer_examples_than_asked_for_are_said(tmp_path, data, caplog):
    for examples in (0, -3):
        with pytest.raises(ValueError, match=f"examples is {examples}, but must be a whole number of 1 or more"):
            make_suite(tmp_path, examples=examples)
    with caplog.at_level(logging.WARNING):
        results = make_suite(tmp_path, [DIRECT], seeds=[0], examples=60).run(**data)
        assert results.facts["training_examples"] == 60 and not caplog.text
        results = make_suite(tmp_path, [DIRECT], seeds=[0], examples=1000).run(**data)
    assert results.facts["training_examples"] == 60
    assert "1000 examples were asked for, but the adversary has 60" in caplog.text


class Wider(TinyNet):
    def __init__(self):
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(6, 17), nn.BatchNorm1d(17), nn.Linear(17, 3)


class Deeper(TinyNet):
    def __init__(self):
        super().__init__()
        self.more = nn.Linear(3, 3)


@pytest.mark.parametrize(
    "other, message",
    [
        (Wider, r"protected model differs in architecture .*\('body.weight', \(16, 6\)\) against .*\(17, 6\)"),
        (Deeper, "protected model differs in architecture or head from the original one. Compare"),
        (lambda: TinyNet(4), "'head.weight'"),
    ],
)
def test_models_of_other_architecture_are_refused(tmp_path, data, other, message):
    with pytest.raises(ValueError, match=message):
        make_suite(tmp_path).run(**{**data, "protected": other()})


@pytest.mark.parametrize(
    "validation, test, message",
    [
        (range(60, 80), range(55, 120), "training examples are in the test split too"),
        (range(50, 70), range(70, 120), "10 of the adversary's training examples are in the validation split too"),
        (range(60, 80), range(75, 120), "5 of the adversary's validation examples are in the test split too"),
    ],
)
def test_overlapping_data_are_refused(tmp_path, data, validation, test, message):
    points = make_points(1)
    data |= {"validation_dataset": points.select(validation), "eval_dataset": points.select(test)}
    with pytest.raises(ValueError, match=message):
        make_suite(tmp_path).run(**data)
    assert not (tmp_path / "runs").exists()


def noisy(rows: dict) -> dict:
    return {**rows, "x": torch.tensor(rows["x"]) + torch.rand(len(rows["x"]), 6)}


@pytest.mark.parametrize(
    "transformed", [("restricted_dataset", "eval_dataset"), ("restricted_dataset",), ("eval_dataset",)]
)
def test_overlapping_data_are_refused_under_a_random_transform(tmp_path, data, transformed):
    points = make_points(1)
    data |= {"restricted_dataset": points.select(range(60)), "eval_dataset": points.select(range(60))}
    for name in transformed:
        data[name] = data[name].with_transform(noisy)
    with pytest.raises(ValueError, match="60 of the adversary's training examples are in the test split too"):
        make_suite(tmp_path).run(**data)
    assert not (tmp_path / "runs").exists()


def test_an_example_twice_under_a_random_transform_is_not_validated_on(tmp_path, data):
    points = make_points(4, 200)
    twice = datasets.concatenate_datasets([points, points])
    counts = [
        make_suite(tmp_path, [DIRECT], seeds=[0]).run(**{**data, "restricted_dataset": dataset}).facts
        for dataset in (twice.with_transform(noisy), twice)
    ]
    assert counts[0]["validation_examples"] == counts[1]["validation_examples"] < 40


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"sweep": []}, "sweep is empty"),
        ({"sweep": [{"optimizer": "adam"}]}, "holds {'optimizer': 'adam'}: give FineTuningStrategy objects"),
        ({"seeds": []}, "at least one, each once"),
        ({"seeds": [1, 1]}, r"seeds are \[1, 1\]"),
        ({"seeds": 3}, "seeds are 3 and .*: give lists of numbers"),
        ({"seeds": ["a"]}, r"seeds are \['a'\] and .* whole ones as seeds"),
        ({"seeds": [0.5]}, r"seeds are \[0.5\] and .* whole ones as seeds"),
        ({"measured_epochs": 5}, "measured_epochs 5: give lists"),
        ({"measured_epochs": [-1]}, "measured_epochs has -1.0, but"),
        ({"measured_every": 2.5}, "measured_every is 2.5, but must be a whole number"),
        ({"examples": "20"}, "examples is '20', but must be a whole number"),
        ({"label_columns": {"restrictd": "label"}}, "label_columns is 'restrictd'.*Did you mean 'restricted'"),
    ],
)
def test_bad_settings_are_refused(tmp_path, settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make_suite(tmp_path, **settings)


# Models by id or folder, and where they run.


@pytest.fixture
def folder(tmp_path) -> Path:
    """A classifier and the processor that it was trained with."""
    classifier(labels=2).save_pretrained(tmp_path / "original")
    processor = ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.1, 0.2, 0.3], image_std=[0.2, 0.2, 0.2])
    processor.save_pretrained(tmp_path / "original")
    return tmp_path / "original"


def pictures_of(seeds: range) -> datasets.Dataset:
    return pictures([picture("RGB", size=(8, 8), seed=seed) for seed in seeds])


def test_a_model_by_its_folder_comes_with_its_processor(tmp_path, folder):
    images = {"restricted_dataset": pictures_of(range(40)), "eval_dataset": pictures_of(range(40, 60))}

    def data_of(protected, original, **settings) -> dict:
        suite = make_suite(tmp_path / "attacks", [DIRECT], seeds=[0], **settings)
        return suite.run(protected=protected, original=original, **images).facts["data"]

    models = {"protected": classifier(labels=2), "original": classifier(labels=2)}
    given = data_of(**models, processing_class=ViTImageProcessor.from_pretrained(folder))
    assert data_of(folder, str(folder)) == given
    assert data_of(folder, models["original"]) == given
    assert data_of(models["protected"], folder) == given
    assert data_of(**models) != given
    other = ViTImageProcessor(size={"height": 8, "width": 8})
    assert data_of(folder, folder, processing_class=other) not in (given, data_of(**models)), "a given one comes first"


def test_a_diffusion_model_by_its_folder_comes_with_its_noise_scheduler(tmp_path):
    scheduler = DDPMScheduler(num_train_timesteps=20, prediction_type="v_prediction")
    DDPMPipeline(unet(), scheduler).save_pretrained(tmp_path / "pipeline")
    data = {"restricted_dataset": pixels(1, "sample"), "eval_dataset": pixels(2, "sample")}

    def tests_of(source, **settings) -> list[float]:
        attacks = make_suite(tmp_path / "attacks", [DIRECT.with_changes(steps=1)], seeds=[0], **settings)
        return attacks.run(protected=source, original=source, **data).of("protected")[0].curve.test

    pipeline = str(tmp_path / "pipeline")
    assert tests_of(pipeline) == tests_of(pipeline, task=DiffusionTask(scheduler))
    assert tests_of(pipeline) != tests_of(pipeline, task=DiffusionTask())


def test_every_model_is_put_on_the_device_of_the_process(tmp_path, data, monkeypatch):
    moved = {}
    monkeypatch.setattr(TinyNet, "to", lambda model, device: moved.update({model: device}) or model)
    baseline = make_model(4)
    make_suite(tmp_path, [DIRECT], seeds=[0]).run(**data, baselines={"ntl": baseline})
    assert moved == dict.fromkeys([data["protected"], data["original"], baseline], process_state().device)

"""Names for labels, in any order, mean the same to trainer, suite and audit: what they mean to the model."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
from audited import make_images, perturbed, pretrained, publish_folder

from sophon_hf import AttackSuite, FineTuningStrategy, SophonConfig, SophonTrainer, audit

NAMES = ["zero", "one", "two", "three"]
COLOURS = ["red", "green", "blue", "pink"]


def named(dataset: datasets.Dataset, names: list[str], form: str) -> datasets.Dataset:
    """The data set with names for labels: as text, or numbered alphabetically, as folders are read."""
    texts = [names[label] for label in dataset["label"]]
    dataset = dataset.remove_columns("label").add_column("label", texts)
    return dataset if form == "text" else dataset.cast_column("label", datasets.ClassLabel(names=sorted(names)))


@pytest.fixture(scope="module")
def model():
    model = pretrained({"original": make_images(1, 400)})
    model.config.id2label = dict(enumerate(NAMES))
    return model


def accuracy(model, dataset: datasets.Dataset) -> float:
    pixels = torch.tensor(np.stack([np.asarray(image) for image in dataset["image"]]) / np.float32(255))[:, None]
    with torch.no_grad():
        predicted = model.eval()(pixels).logits.argmax(dim=1)
    return (predicted == torch.tensor(dataset["label"])).float().mean().item()


@pytest.mark.parametrize("form", ["text", "folders"])
def test_the_model_has_one_accuracy(tmp_path, model, form):
    expected = accuracy(model, make_images(2, 200))
    assert expected > 0.8
    test = named(make_images(2, 200), NAMES, form)
    training = named(make_images(1, 80), NAMES, form)
    restricted = named(make_images(3, 80, shift=1), COLOURS, form)

    settings = {"K": 1, "N": 1, "strategy_space": {"batch_sizes": [8]}, "use_cpu": True, "disable_tqdm": True}
    trainer = SophonTrainer(
        model,
        restricted,
        training,
        SophonConfig(str(tmp_path / "out"), **settings),
        eval_dataset={
            "original": test,
            "restricted": named(make_images(4, 80), COLOURS, form),
        },
    )
    metrics = trainer.evaluate()
    assert metrics["eval_original_accuracy"] == pytest.approx(expected)
    assert trainer.evaluate({"original": test})["eval_original_accuracy"] == pytest.approx(expected)

    sweep = [FineTuningStrategy("direct", steps=1, batch_size=8)]
    results = AttackSuite(sweep, tmp_path / "attacks", seeds=[0]).run(
        protected=perturbed(model),
        original=model,
        restricted_dataset=restricted,
        eval_dataset=named(make_images(5, 80, shift=1), COLOURS, form),
        original_eval_dataset=test,
    )
    assert results.original_metric["original"] == pytest.approx(expected)

    publish_folder(tmp_path / "published", model, None)
    found = audit(tmp_path / "published", tmp_path / "audit", original_eval_dataset=test)
    measured = [verdict.measured for verdict in found.verdicts if "original accuracy" in verdict.claim]
    assert [float(value.split()[0]) for value in measured] == pytest.approx([expected], abs=0.001)


def test_classes_that_the_model_does_not_know_are_refused_everywhere(tmp_path, model):
    data = {name: named(make_images(seed, 80), ["nought", *NAMES[1:]], "text") for name, seed in (("a", 1), ("b", 2))}
    message = (
        r"does not know, \['nought'\]: the data have \['nought', 'one', 'three', 'two'\], the model has \['zero', 'one'"
    )
    restricted = make_images(3, 80, shift=1)
    with pytest.raises(ValueError, match=message):
        SophonTrainer(model, restricted, data["a"], SophonConfig(str(tmp_path), use_cpu=True))
    suite = AttackSuite([FineTuningStrategy(steps=1)], tmp_path, seeds=[0])
    with pytest.raises(ValueError, match=message):
        suite.run(
            protected=perturbed(model),
            original=model,
            restricted_dataset=restricted,
            eval_dataset=make_images(5, 80),
            original_eval_dataset=data["b"],
        )
    publish_folder(tmp_path / "published", model, None)
    with pytest.raises(ValueError, match=message):
        audit(tmp_path / "published", tmp_path / "audit", original_eval_dataset=data["b"])

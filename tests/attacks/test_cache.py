"""What finished attacks are named by, so that no result stands for one that would be another."""

from __future__ import annotations

import pytest
import torch
from attacked import DIRECT, make_suite
from diffusers import DDPMScheduler, UNet2DModel
from points import TinyNet
from published import classifier, pixels, unet
from transformers import ResNetForImageClassification, ViTConfig, ViTForImageClassification

from sophon_hf.attacks.cache import configuration


def vit(**settings) -> ViTForImageClassification:
    """Of equal weights, whatever the settings."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **sizes, **settings))


def run(folder, model):
    """Attacks on a model that stands for the original too, and how many runs lie there then."""
    images = {"restricted_dataset": pixels(1), "eval_dataset": pixels(2)}
    results = make_suite(folder, [DIRECT], seeds=[0]).run(protected=model, original=model, **images)
    return results, len(list((folder / "runs").iterdir()))


def test_models_of_equal_weights_and_another_function_share_no_run(tmp_path):
    first, files = run(tmp_path, vit(hidden_act="gelu"))
    assert files == 2, "the model's, and scratch's"
    other, files = run(tmp_path, vit(hidden_act="tanh"))
    assert files == 4
    assert first.facts["weights"] == other.facts["weights"]
    for model in ("protected", "scratch"):
        assert first.of(model)[0].curve.loss != other.of(model)[0].curve.loss


def test_a_model_that_was_saved_and_loaded_finds_the_runs_of_its_module(tmp_path):
    model = vit()
    run(tmp_path, model)
    model.save_pretrained(tmp_path / "model")
    loaded = ViTForImageClassification.from_pretrained(tmp_path / "model")
    loaded.config.id2label = {0: "cat", 1: "dog", 2: "horse"}
    loaded.config.problem_type = "single_label_classification"
    assert run(tmp_path, loaded)[1] == 2


@pytest.mark.parametrize(
    "model, cls",
    [(classifier(), ResNetForImageClassification), (unet(), UNet2DModel), (vit(), ViTForImageClassification)],
)
def test_a_configuration_survives_the_disk(tmp_path, model, cls):
    model.save_pretrained(tmp_path)
    assert configuration(cls.from_pretrained(tmp_path)) == configuration(model) != {}


def test_a_configuration_holds_what_is_computed_and_not_whence_it_came():
    assert configuration(vit(hidden_act="tanh"))["hidden_act"] == "tanh"
    assert configuration(unet())["norm_num_groups"] == 4
    assert configuration(DDPMScheduler(prediction_type="sample"))["prediction_type"] == "sample"
    for part in (vit(), unet(), DDPMScheduler()):
        assert not {
            n for n in configuration(part) if n.startswith("_") or "version" in n or n in ("dtype", "architectures")
        }
    assert configuration(TinyNet()) is None and configuration(None) is None


def test_whole_epochs_are_the_same_as_integers_and_as_floats(tmp_path):
    images = {"restricted_dataset": pixels(1), "eval_dataset": pixels(2)}
    for epochs in ([0, 1, 2], [0.0, 1.0, 2.0]):
        suite = make_suite(tmp_path, [DIRECT], seeds=[0], measured_epochs=epochs)
        results = suite.run(protected=vit(), original=vit(), **images)
        assert len(list((tmp_path / "runs").iterdir())) == 2
        assert all(run.curve.epoch == [0, 1, 2] for run in results.runs)
    with pytest.raises(ValueError, match="measured_epochs has -1.0, but an epoch is finite and not below 0"):
        make_suite(tmp_path, measured_epochs=[0, -1])

"""Models without a head: a new one is what an adversary brings, and a linear probe tells whether they are intact."""

from __future__ import annotations

import pytest
import torch
import transformers
from attacked import NEW_HEAD
from classifiers import CASES, ENCODER, TEXT, protect, same_tensors, settings
from labelled_data import images, sentences, sounds, tokenizer, wave_features

from sophon_hf import AttackSuite, FineTuningStrategy, SophonTrainer
from sophon_hf.data.domain import build_domain
from sophon_hf.finetuning.initialization import initialize, preserved
from sophon_hf.models.backbone import Backbone, with_head
from sophon_hf.models.loading import load_model
from sophon_hf.protection.config import PRESETS
from sophon_hf.tasks.backbone import BackboneTask, probe_predictions
from sophon_hf.tasks.base import infer_task
from sophon_hf.tasks.evaluation import evaluate_model

PIXELS = {"image_size": 16, "patch_size": 8}
SPEECH = next(case for case in CASES if case.family.startswith("Wav2Vec2")).config


def processor() -> transformers.ViTImageProcessor:
    return transformers.ViTImageProcessor(size={"height": 16, "width": 16})


# Class, configuration, data, processor.
BACKBONES = {
    "dinov2": ("Dinov2Model", transformers.Dinov2Config, {**ENCODER, **PIXELS}, images, processor),
    "vit": ("ViTModel", transformers.ViTConfig, {**ENCODER, **PIXELS}, images, processor),
    "clip": ("CLIPVisionModel", transformers.CLIPVisionConfig, {**ENCODER, **PIXELS}, images, processor),
    "siglip": ("SiglipVisionModel", transformers.SiglipVisionConfig, {**ENCODER, **PIXELS}, images, processor),
    "resnet": (
        "ResNetModel",
        transformers.ResNetConfig,
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "basic"},
        images,
        processor,
    ),
    "bert": ("BertModel", transformers.BertConfig, TEXT, sentences, tokenizer),
    "wav2vec2": ("Wav2Vec2Model", transformers.Wav2Vec2Config, SPEECH, sounds, wave_features),
}


def build(name: str):
    cls, config, settings, data, processing = BACKBONES[name]
    torch.manual_seed(0)
    return getattr(transformers, cls)(config(**settings)), data, processing()


def small(**changes) -> dict:
    """The preset, two iterations of it."""
    space = {"batch_sizes": [8], "reinitialized_blocks": [1], "learning_rates": [1e-3], "preparations": [None]}
    values = {"max_steps": 2, "K": 2, "horizon": 4, "strategy_space": space, "eval_steps": 2, "save_steps": 2}
    return {**PRESETS["representation"], **values, "tolerance": 1.0, "N": 1, **changes}


@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_is_protected_and_saved_alone(name, tmp_path):
    model, data, processing = build(name)
    # What the guard does is the same for all, and takes longer than the rest.
    changes = small(eval_strategy="steps" if name == "vit" else "no")
    trainer = protect(with_head(model), data(1), data(2), tmp_path, changes, processing_class=processing)
    steps = " ".join(entry["strategy"] for entry in trainer.state.log_history if "strategy" in entry)
    assert "direct" not in steps and "new head" in steps, "there is no head to go on from"
    assert trainer.unmoved <= {n for n, _ in trainer.model.named_parameters() if "mask" in n}
    loaded = type(model).from_pretrained(tmp_path)
    assert same_tensors(model, loaded) and same_tensors(loaded, model)
    again = load_model(tmp_path)
    domain = trainer.domains["eval_original"]
    assert isinstance(again, Backbone)
    assert evaluate_model(trainer.task, again, domain, 8).metric == trainer.evaluate()["eval_original_accuracy"]


def test_a_backbone_by_its_folder_is_attacked_with_new_heads(tmp_path):
    """A direct attack has no head to begin with, which shows no resistance; scratch is a new backbone."""
    model, data, processing = build("vit")
    for name in ("before", "after"):
        model.save_pretrained(tmp_path / name)
        processing.save_pretrained(tmp_path / name)
    trainer = SophonTrainer(
        str(tmp_path / "before"),
        data(1),
        data(2),
        settings(tmp_path / "out", **small()),
        eval_dataset={"original": data(3), "restricted": data(4)},
    )
    sweep = [FineTuningStrategy(epochs=1), NEW_HEAD.with_changes(epochs=1)]
    suite = AttackSuite(sweep, tmp_path / "attacks", seeds=[0], measured_epochs=[0, 1])
    results = suite.run(
        protected=str(tmp_path / "after"),
        original=str(tmp_path / "before"),
        restricted_dataset=data(5),
        eval_dataset=data(6),
        original_eval_dataset=data(3),
    )
    assert not any(run.failed for run in results.runs)
    assert {run.applicable for run in results.runs if run.strategy.initialization == "direct"} == {False}
    assert all(run.applicable for run in results.runs if run.strategy.initialization != "direct")
    assert results.original_metric["original"] == trainer.evaluate()["eval_original_accuracy"]


@pytest.mark.parametrize("name", ["bert", "wav2vec2", "resnet", "clip"])
def test_features_and_a_new_head_do_not_depend_on_the_batch(name):
    model, data, processing = build(name)
    model = with_head(model).eval()
    task = infer_task(model)
    domain = build_domain(data(1), task.inputs(model), processing)
    structure = task.structure(model, domain.rows(torch.arange(4)))
    with torch.no_grad():
        together = task.predict(model, domain.rows(torch.arange(12)))
        alone = torch.cat([task.predict(model, domain.rows(torch.tensor([i]))) for i in range(12)])
    assert together.ndim == 3
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    with preserved(model, structure.heads):
        assert {n.split(".")[0] for n in initialize(model, FineTuningStrategy("new_head"), structure, 5)} == {"head"}
        assert task.predict(model, domain.rows(torch.arange(12))).shape == (12, 5)
    assert task.predict(model, domain.rows(torch.arange(12))).shape == together.shape


@pytest.mark.parametrize("width", [3, 40], ids=["fewer features", "more features than examples"])
def test_a_probe_predicts_each_example_from_the_others(width):
    """Against ridge regressions that are fitted without the example, on features standardised by all."""
    torch.manual_seed(0)
    features, labels = torch.randn(12, width, dtype=torch.float64), torch.arange(12) % 3
    found = probe_predictions(features, labels)
    x = (features - features.mean(0)) / (features.std(0, correction=0) + 1e-4)
    y = torch.nn.functional.one_hot(labels).double()
    ridge = torch.eye(width + 1, dtype=torch.float64) * 0.1 * max(12, width)
    ridge[-1, -1] = 0  # The intercept is free.
    x = torch.cat([x, torch.ones(12, 1, dtype=torch.float64)], dim=1)
    for i in range(12):
        kept = torch.arange(12) != i
        weights = torch.linalg.solve(x[kept].T @ x[kept] + ridge, x[kept].T @ y[kept])
        torch.testing.assert_close(found[i], x[i] @ weights, atol=1e-8, rtol=1e-6)


def test_intactness_is_what_a_linear_probe_can_do():
    task, labels = BackboneTask(), torch.arange(60) % 3
    told = torch.nn.functional.one_hot(labels, 8).float() + 0.1 * torch.randn(60, 8)
    for features, low, high in ((told, 0.99, 1.0), (torch.randn(60, 8), 0.0, 0.6), (told * torch.nan, 0.0, 0.0)):
        scores = {name: list(v.numpy()) for name, v in task.scores(features[:, None], labels).items()}
        assert low <= task.compute_metric(scores) <= high


def test_distance_is_a_share_of_the_variance():
    task, features = BackboneTask(), torch.randn(50, 2, 4)
    assert float(task.distance(features, features)) == 0
    assert float(task.distance(3 * features, 3 * features.roll(1, 0))) == pytest.approx(
        float(task.distance(features, features.roll(1, 0))), rel=1e-5
    )


def test_the_backbone_of_a_masked_language_model_is_taken(tmp_path):
    torch.manual_seed(0)
    transformers.BertForMaskedLM(transformers.BertConfig(**TEXT)).save_pretrained(tmp_path)
    assert type(load_model(tmp_path).model).__name__ == "BertModel"


def test_a_space_of_direct_strategies_alone_is_refused(tmp_path):
    model, data, processing = build("vit")
    args = settings(tmp_path, strategy_space={"initializations": ["direct"], "batch_sizes": [8]})
    with pytest.raises(ValueError, match="the model's head no outputs, so a direct strategy has no output"):
        SophonTrainer(model, data(1), data(2), args, processing_class=processing)


def test_a_model_with_two_towers_is_refused(tmp_path):
    towers = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    vision, text = {**towers, **PIXELS}, {**towers, "vocab_size": 20, "max_position_embeddings": 20}
    model = transformers.CLIPModel(transformers.CLIPConfig(vision_config=vision, text_config=text))
    with pytest.raises(ValueError, match="CLIPModel has several towers: protect one by itself, such as its"):
        load_model(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="several towers"):
        load_model(tmp_path)
    _, data, processing = build("clip")
    needs = infer_task(load_model(model.vision_model)).inputs(load_model(model.vision_model))
    assert len(build_domain(data(1), needs, processing)) == 48

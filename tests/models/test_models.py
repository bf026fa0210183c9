"""Every kind of model that the README names goes through Algorithm 1 and comes out loadable by its own library."""

from __future__ import annotations

from dataclasses import replace

import datasets
import pytest
import torch
import transformers
from classifiers import CASES, protect, same_tensors, settings
from diffusers import DDPMPipeline, UNet2DModel
from labelled_data import (
    CLASSES,
    PIXELS,
    images,
    sentences,
    sounds,
    tokenizer,
    unet,
)
from points import TinyNet, make_points
from safetensors.torch import load_file, save_file
from safetensors.torch import load_model as load_weights
from torch import nn

from sophon_hf import DiffusionTask, SophonTrainer
from sophon_hf.data.domain import build_domain
from sophon_hf.finetuning.initialization import initialize
from sophon_hf.finetuning.strategy import FineTuningStrategy
from sophon_hf.models.loading import load_model, load_processor
from sophon_hf.protection.config import PRESETS
from sophon_hf.tasks.base import infer_task
from sophon_hf.tasks.evaluation import evaluate_model


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.family)
def test_transformers_classifier_is_protected_saved_and_loaded(case, tmp_path):
    model = case.build()
    processing = case.processing() if case.processing else None
    trainer = protect(model, case.data(1), case.data(2), tmp_path, processing_class=processing)
    assert trainer.structure.head == case.head
    assert not trainer.unmoved

    loaded = type(model).from_pretrained(tmp_path)
    assert same_tensors(model, loaded)
    assert type(load_model(tmp_path)) is type(model)
    domain = trainer.domains["eval_restricted"]
    assert evaluate_model(trainer.task, loaded, domain, 8) == evaluate_model(trainer.task, model, domain, 8)
    assert loaded.config.id2label == model.config.id2label


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.family)
def test_representation_preset_fits_every_family(case, tmp_path):
    space = {"batch_sizes": [8], "reinitialized_blocks": [1], "learning_rates": [1e-3]}
    small = {"max_steps": 2, "K": 2, "horizon": 4, "strategy_space": space, "eval_steps": 2, "save_steps": 2}
    changes = {**PRESETS["representation"], **small, "tolerance": 1.0, "N": 1}
    processing = case.processing and case.processing()
    trainer = protect(case.build(), case.data(1), case.data(2), tmp_path, changes, processing_class=processing)
    assert len(trainer.suppression.probes.blocks) == 1


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.family)
def test_blocks_of_transformers_classifier_are_found_in_order(case):
    model, task = case.build(), infer_task(case.build())
    domain = build_domain(case.data(1), task.inputs(model), case.processing() if case.processing else None)
    assert list(task.structure(model, domain.rows(torch.arange(2))).blocks) == case.blocks


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.family)
def test_new_head_for_five_classes_replaces_the_head_alone(case):
    model, task = case.build(), infer_task(case.build())
    batch = build_domain(case.data(1), task.inputs(model), case.processing() if case.processing else None)
    batch = batch.rows(torch.arange(4))
    structure = task.structure(model, batch)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    new = initialize(model, FineTuningStrategy(initialization="new_head"), structure, 5)
    assert new == {name for name, _ in model.named_parameters() if name.startswith(f"{case.head}.")}
    assert {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])} >= {f"{case.head}.weight"}
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items() if n not in new)
    assert task.predict(model, batch).shape == (4, 5)


def test_convolutional_classifier_keeps_the_size_of_its_images():
    config = transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=2, num_labels=3)
    model = transformers.ConvNextForImageClassification(config)
    # The configuration says image_size=224, but nothing in a convolutional network depends on it.
    domain = build_domain(images(1), infer_task(model).inputs(model))
    assert domain.rows(torch.arange(2))["pixel_values"].shape == (2, 3, PIXELS, PIXELS)


@pytest.mark.parametrize("family", ["BertForSequenceClassification", "GPT2ForSequenceClassification"])
def test_ready_sentence_predicts_the_same_alone_and_padded(family):
    """Tokenised columns come without a tokenizer, so the padding has to be the one that the model knows."""
    case = next(case for case in CASES if case.family == family)
    model = replace(case, config={**case.config, "pad_token_id": 9}).build().eval()
    ids = [[2, 3], [4, 5, 6, 7, 8]]
    ready = datasets.Dataset.from_dict(
        {"input_ids": ids, "attention_mask": [[1] * len(i) for i in ids], "label": [0, 1]}
    )
    task = infer_task(model)
    domain = build_domain(ready, task.inputs(model))
    with torch.no_grad():
        together = task.predict(model, domain.rows(torch.arange(2)))[0]
        alone = task.predict(model, domain.rows(torch.arange(1)))[0]
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_tokenizer_is_saved_beside_the_model(tmp_path):
    case = next(case for case in CASES if case.family == "BertForSequenceClassification")
    protect(case.build(), sentences(1), sentences(2), tmp_path, processing_class=tokenizer())
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert saved("red one")["input_ids"] == tokenizer()("red one")["input_ids"]


def test_classifier_is_taken_by_its_folder(tmp_path):
    case = CASES[0]
    case.build().save_pretrained(tmp_path / "model")
    trainer = SophonTrainer(str(tmp_path / "model"), images(1), images(2), settings(tmp_path / "protected"))
    assert type(trainer.model).__name__ == case.family
    trainer.train()
    assert not same_tensors(trainer.model, load_model(tmp_path / "model"))
    assert same_tensors(trainer.model, load_model(tmp_path / "protected"))


def test_plain_module_is_protected_and_saved_as_safetensors(tmp_path, model):
    trainer = protect(model, make_points(1), make_points(2), tmp_path)
    assert trainer.structure.head == "head" and not trainer.unmoved
    loaded = TinyNet()
    load_weights(loaded, tmp_path / "model.safetensors")
    assert same_tensors(model, loaded)


class SharedNet(nn.Module):
    """Two names for one weight, which a bare `safetensors.save_file` refuses."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))}


def test_plain_module_with_shared_weights_and_a_dict_for_output(tmp_path):
    model = SharedNet()
    protect(model, make_points(1), make_points(2), tmp_path)
    assert model.second.weight is model.first.weight
    loaded = SharedNet()
    load_weights(loaded, tmp_path / "model.safetensors")
    assert same_tensors(model, loaded)


def test_unet_is_protected_saved_and_loaded(tmp_path):
    model = unet()
    trainer = protect(
        model, images(1), images(2), tmp_path, {"strategy_space": {"batch_sizes": [8], "initializations": ["direct"]}}
    )
    assert trainer.structure.head == "conv_out" and not trainer.unmoved
    assert isinstance(trainer.task, DiffusionTask)
    assert trainer.domains["original"].rows(torch.arange(2))["sample"].shape == (2, 1, 8, 8)
    assert same_tensors(model, DDPMPipeline.from_pretrained(tmp_path).unet)
    assert isinstance(load_model(tmp_path), UNet2DModel)


def test_unet_needs_no_labels_and_does_not_mind_unusable_ones(tmp_path):
    faces = images(1).remove_columns("label")
    # "-1" is how a test split without labels says so; a diffusion model never looks.
    unlabelled = faces.add_column("label", [-1] * len(faces))
    space = {"batch_sizes": [8], "initializations": ["direct"]}
    protect(unet(), unlabelled, images(2).remove_columns("label"), tmp_path, {"strategy_space": space})


def test_input_column_holds_for_evaluation_as_for_training(tmp_path):
    case = next(case for case in CASES if case.family == "BertForSequenceClassification")
    original, restricted, data = (sentences(seed).add_column("comment", ["red"] * 48) for seed in (1, 2, 3))
    columns = {"original": "text", "restricted": "text"}
    trainer = SophonTrainer(
        case.build(), restricted, original, settings(tmp_path), processing_class=tokenizer(), input_columns=columns
    )
    measured = trainer.evaluate({"original": data, "restricted": data})
    assert measured["eval_original_accuracy"] == measured["eval_restricted_accuracy"]


def test_frozen_model_and_missing_processing_are_refused(tmp_path, model):
    with pytest.raises(ValueError, match="Every parameter of the model is frozen"):
        SophonTrainer(model.requires_grad_(False), make_points(1), make_points(2), settings(tmp_path))
    text = next(case for case in CASES if case.data is sentences).build()
    with pytest.raises(ValueError, match="save the model's tokenizer with it"):
        SophonTrainer(text, sentences(1), sentences(2), settings(tmp_path))
    sound = next(case for case in CASES if case.data is sounds).build()
    with pytest.raises(ValueError, match="save the model's feature extractor with it"):
        SophonTrainer(sound, sounds(1), sounds(2), settings(tmp_path))


@pytest.mark.parametrize("kind", ["Bert", "T5", "Llama"])
def test_a_text_model_that_was_saved_without_a_tokenizer_has_none(tmp_path, kind, caplog):
    sizes = {"hidden_size": 8, "d_model": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "num_layers": 1}
    config = getattr(transformers, f"{kind}Config")(vocab_size=20, pad_token_id=0, num_labels=3, **sizes)
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config)
    model.save_pretrained(tmp_path / "model")
    with caplog.at_level("WARNING"):
        assert load_processor(tmp_path / "model", model) is None
    assert "No AutoTokenizer is saved with" in caplog.text
    with pytest.raises(ValueError, match="save the model's tokenizer with it"):
        SophonTrainer(str(tmp_path / "model"), sentences(1), sentences(2), settings(tmp_path))
    tokenizer().save_pretrained(tmp_path / "model")
    assert load_processor(tmp_path / "model", model)("red one")["input_ids"] == tokenizer()("red one")["input_ids"]


def test_a_missing_image_processor_is_told_in_one_sentence(tmp_path, caplog):
    model = next(case for case in CASES if case.data is images).build()
    model.save_pretrained(tmp_path / "model")
    with caplog.at_level("WARNING"):
        assert load_processor(tmp_path / "model", model) is None
    assert "No AutoImageProcessor is saved with" in caplog.text and "huggingface.co" not in caplog.text


def test_weights_that_are_not_all_there_are_refused(tmp_path):
    case = next(case for case in CASES if case.family.startswith("ResNet"))
    model, path = case.build(), tmp_path / "model.safetensors"
    model.save_pretrained(tmp_path)
    whole = load_file(path)
    for change, told in (
        (lambda name, values: {} if "classifier" in name else {name: values}, "lack 2 of the"),
        (
            lambda name, values: {f"net.{name}": values},
            r"lack (\d+) of the \1 tensors of a ResNetForImageClassification",
        ),
        (lambda name, values: {name: values[:1] if "classifier" in name else values}, "or have other shapes"),
    ):
        changed = [change(name, values.clone()) for name, values in whole.items()]
        save_file({n: v for part in changed for n, v in part.items()}, path, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=told):
            load_model(tmp_path)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 5\n")
    with pytest.raises(ValueError, match="a pointer of Git LFS"):
        load_model(tmp_path)


def test_a_model_by_its_folder_comes_with_its_processor(tmp_path):
    model = next(case for case in CASES if case.data is images).build()
    processor = transformers.ViTImageProcessor(
        size={"height": PIXELS, "width": PIXELS}, image_mean=[0.1, 0.2, 0.3], image_std=[0.2, 0.2, 0.2]
    )
    for saved in (model, processor):
        saved.save_pretrained(tmp_path / "model")
    given = SophonTrainer(model, images(1), images(2), settings(tmp_path), processing_class=processor)
    found = SophonTrainer(tmp_path / "model", images(1), images(2), settings(tmp_path))
    for name, domain in given.domains.items():
        assert found.domains[name].fingerprint == domain.fingerprint
    assert found.processing_class.to_dict() == processor.to_dict()
    other = transformers.ViTImageProcessor(size={"height": PIXELS, "width": PIXELS})
    trainer = SophonTrainer(tmp_path / "model", images(1), images(2), settings(tmp_path), processing_class=other)
    assert trainer.processing_class is other

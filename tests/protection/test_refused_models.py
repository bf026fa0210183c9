"""What cannot be protected is refused when the trainer is made, by a message that says what to do."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers
from classifiers import CASES, settings
from diffusers import UNet2DModel
from labelled_data import images, sentences, sounds, tokenizer, unet, wave_features
from points import TinyNet, make_points
from torch import nn

from sophon_hf import AttackSuite, SophonTrainer
from sophon_hf.cli.loading import look_for
from sophon_hf.hub.saving import check_loads_back
from sophon_hf.models.loading import load_model

BERT = next(case for case in CASES if case.family == "BertForSequenceClassification")
RESNET = next(case for case in CASES if case.family == "ResNetForImageClassification")
SPEECH = next(case for case in CASES if case.family.startswith("Wav2Vec2"))


def make(model: nn.Module, folder, data=make_points, **kwargs) -> SophonTrainer:
    changes = kwargs.pop("changes", {})
    return SophonTrainer(model, data(1), data(2), settings(folder, **changes), **kwargs)


WRAPPED = {
    "peft": (
        lambda: peft.get_peft_model(BERT.build(), peft.LoraConfig(target_modules=["query"])),
        r"is a PeftModel of peft: protect what `merge_and_unload\(\)` returns",
    ),
    "compiled": (lambda: torch.compile(TinyNet()), "model that torch.compile made it of: its `_orig_mod`, a TinyNet"),
    "scripted": (lambda: torch.jit.script(nn.Sequential(nn.Linear(8, 3))), "Pass the module that this .* was compiled"),
    "quantised": (lambda: torch.ao.quantization.quantize_dynamic(TinyNet(), {nn.Linear}), "TinyNet is quantised, and"),
    "meta": (lambda: TinyNet().to("meta"), "parameters on the device meta, which hold nothing"),
    "function": (lambda: lambda x: x, "A model is a Hub id, a folder or an nn.Module, not a function"),
    "parallel": (lambda: nn.DataParallel(TinyNet()), "the DataParallel was made of: its `module`, a TinyNet"),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_a_wrapped_model_is_refused_by_trainer_and_suite(kind, tmp_path):
    build, message = WRAPPED[kind]
    with pytest.raises((ValueError, TypeError), match=message):
        make(build(), tmp_path)
    with pytest.raises((ValueError, TypeError), match=message):
        AttackSuite("paper", tmp_path).run(
            protected=build(), original=build(), restricted_dataset=make_points(1), eval_dataset=make_points(2)
        )


def test_adapters_inside_a_model_are_refused(tmp_path):
    model = BERT.build()
    model.add_adapter(peft.LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match="has adapters of peft: load the model that they are merged into"):
        make(model, tmp_path, sentences, processing_class=tokenizer())


def test_a_folder_with_an_adapter_alone_is_refused_with_what_to_do(tmp_path):
    peft.get_peft_model(BERT.build(), peft.LoraConfig(target_modules=["query"])).save_pretrained(tmp_path)
    for read in (load_model, lambda folder: look_for(str(folder), on_hub=False)):
        with pytest.raises(ValueError, match=r"holds an adapter of peft for .* save what its `merge_and_unload\(\)`"):
            read(tmp_path)


def test_a_model_of_which_only_the_head_trains_is_refused_for_new_heads(tmp_path):
    model = TinyNet().requires_grad_(False)
    model.head.requires_grad_(True)
    with pytest.raises(ValueError, match="Only the head 'head' of the model is trainable"):
        make(model, tmp_path)
    space = {"batch_sizes": [8], "initializations": ["direct"], "learning_rates": [1e-3]}
    make(model, tmp_path, changes={"strategy_space": space})


def test_a_model_that_was_changed_after_it_was_made_is_refused(tmp_path):
    model = RESNET.build()
    model.classifier.append(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"changed after it was made: .*differs \(classifier.2.weight"):
        make(model, tmp_path, images)


def test_a_model_that_does_not_load_back_is_refused(tmp_path):
    model = RESNET.build()
    model.classifier[1] = nn.Linear(16, 5)  # Its configuration says 3.
    with pytest.raises(ValueError, match="ResNetForImageClassification cannot be loaded back after it is saved"):
        make(model, tmp_path, images)


@pytest.mark.parametrize("build", [RESNET.build, unet])
def test_a_large_model_that_was_changed_is_refused_without_a_second_copy(build):
    model = build()
    one = nn.Linear(1, 1)
    one.weight = nn.Parameter(torch.zeros(1, 1).expand(2**15, 2**14))  # Counts as 2 GiB and holds 4 bytes.
    name = "head" if isinstance(model, UNet2DModel) else "classifier"
    model.add_module(name, nn.Sequential(nn.Flatten(), nn.Linear(16, 3), one))
    with pytest.raises(ValueError, match=rf"changed after it was made: .*differs \(.*{name}.2.weight"):
        check_loads_back(model)


def test_a_large_model_as_its_configuration_makes_it_is_not_refused():
    model = BERT.build()
    model.config.vocab_size = 2**25 + 1
    model.bert.embeddings.word_embeddings.weight = nn.Parameter(torch.zeros(1, 16).expand(2**25 + 1, 16))
    check_loads_back(model)


def test_a_step_that_fails_in_training_mode_is_tried_before_any_work(tmp_path):
    """Batch norm has no variance of one example; in evaluation mode it needs none."""
    with pytest.raises(ValueError, match="fails at a step of 'direct.*in training mode, with a batch of 1 "):
        make(TinyNet(), tmp_path, changes={"strategy_space": {"batch_sizes": [1], "learning_rates": [1e-3]}})


def test_clips_that_are_too_short_for_spec_augment_are_refused(tmp_path):
    case = {**SPEECH.config, "mask_time_prob": 0.5, "mask_time_length": 60}
    torch.manual_seed(0)
    model = transformers.Wav2Vec2ForSequenceClassification(transformers.Wav2Vec2Config(num_labels=3, **case))
    with pytest.raises(ValueError, match="fails at a step of .* in training mode.*mask_length"):
        make(model, tmp_path, sounds, processing_class=wave_features())


def test_the_trial_leaves_the_model_as_it_was(tmp_path):
    torch.manual_seed(0)
    model = TinyNet()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    make(model, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_gradient_checkpointing_that_is_spelled_otherwise_is_refused(tmp_path):
    space = {"batch_sizes": [8], "initializations": ["direct"]}
    changes = {"gradient_checkpointing": True, "strategy_space": space}
    with pytest.raises(ValueError, match=r"UNet2DModel: call its `enable_gradient_checkpointing\(\)`, and leave"):
        make(unet(), tmp_path, images, changes=changes)
    with pytest.raises(ValueError, match="in a TinyNet: leave `gradient_checkpointing` off"):
        make(TinyNet(), tmp_path, changes={"gradient_checkpointing": True})


def test_a_size_that_only_the_configuration_names_is_no_reason_to_refuse(tmp_path):
    """DINOv2 says 518 pixels, and takes any that its patches fill."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 8}
    model = transformers.Dinov2ForImageClassification(transformers.Dinov2Config(num_labels=3, mlp_ratio=2, **sizes))
    processor = transformers.ViTImageProcessor(size={"height": 16, "width": 16})
    trainer = make(model, tmp_path, images, processing_class=processor)
    assert trainer.structure.head == "classifier"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("num_train_epochs", 5), ("data_seed", 3), ("train_sampling_strategy", "sequential")),
        *(("dataloader_drop_last", True), ("prediction_loss_only", True), ("eval_accumulation_steps", 2)),
        *(("batch_eval_metrics", True), ("use_liger_kernel", True)),
    ],
)
def test_an_argument_that_would_change_nothing_is_refused(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"{name} is {value!r}, but would change nothing: leave it out; "):
        settings(tmp_path, **{name: value})


@pytest.mark.parametrize("name", ["torch_compile_backend", "torch_compile_mode"])
def test_compilation_that_comes_in_by_another_argument_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="torch_compile compiles what the Trainer wraps"):
        settings(tmp_path, **{name: "eager"})


@pytest.mark.parametrize("name", ["predict", "get_eval_dataloader", "get_test_dataloader", "hyperparameter_search"])
def test_a_method_that_knows_of_one_data_set_is_refused(name):
    with pytest.raises(NotImplementedError, match=f"{name}.*measures any data"):
        getattr(SophonTrainer, name)(None)

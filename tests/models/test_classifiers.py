"""Classifiers out of the ordinary: two heads, cosine heads, fused attention, padding, and what is refused by name."""

from __future__ import annotations

import copy

import datasets
import pytest
import torch
import transformers
from attacked import NEW_HEAD, make_suite
from classifiers import CASES, protect, settings
from labelled_data import images, sentences, tokenizer
from torch import nn
from torch.nn import functional as F

from sophon_hf import FineTuningStrategy, SophonTrainer
from sophon_hf.data.domain import build_domain
from sophon_hf.finetuning.initialization import initialize
from sophon_hf.finetuning.loop import FineTuning
from sophon_hf.models.loading import load_model
from sophon_hf.tasks.base import infer_task
from sophon_hf.tasks.evaluation import evaluate_model


def with_teacher() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "intermediate_size": 32, "num_labels": 3}
    config = transformers.DeiTConfig(num_hidden_layers=2, num_attention_heads=2, **sizes)
    return transformers.DeiTForImageClassificationWithTeacher(config)


def gpt2(**changes) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 12, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 20, "num_labels": 3}
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **changes}
    return transformers.GPT2ForSequenceClassification(transformers.GPT2Config(**sizes, **tokens))


class Cosine(nn.Module):
    """A head of its own class: the cosines between features and one direction a class."""

    def __init__(self, features: int, classes: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, features))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.normalize(x), F.normalize(self.weight))


class Net(nn.Module):
    def __init__(self, head: nn.Module, bias: bool = False):
        super().__init__()
        self.body, self.head, self.scale = nn.Linear(6, 8), head, nn.Parameter(torch.tensor(5.0))
        self.bias = nn.Parameter(torch.zeros(3)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.scale * self.head(torch.tanh(self.body(x)))
        return logits if self.bias is None else logits + self.bias


class Attention(nn.Module):
    """torch's own transformer layers, which fuse their weights in evaluation."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(6, 16), nn.Linear(16, 3)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.embed(x)).mean(dim=1))


# Heads.


@pytest.mark.parametrize("classes", [3, 5])
def test_both_heads_of_a_model_with_a_teacher_are_replaced(classes):
    model, batch = with_teacher().eval(), {"pixel_values": torch.randn(4, 3, 16, 16)}
    task = infer_task(model)
    structure = task.structure(model, batch)
    assert set(structure.heads) == {"cls_classifier", "distillation_classifier"}
    old = [model.cls_classifier, model.distillation_classifier]
    new = initialize(model, FineTuningStrategy("new_head"), structure, classes)
    assert len(new) == 4
    prediction = task.predict(model, batch)
    assert prediction.shape == (4, classes)
    with torch.no_grad():
        for head in old:
            head.weight.fill_(7)  # Nothing of an old head has a say any more.
    assert torch.equal(task.predict(model, batch), prediction)


def test_a_model_with_a_teacher_is_protected_and_put_back(tmp_path):
    model = with_teacher()
    processor = transformers.ViTImageProcessor(size={"height": 16, "width": 16})
    trainer = protect(model, images(1), images(2), tmp_path, processing_class=processor)
    assert not trainer.unmoved
    assert model.cls_classifier.out_features == model.distillation_classifier.out_features == 3


@pytest.mark.parametrize("classes", [3, 5])
def test_a_cosine_head_is_found_and_replaced(classes):
    model, batch = Net(Cosine(8, 3)), {"x": torch.randn(4, 6)}
    task, old = infer_task(model), model.head.weight
    structure = task.structure(model, batch)
    assert structure.heads == ("head",)
    assert initialize(model, FineTuningStrategy("new_head"), structure, classes) >= {"head.weight"}
    assert task.predict(model, batch).shape == (4, classes)
    assert isinstance(model.head, Cosine if classes == 3 else nn.Linear)
    assert model.head.weight is not old


def test_a_parameter_for_each_class_beside_the_head_is_refused():
    model, batch = Net(nn.Linear(8, 3), bias=True), {"x": torch.randn(4, 6)}
    with pytest.raises(ValueError, match=r"'bias' of shape \(3,\) makes the prediction beside the head"):
        infer_task(model).structure(model, batch)


# Adapters.


def adapted(
    model: nn.Module, batch: dict, adapter: str, steps: int = 20, rank: int = 4
) -> tuple[FineTuning, list[float]]:
    task = infer_task(model)
    strategy = FineTuningStrategy("new_head", adapter=adapter, rank=rank, learning_rate=0.02)
    structure = task.structure(model, batch)
    torch.manual_seed(0)
    tuning = FineTuning(model, task, strategy, [batch] * steps, steps, structure=structure, num_classes=3)
    return tuning, [float(update.loss) for update in tuning]


@pytest.mark.parametrize("adapter", ["lora", "rslora", "dora", "adalora", "ia3"])
def test_adapters_go_to_the_layers_of_gpt2(adapter):
    batch = {"input_ids": torch.randint(1, 12, (6, 5)), "labels": torch.arange(6) % 3}
    tuning, losses = adapted(gpt2(pad_token_id=0), batch, adapter)
    assert all(parameter.grad is not None for parameter in tuning.parameters)
    assert len(tuning.parameters) > 2 * 4 and losses[-1] < losses[0]


class LayerDrop(nn.Module):
    """Leaves a layer out of each training step."""

    def __init__(self):
        super().__init__()
        self.body, self.dropped, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        hidden = self.body(x)
        return self.head(hidden if self.training else self.dropped(hidden))


@pytest.mark.parametrize(("rank", "steps"), [(4, 1), (1, 6), (4, 6)])
def test_adalora_allots_ranks_however_few_and_in_however_few_steps(rank, steps):
    model, batch = LayerDrop(), {"x": torch.randn(6, 6), "labels": torch.arange(6) % 3}
    _, losses = adapted(model, batch, "adalora", steps, rank)
    assert len(losses) == steps and losses[-1] <= losses[0]
    values = torch.cat([p.detach() for name, p in model.named_parameters() if "body.lora_E" in name])
    assert values.count_nonzero() == min(2 * rank, len(values)), "what the other layer would waste"


@pytest.mark.parametrize("adapter", ["lora", "dora", "ia3"])
def test_adapters_of_torchs_own_attention_count_in_evaluation_too(adapter):
    torch.manual_seed(0)
    model, batch = Attention(), {"x": torch.randn(6, 4, 6), "labels": torch.arange(6) % 3}
    tuning, losses = adapted(model, batch, adapter)
    assert all(parameter.grad is not None for parameter in tuning.parameters), "no adapter that does nothing"
    assert losses[-1] < losses[0]
    model.eval()
    with torch.no_grad():
        fused = model(batch["x"])  # Without gradients torch takes its fused path.
    torch.testing.assert_close(fused, model(batch["x"]).detach(), rtol=1e-3, atol=1e-4)
    attention = model.encoder.layers[0].self_attn
    assert (type(attention) is not nn.MultiheadAttention) == (adapter == "lora")


def test_an_adapter_without_a_gradient_is_an_error():
    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.body(x).detach())

    batch = {"x": torch.randn(6, 6), "labels": torch.arange(6) % 3}
    with pytest.raises(ValueError, match="No gradient reaches what 'new head, lora 4"):
        adapted(Detached(), batch, "lora")


# Padding.


@pytest.mark.parametrize("known", [None, 9])
def test_a_metric_does_not_depend_on_the_batch_size(tmp_path, known):
    """GPT-2 reads off the last token that is not padding: its own, where tokenizer and configuration disagree."""
    model = gpt2(pad_token_id=known)
    trainer = SophonTrainer(model, sentences(1), sentences(2), settings(tmp_path), processing_class=tokenizer())
    assert model.config.pad_token_id == (0 if known is None else known)
    values = [evaluate_model(trainer.task, model, trainer.domains["original"], size) for size in (1, 5, 40)]
    assert [v.metric for v in values] == [values[0].metric] * 3
    assert [v.loss for v in values] == pytest.approx([values[0].loss] * 3, rel=1e-5)


@pytest.mark.parametrize("known", [None, 9])
def test_trainer_and_suite_measure_the_same(tmp_path, known):
    """Both models are read from folders whose tokenizer pads with another token than the model knows."""
    for name in ("protected", "original"):
        gpt2(pad_token_id=known).save_pretrained(tmp_path / name)
        tokenizer().save_pretrained(tmp_path / name)
    held_out = {"original": sentences(3), "restricted": sentences(4)}
    trainer = SophonTrainer(
        str(tmp_path / "original"), sentences(1), sentences(2), settings(tmp_path / "out"), eval_dataset=held_out
    )
    texts = sentences(5, 96)
    unlike = texts.select(sorted({text: i for i, text in enumerate(texts["text"])}.values()))
    suite = make_suite(tmp_path / "attacks", [NEW_HEAD.with_changes(epochs=1)], seeds=[0], measured_epochs=[0])
    results = suite.run(
        protected=str(tmp_path / "protected"),
        original=str(tmp_path / "original"),
        restricted_dataset=unlike.select(range(40)),
        eval_dataset=unlike.select(range(40, len(unlike))),
        original_eval_dataset=sentences(3),
    )
    assert not any(run.failed for run in results.runs)
    assert results.original_metric["original"] == trainer.evaluate()["eval_original_accuracy"]


def test_sentences_without_a_mask_get_one():
    case = next(case for case in CASES if case.family == "BertForSequenceClassification")
    model = case.build().eval()
    ready = datasets.Dataset.from_dict({"input_ids": [[2, 3], [4, 5, 6, 7, 8]], "label": [0, 1]})
    task = infer_task(model)
    domain = build_domain(ready, task.inputs(model))
    with torch.no_grad():
        together = task.predict(model, domain.rows(torch.arange(2)))[0]
        alone = task.predict(model, domain.rows(torch.arange(1)))[0]
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_sounds_without_a_mask_are_filled_up_alike_in_every_batch():
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(1, 3)

        def forward(self, x):
            return self.head(x.mean(dim=1, keepdim=True))

    model = Mean()
    ready = datasets.Dataset.from_dict({"x": [[1.0, 2.0], [1.0, 2.0, 3.0, 4.0]], "label": [0, 1]})
    domain = build_domain(ready, infer_task(model).inputs(model))
    assert domain.rows(torch.arange(1))["x"].shape == (1, 4)


# Refusals.


@pytest.mark.parametrize("settings", [{"num_labels": 1}, {"problem_type": "regression"}])
def test_a_regression_is_refused_by_name(settings):
    case = next(case for case in CASES if case.family == "BertForSequenceClassification")
    config = copy.deepcopy(case.build().config)
    config.update(settings)
    with pytest.raises(ValueError, match="BertForSequenceClassification is a regression, which is not supported"):
        infer_task(transformers.BertForSequenceClassification(config))


def test_a_plain_module_with_one_output_is_refused():
    model = Net(nn.Linear(8, 1))
    with pytest.raises(ValueError, match="Net returns one number for an example: regression is not supported"):
        infer_task(model).structure(model, {"x": torch.randn(4, 6)})


def test_a_padding_token_that_was_agreed_on_is_saved(tmp_path):
    protect(gpt2(), sentences(1), sentences(2), tmp_path, processing_class=tokenizer())
    assert load_model(tmp_path).config.pad_token_id == 0

"""Where a model's head and blocks are."""

import pytest
import torch
from tiny_models import CLASSES, HEADS, MODELS, changed, make_batch, make_trained, state
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

from sophon_hf import ClassificationTask
from sophon_hf.models.structure import ModelStructure, find_structure
from sophon_hf.tasks.base import infer_task

ANATOMIES = {
    "plain": [f"layers.{i}" for i in range(3)],
    "resnet": [f"resnet.encoder.stages.{i}" for i in ("0.layers.0", "0.layers.1", "1.layers.0")],
    "vit": [f"vit.layers.{i}" for i in range(3)],
    "convnext": [f"convnext.encoder.stages.{i}" for i in ("0.layers.0", "1.layers.0", "1.layers.1")],
    "bert": [f"bert.encoder.layer.{i}" for i in range(2)],
    "unet": [
        "down_blocks.0.resnets.0",
        "down_blocks.1.resnets.0",
        "down_blocks.1.attentions.0",
        "mid_block.resnets.0",
        "mid_block.attentions.0",
        "mid_block.resnets.1",
        "up_blocks.0.resnets.0",
        "up_blocks.0.attentions.0",
        "up_blocks.0.resnets.1",
        "up_blocks.0.attentions.1",
        "up_blocks.1.resnets.0",
        "up_blocks.1.resnets.1",
    ],
}


@pytest.mark.parametrize("name", MODELS)
def test_head_and_blocks_are_found_and_the_model_is_left_alone(name):
    model = make_trained(name).train()
    before = state(model)
    structure = infer_task(model).structure(model, make_batch(model))
    assert (structure.head, structure.blocks) == (HEADS[name], tuple(ANATOMIES[name]))
    assert structure.outputs == (1 if name == "unet" else CLASSES)
    assert not changed(model, before)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_blocks_of_bottlenecks_in_stages_of_one_are_found():
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    model = ResNetForImageClassification(ResNetConfig(layer_type="bottleneck", num_labels=CLASSES, **sizes))
    structure = infer_task(model).structure(model, make_batch(model))
    assert structure.blocks == ("resnet.encoder.stages.0.layers.0", "resnet.encoder.stages.1.layers.0")


def test_a_model_without_repeated_units_has_no_blocks(model):
    structure = infer_task(model).structure(model, make_batch(model))
    assert structure == ModelStructure("head", (), 3)
    assert structure.last_blocks(0) == ()


def test_the_last_blocks_are_the_last_to_run():
    structure = ModelStructure("head", ("a", "b", "c"))
    assert [structure.last_blocks(n) for n in range(4)] == [(), ("c",), ("b", "c"), ("a", "b", "c")]


class HeadFirst(nn.Module):
    """Its modules are written down in another order than they run in, and a hidden layer is as wide as the head."""

    def __init__(self):
        super().__init__()
        self.out, self.hidden, self.body = nn.Linear(3, 3), nn.Linear(8, 3), nn.Linear(6, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.hidden(torch.tanh(self.body(x)))))


def test_the_head_is_the_last_layer_to_run():
    model, x = HeadFirst(), torch.randn(4, 6)
    assert find_structure(model, lambda: model(x)).head == "out"
    assert find_structure(model, lambda: model(x), head="hidden").head == "hidden"


class Recurrent(HeadFirst):
    """Its final layer runs once before another one of the same width, and once more after it."""

    def __init__(self):
        super().__init__()
        self.between = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.between(super().forward(x))))


def test_a_head_that_runs_twice_is_still_the_last_layer():
    model, x = Recurrent(), torch.randn(4, 6)
    assert find_structure(model, lambda: model(x)).head == "out"


def test_a_head_that_is_no_module_is_refused(model):
    with pytest.raises(ValueError, match="no module 'fc' that could be its head"):
        ClassificationTask(head="fc").structure(model, make_batch(model))


def test_a_prediction_that_no_layer_makes_is_refused(model):
    x = torch.randn(4, 6)
    with pytest.raises(ValueError, match="makes its prediction of 6 channels.*Pass its name to the task as `head`"):
        find_structure(model, lambda: model(x).repeat(1, 2))


def test_a_failing_model_is_left_as_it_was(model):
    model.train()
    with pytest.raises(RuntimeError):
        find_structure(model, lambda: model(torch.randn(4, 5)))
    assert model.training and model.norm.training
    assert not any(module._forward_hooks for module in model.modules())

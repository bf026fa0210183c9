"""What a fine-tuning re-initialises: the head, the last blocks, or everything."""

import math

import pytest
import torch
from tiny_models import CLASSES, HEADS, MODELS, Plain, changed, make_batch, make_trained, named, prepare, state
from torch import nn

from sophon_hf import ClassificationTask, FineTuningStrategy
from sophon_hf.finetuning.loop import FineTuning
from sophon_hf.models.structure import ModelStructure

LAST_BLOCKS = {
    "plain": ("layers.1.", "layers.2."),
    "resnet": ("resnet.encoder.stages.0.layers.1.", "resnet.encoder.stages.1.layers.0."),
    "vit": ("vit.layers.1.", "vit.layers.2."),
    "convnext": ("convnext.encoder.stages.1.layers.0.", "convnext.encoder.stages.1.layers.1."),
    "bert": ("bert.encoder.layer.0.", "bert.encoder.layer.1."),
    "unet": ("up_blocks.1.resnets.0.", "up_blocks.1.resnets.1."),
}


@pytest.mark.parametrize("name", MODELS)
def test_direct_changes_nothing(name):
    model = make_trained(name)
    before = state(model)
    assert prepare(model).reinitialized == set()
    assert not changed(model, before)


@pytest.mark.parametrize("blocks", (0, 1, 2))
@pytest.mark.parametrize("name", MODELS)
def test_a_new_head_and_new_blocks_change_themselves_only(name, blocks):
    model = make_trained(name)
    before = state(model)
    fine_tuning = prepare(model, initialization="new_head", reinitialized_blocks=blocks, transfer="head")
    prefixes = (HEADS[name] + ".", *LAST_BLOCKS[name][2 - blocks :])
    assert changed(model, before) == {n for n in before if n.startswith(prefixes)}
    assert fine_tuning.reinitialized == named(model, prefixes)
    new = {id(p) for n, p in model.named_parameters() if n.startswith(prefixes)}
    assert {id(p) for p in fine_tuning.parameters} == new


@pytest.mark.parametrize("name", MODELS)
def test_scratch_changes_everything(name):
    model = make_trained(name)
    before = state(model)
    fine_tuning = prepare(model, initialization="scratch")
    constant = {"bert.embeddings.position_ids", "bert.embeddings.token_type_ids"} & before.keys()
    assert changed(model, before) == before.keys() - constant
    assert fine_tuning.reinitialized == {n for n, _ in model.named_parameters()}


@pytest.mark.parametrize("name", MODELS)
def test_scratch_is_like_a_new_model(name):
    model = make_trained(name)
    prepare(model, initialization="scratch")
    fresh = state(MODELS[name]())
    for key, tensor in state(model).items():
        if not tensor.is_floating_point() or (tensor.numel() > 1 and fresh[key].std() == 0):
            assert torch.equal(tensor, fresh[key]), key
        elif tensor.numel() >= 64:
            assert 0.6 < tensor.std() / fresh[key].std() < 1.7, key
            assert abs(float(tensor.mean() - fresh[key].mean())) < float(fresh[key].std()), key


@pytest.mark.parametrize("name", MODELS)
def test_a_new_head_is_drawn_anew_and_is_like_that_of_a_new_model(name):
    heads = []
    for seed in (1, 1, 2):
        model = make_trained(name)
        torch.manual_seed(seed)
        prepare(model, initialization="new_head")
        heads.append(model.get_submodule(HEADS[name]).weight.detach())
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    fresh = torch.stack([MODELS[name]().get_submodule(HEADS[name]).weight.detach() for _ in range(5)])
    assert 0.5 < heads[0].std() / fresh.std() < 2


@pytest.mark.parametrize("initialization", ("new_head", "scratch"))
@pytest.mark.parametrize("name", [name for name in MODELS if name != "unet"])
def test_a_new_head_may_have_another_number_of_classes(name, initialization):
    model = make_trained(name)
    fine_tuning = prepare(model, num_classes=7, steps=2, initialization=initialization, learning_rate=0.01)
    assert model.get_submodule(HEADS[name]).out_features == 7
    assert f"{HEADS[name]}.weight" in fine_tuning.reinitialized
    losses = [float(update.loss) for update in fine_tuning]
    assert all(map(math.isfinite, losses))
    assert ClassificationTask().predict(model, make_batch(model)).shape == (6, 7)


def test_a_new_head_keeps_dtype_and_lack_of_bias(model):
    model.head = nn.Linear(16, 3, bias=False)
    model.double()
    for classes in (None, 3, 5):
        prepare(model, num_classes=classes, initialization="new_head")
        assert model.head.weight.dtype == torch.float64
        assert model.head.bias is None


def test_a_convolutional_head_cannot_change_its_outputs():
    with pytest.raises(ValueError, match="only a head that is one matrix can be replaced by one with 7"):
        prepare(make_trained("unet"), num_classes=7, initialization="new_head")


def test_more_blocks_than_there_are_cannot_be_new():
    with pytest.raises(ValueError, match="re-initialises 4 blocks, but the model has 3"):
        prepare(Plain(), initialization="new_head", reinitialized_blocks=4)


class WithToken(Plain):
    """A plain module with a parameter that nothing knows how to re-initialise."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.layers(self.stem(x) + self.token))


def test_a_parameter_that_cannot_be_made_new_is_named():
    with pytest.raises(ValueError, match="'WithToken'.*no `reset_parameters`"):
        prepare(WithToken(), initialization="scratch")


def test_blocks_can_be_new_although_another_part_cannot():
    model = WithToken()
    before = state(model)
    prepare(model, initialization="new_head", reinitialized_blocks=1)
    assert changed(model, before) >= named(model, ("layers.2.first.", "classifier.1."))
    assert torch.equal(model.token, before["token"])


class Named(nn.Module):
    """Its blocks have a layer that is called as the head is."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"body": nn.Linear(6, 6), "fc": nn.Linear(6, 6)}) for _ in range(2)])
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.tanh(block["fc"](block["body"](x)))
        return self.fc(x)


def test_a_new_block_is_new_throughout_though_a_layer_of_it_is_called_like_the_head():
    torch.manual_seed(0)
    model = Named()
    batch = {"x": torch.randn(4, 6), "labels": torch.arange(4) % CLASSES}
    before, structure = state(model), ModelStructure("fc", ("blocks.0", "blocks.1"))
    strategy = FineTuningStrategy(initialization="new_head", reinitialized_blocks=1)
    fine_tuning = FineTuning(model, ClassificationTask(), strategy, [batch], 1, structure=structure)
    assert changed(model, before) == fine_tuning.reinitialized == named(model, ("blocks.1.", "fc."))


class Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.TransformerEncoderLayer(6, 2, 8, batch_first=True) for _ in range(2)])
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x[:, None].repeat(1, 2, 1)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


def test_a_module_that_resets_its_children_has_the_last_word():
    model = Attentive()
    batch = {"x": torch.randn(4, 6), "labels": torch.tensor([0, 1, 2, 0])}
    structure = ClassificationTask().structure(model, batch)
    with torch.no_grad():
        model.layers[1].self_attn.out_proj.bias.add_(1)
    strategy = FineTuningStrategy(initialization="new_head", reinitialized_blocks=1)
    FineTuning(model, ClassificationTask(), strategy, [batch], 1, structure=structure)
    # `nn.MultiheadAttention` makes this bias zero, after its output layer has drawn it at random.
    assert not model.layers[1].self_attn.out_proj.bias.any()

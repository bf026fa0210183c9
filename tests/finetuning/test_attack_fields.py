"""What only an attack does while it fine-tunes: original data, the head first, lower rates, moved images, averages."""

from __future__ import annotations

import copy

import pytest
import torch
from pairs import ResidualNet
from points import TinyNet, make_points
from torch.nn import functional as F

from sophon_hf import FineTuningStrategy
from sophon_hf.data.batches import Stream
from sophon_hf.data.domain import build_domain
from sophon_hf.finetuning.loop import FineTuning, augmented
from sophon_hf.finetuning.preparations import DISTILLATION_STEPS, prepare_model
from sophon_hf.finetuning.strategy import NotApplicableError
from sophon_hf.tasks.base import infer_task

SGD = FineTuningStrategy(optimizer="sgd", learning_rate=0.1, batch_size=20)


def points_batch(seed: int, count: int = 20) -> dict:
    points = make_points(seed, count)
    return {"x": torch.tensor(points["x"]), "labels": torch.tensor(points["label"])}


def tune(model, strategy, batches, steps: int, **settings) -> FineTuning:
    task = infer_task(model)
    structure = task.structure(model, batches[0])
    return FineTuning(model, task, strategy, batches, steps, structure=structure, **settings)


def net() -> TinyNet:
    torch.manual_seed(0)
    return TinyNet(batch_norm=False)


@pytest.mark.parametrize("start", ["direct", "new_head"])
def test_original_data_in_a_step_add_their_weighted_gradient_through_the_models_own_head(start):
    model, strategy = net(), SGD.with_changes(initialization=start, original_weight=0.3)
    batch, original = points_batch(1), points_batch(2)
    own, fine_tuning = model.head, tune(model, strategy, [batch], 1, original=[original])
    expected, own_copy = copy.deepcopy(model), copy.deepcopy(own)
    list(fine_tuning)

    features = torch.tanh(expected.body(original["x"]))
    head = expected.head if start == "direct" else own_copy
    loss = F.cross_entropy(expected(batch["x"]), batch["labels"])
    (loss + 0.3 * F.cross_entropy(head(features), original["labels"])).backward()
    moved = {"body": (model.body, expected.body), "own head": (own, head), "head": (model.head, expected.head)}
    for actual, reference in moved.values():
        torch.testing.assert_close(actual.weight, reference.weight - 0.1 * reference.weight.grad)
    assert (model.head is own) == (start == "direct"), "predictions are the new head's"


def test_original_data_that_are_missing_are_said():
    with pytest.raises(NotApplicableError, match="needs data of the original domain, and none was given"):
        tune(net(), SGD.with_changes(original_weight=1), [points_batch(1)], 1)


def test_the_head_learns_first_then_all():
    model, batch = net(), points_batch(1)
    body, head = model.body.weight.detach().clone(), model.head.weight.detach().clone()
    for update in tune(model, SGD.with_changes(head_first=0.5, optimizer="adam", weight_decay=0.1), [batch] * 4, 4):
        assert torch.equal(model.body.weight, body) == (update.step <= 2)
        assert not torch.equal(model.head.weight, head)


def residual_net() -> ResidualNet:
    torch.manual_seed(0)
    return ResidualNet(4, (4, 4, 4))


def images(count: int = 8, side: int = 16) -> dict:
    generator = torch.Generator().manual_seed(0)
    return {
        "pixel_values": torch.rand(count, 3, side, side, generator=generator),
        "labels": torch.arange(count) % 4,
    }


def test_lower_layers_learn_with_lower_rates():
    steps = {}
    for decay in (1.0, 0.5):
        model = residual_net()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        list(tune(model, SGD.with_changes(layer_decay=decay), [images()], 1))
        steps[decay] = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    factors = {"head": 1, "stages.2": 0.5, "stages.1": 0.25, "stages.0": 0.125, "stem": 0.0625}
    for name, step in steps[0.5].items():
        factor = next(value for part, value in factors.items() if name.startswith(f"{part}."))
        torch.testing.assert_close(step, factor * steps[1.0][name], atol=1e-7, rtol=1e-3)


def test_moved_images_are_crops_of_the_reflected_image_or_of_its_mirror():
    batch, seen = images(40), set()
    torch.manual_seed(0)
    moved = augmented(batch)
    assert torch.equal(moved["labels"], batch["labels"])
    padded = F.pad(batch["pixel_values"], (2, 2, 2, 2), mode="reflect")
    for image, whole in zip(moved["pixel_values"], padded, strict=True):
        crops = {(top, left): whole[:, top : top + 16, left : left + 16] for top in range(5) for left in range(5)}
        places = [(*place, False) for place, crop in crops.items() if torch.equal(image, crop)]
        places += [(*place, True) for place, crop in crops.items() if torch.equal(image, crop.flip(-1))]
        assert len(places) == 1
        seen.add(places[0])
    assert len(seen) > 20 and {mirrored for *_, mirrored in seen} == {False, True}


def test_what_is_no_image_cannot_be_moved():
    with pytest.raises(NotApplicableError, match="one image an example"):
        augmented(points_batch(1))


def test_the_average_of_the_weights_is_what_an_attack_ends_with():
    model, decay, weights = net(), 0.3, []
    fine_tuning = tune(model, SGD.with_changes(ema=decay), [points_batch(s) for s in range(6)], 6)
    for _ in fine_tuning:
        weights.append(model.body.weight.detach().clone())
    expected = weights[0]
    for count, weight in enumerate(weights[1:], 1):
        kept = min(decay, (1 + count) / (10 + count))
        expected = kept * expected + (1 - kept) * weight
    torch.testing.assert_close(fine_tuning.result.body.weight, expected)
    assert fine_tuning.result is not model and not torch.equal(expected, weights[-1])


def test_distilling_teaches_a_new_model_what_the_given_one_predicts():
    model, points = net(), make_points(3, 200)
    task = infer_task(model)
    original = build_domain(points, task.inputs(model), name="original")
    taught = copy.deepcopy(model)
    torch.manual_seed(5)
    strategy = FineTuningStrategy(preparation="distill", learning_rate=1e-2)
    prepare_model(taught, task, strategy, original, original, seed=0)
    rows = original.rows(torch.arange(200))
    agreed = (model(rows["x"]).argmax(1) == taught(rows["x"]).argmax(1)).float().mean()
    right = (taught(rows["x"]).argmax(1) == rows["labels"]).float().mean()
    assert agreed > 0.9 > 0.6 > right, "it has learned the teacher, not the labels"
    assert F.cosine_similarity(model.body.weight.flatten(), taught.body.weight.flatten(), dim=0) < 0.5
    assert DISTILLATION_STEPS * strategy.batch_size > len(Stream(original, task.collate, 0).indices)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"original_weight": -1}, "original_weight is -1.0, but must be finite and lie between 0 and inf"),
        ({"head_first": 1.5}, "head_first is 1.5, but must be finite and lie between 0 and 1"),
        ({"layer_decay": 0}, "layer_decay is 0.0, but must be positive"),
        ({"ema": 2}, "ema is 2.0"),
        ({"augmentation": "flips"}, "augmentation is 'flips', but must be one of flips_and_crops"),
        ({"head_first": 0.5, "transfer": "head"}, "go with transfer 'all' and no adapter"),
        ({"layer_decay": 0.5, "adapter": "lora"}, "go with transfer 'all' and no adapter"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        FineTuningStrategy(**fields)

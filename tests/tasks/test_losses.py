"""The suppression losses against the paper's formulas, and at the ends of their range."""

import math

import pytest
import torch

from sophon_hf.tasks.losses import (
    denial_of_service,
    information_maximization,
    inverse_cross_entropy,
    kl_from_uniform,
    negated_cross_entropy,
    negated_mse,
)

CLASS_COUNTS = (2, 3, 10, 1000)


def make_logits(classes: int, batch: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(classes)
    logits = 2 * torch.randn(batch, classes, dtype=torch.float64, generator=generator)
    return logits.requires_grad_(), torch.randint(classes, (batch,), generator=generator)


def softmax(logits: torch.Tensor) -> list[list[float]]:
    rows = [[math.exp(z) for z in row] for row in logits.tolist()]
    return [[e / sum(row) for e in row] for row in rows]


def gradient(loss: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, logits)[0]


def close(actual: torch.Tensor, expected, **tolerance) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), **tolerance)


@pytest.mark.parametrize("classes", CLASS_COUNTS)
def test_values_are_those_of_the_naive_formulas(classes):
    logits, labels = make_logits(classes)
    p = softmax(logits)
    batch = len(p)
    ice = -sum(math.log(1 - row[y]) for row, y in zip(p, labels.tolist())) / batch
    cross_entropy = -sum(math.log(row[y]) for row, y in zip(p, labels.tolist())) / batch
    exact = {"rtol": 1e-12, "atol": 1e-13}
    close(inverse_cross_entropy(logits, labels), ice, **exact)
    close(negated_cross_entropy(logits, labels), -cross_entropy, **exact)


@pytest.mark.parametrize("classes", CLASS_COUNTS)
def test_klu_has_the_value_of_equation_13_in_float64(classes):
    logits, _ = make_logits(classes)
    p = softmax(logits)
    klu = -sum(math.log(classes * q) / classes for row in p for q in row) / len(p)
    close(kl_from_uniform(logits), klu, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("classes", CLASS_COUNTS)
def test_information_maximization_is_the_entropy_within_minus_the_entropy_between(classes):
    logits, _ = make_logits(classes)

    def entropy(p: list[float]) -> float:
        return -sum(q * math.log(q) for q in p)

    rows = softmax(logits)
    mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    expected = sum(map(entropy, rows)) / len(rows) - entropy(mean)
    close(information_maximization(logits), expected)


def test_values_of_the_losses_of_diffusion():
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64, generator=generator)
    squares = [sum(v * v for v in image) for image in prediction.flatten(1).tolist()]
    errors = [(a - b) ** 2 for a, b in zip(prediction.flatten().tolist(), target.flatten().tolist())]
    close(denial_of_service(prediction, target), sum(squares) / 3, rtol=1e-12, atol=0)
    close(denial_of_service(prediction), sum(squares) / 3, rtol=1e-12, atol=0)
    close(negated_mse(prediction, target), -sum(errors) / len(errors), rtol=1e-12, atol=0)


@pytest.mark.parametrize("classes", CLASS_COUNTS)
def test_the_gradient_of_ice_is_equation_12(classes):
    logits, labels = make_logits(classes)
    p = softmax(logits)
    expected = [
        [p_i if i == y else -p_i * row[y] / (1 - row[y]) for i, p_i in enumerate(row)]
        for row, y in zip(p, labels.tolist())
    ]
    actual = gradient(inverse_cross_entropy(logits, labels), logits) * len(p)
    close(actual, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("classes", CLASS_COUNTS)
def test_the_gradient_of_klu_is_equation_14(classes):
    logits, _ = make_logits(classes)
    p = softmax(logits)
    expected = [[p_i - 1 / classes for p_i in row] for row in p]
    close(gradient(kl_from_uniform(logits), logits) * len(p), expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("classes", CLASS_COUNTS)
def test_the_gradient_of_the_negated_cross_entropy_is_minus_equation_10(classes):
    logits, labels = make_logits(classes)
    p = softmax(logits)
    expected = [[(i == y) - p_i for i, p_i in enumerate(row)] for row, y in zip(p, labels.tolist())]
    close(gradient(negated_cross_entropy(logits, labels), logits) * len(p), expected, rtol=1e-10, atol=1e-14)


def test_the_gradients_of_the_losses_of_diffusion():
    prediction, target = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    prediction.requires_grad_()
    size = prediction.numel()
    close(gradient(denial_of_service(prediction, target), prediction), 2 * prediction.detach() / 3)
    close(gradient(negated_mse(prediction, target), prediction), -2 * (prediction.detach() - target) / size)


def extreme_logits(classes: int, dtype: torch.dtype, sign: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The label's logit at `sign * 1e4`, all others at the opposite end; the last value is their distance."""
    labels = torch.tensor([0, classes - 1])
    logits = torch.full((2, classes), -sign * 1e4, dtype=dtype)
    logits[torch.arange(2), labels] = sign * 1e4
    return logits.requires_grad_(), labels, 2 * float(logits.detach().max())


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("classes", CLASS_COUNTS)
def test_certain_and_right_predictions_are_exact(classes, dtype):
    logits, labels, distance = extreme_logits(classes, dtype, 1)
    ice, klu = inverse_cross_entropy(logits, labels), kl_from_uniform(logits)
    assert ice.dtype == klu.dtype == torch.float32
    close(ice, distance - math.log(classes - 1), rtol=1e-6, atol=0)
    close(klu, distance * (classes - 1) / classes - math.log(classes), rtol=1e-6, atol=0)
    of_label = torch.nn.functional.one_hot(labels, classes).bool()
    # Two neighbouring float32 numbers at 1e4 lie 1e-3 apart, and a difference of logits is an exponent here.
    rtol = 1e-3 if dtype == torch.float32 else 1e-2
    expected = torch.full((2, classes), -1 / (classes - 1)).masked_fill(of_label, 1.0) / 2
    close(gradient(ice, logits), expected, rtol=rtol, atol=1e-7)
    expected = torch.full((2, classes), -1 / classes).masked_fill(of_label, 1 - 1 / classes) / 2
    close(gradient(klu, logits), expected, rtol=rtol, atol=1e-7)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("classes", CLASS_COUNTS)
def test_certain_and_wrong_predictions_are_exact(classes, dtype):
    logits, labels, distance = extreme_logits(classes, dtype, -1)
    ice, klu = inverse_cross_entropy(logits, labels), kl_from_uniform(logits)
    assert ice == 0
    assert not gradient(ice, logits).any()
    uniform_rest = distance / classes + math.log(classes - 1) - math.log(classes)
    close(klu, uniform_rest, rtol=1e-5, atol=0)
    assert gradient(klu, logits).isfinite().all()
    close(negated_cross_entropy(logits, labels), -distance - math.log(classes - 1), rtol=1e-6, atol=0)


def test_ice_keeps_its_digits_where_p_is_tiny():
    margins = torch.tensor([5.0, 20.0, 40.0, 80.0])
    for margin in margins:
        value = inverse_cross_entropy(torch.stack([-margin, margin * 0])[None], torch.tensor([0]))
        close(value, math.log1p(math.exp(-float(margin))), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("classes", CLASS_COUNTS)
def test_klu_is_zero_where_the_prediction_is_uniform(classes, dtype):
    logits = torch.full((3, classes), 7.0, dtype=dtype)
    assert abs(float(kl_from_uniform(logits))) < 8 * torch.finfo(dtype).eps * math.log(2 * classes)


def test_denial_of_service_of_half_precision_does_not_overflow():
    prediction = torch.full((2, 3, 4, 4), 300.0, dtype=torch.float16)
    close(denial_of_service(prediction), 48 * 300.0**2)
    close(negated_mse(prediction, torch.zeros(2, 3, 4, 4)), -(300.0**2))


@pytest.mark.parametrize("loss", (inverse_cross_entropy, kl_from_uniform))
@pytest.mark.parametrize("shape", ((4, 1), (4,), (4, 3, 2)))
def test_logits_of_another_shape_are_refused(loss, shape):
    with pytest.raises(ValueError, match="at least 2 classes"):
        loss(torch.zeros(shape), torch.zeros(4, dtype=torch.int64))

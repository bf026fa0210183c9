"""Classification: any model that returns logits (image, text, audio, timm, a plain `nn.Module`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from sophon_hf.data.batches import Batch
from sophon_hf.data.preprocessing import ModelInputs
from sophon_hf.models.loading import forward_names, height_and_width, main_input, padding_id, unwrap
from sophon_hf.models.structure import ModelStructure, find_structure
from sophon_hf.tasks.losses import at_least_float32, inverse_cross_entropy, kl_from_uniform, negated_cross_entropy
from sophon_hf.tasks.metrics import MetricSource, load_metric


class ClassificationTask:
    """Learn class labels with cross-entropy; suppress them with ICE or KLU (section 4.3.1).

    Args:
        head: Name of the model's final layer, where it cannot be found by running the model.
        metric: "accuracy" (ACC-k), a module of `evaluate` that compares class indices, or what `load_metric` makes of
            one.

    Attributes:
        metric: The metric's name.
        greater_is_better: Whether a greater value of it is better.

    Raises:
        ValueError: The metric is unknown, or compares no predictions with references.
    """

    multi_label = False
    suppression_losses: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
        "inverse_cross_entropy": inverse_cross_entropy,
        "kl_from_uniform": kl_from_uniform,
        "negated_cross_entropy": negated_cross_entropy,
    }

    def __init__(self, head: str | None = None, metric: MetricSource = "accuracy"):
        self.head, self._metric = head, load_metric(metric)
        if not self._metric.needs_references:
            raise ValueError(f"The metric {self._metric.name!r} takes no references, so it measures no classifier.")
        if self._metric.multi_label != self.multi_label:
            kind = "multi-label" if self._metric.multi_label else "single-label"
            raise ValueError(f"The metric {self._metric.name!r} measures {kind} classifiers, and this one is none.")
        self.metric, self.greater_is_better = self._metric.name, self._metric.greater_is_better

    def inputs(self, model: nn.Module) -> ModelInputs:
        """Return what the model takes."""
        return ModelInputs(
            names=forward_names(model),
            main=main_input(model),
            labelled=True,
            multi_label=self.multi_label,
            # The first 2-d convolution takes the image.
            channels=next((m.in_channels for m in unwrap(model).modules() if isinstance(m, nn.Conv2d)), None),
            image_size=_fixed_size(model),
            longest=getattr(getattr(unwrap(model), "config", None), "max_position_embeddings", None),
            pad_token_id=padding_id(model),
            class_names=_class_names(model),
        )

    def structure(self, model: nn.Module, batch: Batch) -> ModelStructure:
        """Return head and blocks of the model, found by running it on `batch`."""
        return find_structure(unwrap(model), lambda: self.predict(model, batch), self.head)

    def collate(self, rows: Batch, seeds: list[int]) -> Batch:
        """Return the rows: a batch is nothing else. `seeds` is for tasks that add noise."""
        return rows

    def predict(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """Return logits, shape (batch, classes)."""
        output = model(**{name: value for name, value in batch.items() if name != "labels"})
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if logits is None and isinstance(output, Mapping):
            logits = output.get("logits")
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            raise ValueError(
                f"{type(unwrap(model)).__name__} returned {type(output).__name__} without logits of shape (batch, "
                "classes): a classifier must return them as a tensor or as `.logits`."
            )
        if logits.shape[1] < 2:
            raise ValueError(
                f"{type(unwrap(model)).__name__} returns one number for an example: regression is not supported, only "
                "classifiers with two outputs or more."
            )
        return logits

    def fits(self, labels: Tensor | None, outputs: int | None) -> bool:
        """Return whether a head of so many outputs has one for every label."""
        return labels is None or outputs is None or int(labels.max()) < outputs

    def target(self, batch: Batch) -> Tensor:
        """Return class indices, shape (batch,)."""
        return batch["labels"]

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the cross-entropy: what an adversary minimises, and L_beta of the original domain."""
        return F.cross_entropy(at_least_float32(prediction), target)

    def distance(self, prediction: Tensor, unprotected: Tensor) -> Tensor:
        """Return the KL divergence of the prediction from the unprotected model's, the mean over the batch."""
        ours, theirs = (at_least_float32(logits).log_softmax(dim=1) for logits in (prediction, unprotected))
        return F.kl_div(ours, theirs, log_target=True, reduction="batchmean")

    def scores(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return what the metric is computed from, one entry for each example."""
        # argmax of NaN is 0, which would give a broken model the accuracy of a guess.
        broken = ~prediction.isfinite().all(dim=1)
        return {"predictions": prediction.argmax(dim=1).masked_fill(broken, -1), "references": target}

    def compute_metric(self, scores: dict[str, list]) -> float:
        """Return the metric's value, such as ACC-k in [0, 1]."""
        return self._metric.compute(scores)


def _fixed_size(model: nn.Module) -> tuple[int, int] | None:
    """Return the one size that a model with position embeddings takes; convolutional networks take any."""
    config: Any = getattr(unwrap(model), "config", None)
    if any(getattr(config, name, None) is None for name in ("image_size", "patch_size", "num_attention_heads")):
        return None
    return height_and_width(config.image_size)


def _class_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the model's outputs, in their order; none where its configuration does not name all."""
    names = getattr(getattr(unwrap(model), "config", None), "id2label", None) or {}
    numbered = {int(number): str(name) for number, name in names.items()}
    return tuple(numbered[i] for i in range(len(numbered))) if set(numbered) == set(range(len(numbered))) else ()

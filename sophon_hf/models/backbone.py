"""A model without a head: what is published of it is the backbone, and whoever fine-tunes it brings a head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel


class NoHead(nn.Identity):
    """Stands where a head will be, and returns the features; what a head is made of follows from the last batch."""

    features: int | None = None

    def forward(self, features: Tensor) -> Tensor:
        """Return the features, shape (batch, parts, width)."""
        self.features = features[0].numel()
        return features

    def new(self, num_classes: int | None) -> nn.Module:
        """Return a linear head on all parts; none where no classes are asked for."""
        if num_classes is None or self.features is None:
            return NoHead()
        return nn.Sequential(nn.Flatten(), nn.Linear(self.features, num_classes))


class Backbone(nn.Module):
    """Pool what a model without a head returns, so that a head can be put on it.

    Features are, of tokens, the first one, the mean of all that are no padding, and what the model itself pools, where
    it does; of a feature map, its mean. What is not found here (`config`, `save_pretrained`, ...) is the model's own.

    Args:
        model: Returns `last_hidden_state`.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.head = model, NoHead()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    def from_config(self, config: Any) -> Backbone:
        """Return a newly initialised one."""
        return Backbone(type(self.model)(config))

    def forward(self, **inputs: Any) -> Tensor:
        """Return features, shape (batch, parts, width), or logits of a head, shape (batch, classes)."""
        output = self.model(**inputs)
        hidden, pooled = output.last_hidden_state, getattr(output, "pooler_output", None)
        if hidden.ndim == 4:
            return self.head(hidden.mean(dim=(2, 3))[:, None])
        mask = inputs.get("attention_mask")
        if mask is not None and mask.shape[1] != hidden.shape[1]:
            mask = self.model._get_feature_vector_attention_mask(hidden.shape[1], mask)  # type: ignore[operator]
        mask = torch.ones(hidden.shape[:2]) if mask is None else mask
        weights = mask.to(hidden)[:, :, None]
        parts = [hidden[:, 0], (weights * hidden).sum(dim=1) / weights.sum(dim=1)]
        return self.head(torch.stack(parts if pooled is None else [*parts, pooled], dim=1))


def with_head(model: nn.Module) -> nn.Module:
    """Return the model, as a `Backbone` where it is one of transformers that has no head.

    Raises:
        ValueError: It encodes pictures and text, say, each by itself.
    """
    _refuse_wrapped(model)
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel) or not is_backbone(name):
        return model
    towers = [child for child, part in model.named_children() if isinstance(part, PreTrainedModel)]
    if hasattr(model.config, "vision_config") and len(towers) > 1:
        raise ValueError(f"{name} has several towers: protect one by itself, such as its `{towers[-1]}`.")
    return Backbone(model)


def _refuse_wrapped(model: nn.Module) -> None:
    """Refuse a model that lies inside another module, has adapters beside its layers, or no weights to be trained.

    Raises:
        ValueError: It does; the message tells how to get at the model itself.
    """
    name = type(model).__name__
    if hasattr(model, "merge_and_unload"):
        raise ValueError(f"The model is a {name} of peft: protect what `merge_and_unload()` returns, a plain model.")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(f"This {name} has adapters of peft: load the model that they are merged into.")
    inner: Any = getattr(model, "_orig_mod", None)
    if isinstance(inner, nn.Module):
        raise ValueError(f"Pass the model that torch.compile made it of: its `_orig_mod`, a {type(inner).__name__}.")
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(f"Pass the module that this {name} was compiled from.")
    if getattr(model, "is_quantized", False) or any("quantized" in type(m).__module__ for m in model.modules()):
        raise ValueError(
            f"This {name} is quantised, and rounded weights cannot be protected: load it in full precision."
        )
    if any(values.is_meta for values in model.parameters()):
        raise ValueError(f"This {name} has parameters on the device meta, which hold nothing: load its weights first.")
    if isinstance(model, (nn.DataParallel, DistributedDataParallel)):
        inner = type(model.module).__name__
        raise ValueError(f"Pass the model that the {name} was made of: its `module`, a {inner}.")


def is_backbone(architecture: str) -> bool:
    """Return whether a class of transformers returns hidden states and no logits."""
    return architecture.endswith(("Model", "ModelWithProjection")) and "For" not in architecture


def library_model(model: nn.Module) -> nn.Module:
    """Return what the model's library saves and loads: the model, or what is inside a `Backbone`."""
    inner: Any = model.model if isinstance(model, Backbone) else model
    return inner

"""Find a model's head and blocks by running it once, so that it works for any model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sophon_hf.models.loading import evaluation_mode

_LINEAR = (nn.Linear, Conv1D)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONTAINERS = (nn.Sequential, nn.ModuleList)
NORMALISATIONS = (
    nn.modules.batchnorm._BatchNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.RMSNorm,
)


@dataclass(frozen=True)
class ModelStructure:
    """Name the parts of a model that fine-tuning strategies name.

    Attributes:
        head: Name of the final layer, which makes the prediction (the paper's "final FC layer").
        blocks: Names of the repeated units (residual blocks, transformer layers), in the order they run.
        outputs: Channels of the prediction: the classes that the head has outputs for.
    """

    head: str
    blocks: tuple[str, ...]
    outputs: int | None = None

    def last_blocks(self, count: int) -> tuple[str, ...]:
        """Return the names of the last `count` blocks.

        Raises:
            ValueError: The model has fewer.
        """
        if count > len(self.blocks):
            raise ValueError(
                f"The strategy re-initialises {count} blocks, but the model has {len(self.blocks)}. Blocks are "
                "repeated modules "
                f"of one class: set reinitialized_blocks to at most {len(self.blocks)} (in the strategy space a list, "
                "[0] where "
                "there are none)."
            )
        return self.blocks[len(self.blocks) - count :]


def find_structure(model: nn.Module, predict: Callable[[], Tensor], head: str | None = None) -> ModelStructure:
    """Run the model once and find its head and its blocks.

    The head is the last linear or convolutional layer to run whose output has as many channels as the prediction.
    A block is a repeated class with at least two weight layers; where such modules hold others in a container
    (a stage its blocks), the inner ones count.

    Args:
        model: The model, unwrapped.
        predict: Runs the model on one batch and returns its prediction, shape (batch, channels, ...).
        head: The head's name, where it is known.

    Raises:
        ValueError: No layer makes the prediction, or `head` is no module of the model.
    """
    order: list[str] = []
    channels: dict[str, int] = {}

    def watch(name: str) -> Callable:
        def hook(module: nn.Module, _: tuple, output: object) -> None:
            if name not in order:
                order.append(name)
            if isinstance(module, (*_LINEAR, *_CONVOLUTIONS)) and isinstance(output, Tensor):
                # A layer that runs several times counts where it ran last: the head may be one.
                order.remove(name)
                order.append(name)
                channels[name] = output.shape[-1] if isinstance(module, _LINEAR) else output.shape[1]

        return hook

    hooks = [m.register_forward_hook(watch(name)) for name, m in model.named_modules() if name]
    try:
        with torch.no_grad(), evaluation_mode(model):
            prediction = predict()
    finally:
        for hook in hooks:
            hook.remove()
    modules = dict(model.named_modules())
    if head is None:
        makers = [name for name in order if channels.get(name) == prediction.shape[1]]
        if not makers:
            raise ValueError(
                f"No linear or convolutional layer of {type(model).__name__} makes its prediction of "
                f"{prediction.shape[1]} channels, so the head cannot be found. Pass its name to the task as `head`; "
                f"the last layers are {[name for name in order if name in channels][-3:]}."
            )
        head = makers[-1]
    elif head not in modules:
        raise ValueError(
            f"The model has no module {head!r} that could be its head; it has {list(modules)[-5:]} and others."
        )
    blocks = [name for name in _blocks(modules) if name in order and not head.startswith(f"{name}.") and name != head]
    return ModelStructure(head, tuple(sorted(blocks, key=order.index)), prediction.shape[1])


def _blocks(modules: dict[str, nn.Module]) -> list[str]:
    classes = Counter(type(module) for module in modules.values())

    def is_candidate(module: nn.Module) -> bool:
        if isinstance(module, _CONTAINERS) or classes[type(module)] < 2:
            return False
        return sum(isinstance(m, (*_LINEAR, *_CONVOLUTIONS)) for m in module.modules()) >= 2

    def collect(name: str, module: nn.Module) -> list[str]:
        prefix = f"{name}." if name else ""
        inner = [
            f"{prefix}{sub}.{child}"
            for sub, container in module.named_modules()
            if sub and isinstance(container, _CONTAINERS)
            for child, element in container.named_children()
            if is_candidate(element)
        ]
        outermost = [n for n in inner if not any(n != other and n.startswith(f"{other}.") for other in inner)]
        if outermost:
            return [found for n in outermost for found in collect(n, modules[n])]
        if name and is_candidate(module):
            return [name]
        return [
            found
            for child, element in module.named_children()
            for found in (collect(f"{prefix}{child}", element) if element is not module else [])
        ]

    return collect("", modules[""])

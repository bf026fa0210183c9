"""Find a model's head and blocks by running it once, so that it works for any model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

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
        other_heads: Names of the layers that make it beside the head, as a head on a distillation token does.
        ran: Names of all modules that were called.
    """

    head: str
    blocks: tuple[str, ...]
    outputs: int | None = None
    other_heads: tuple[str, ...] = ()
    ran: frozenset[str] = field(default=frozenset(), compare=False, repr=False)

    @property
    def heads(self) -> tuple[str, ...]:
        """Return the names of all layers that make the prediction."""
        return (self.head, *self.other_heads)

    def last_blocks(self, count: int) -> tuple[str, ...]:
        """Return the names of the last `count` blocks.

        Raises:
            ValueError: The model has fewer.
        """
        if count > len(self.blocks):
            raise ValueError(
                f"The strategy re-initialises {count} blocks, but the model has {len(self.blocks)}. Blocks are "
                f"repeated modules of one class: set reinitialized_blocks to at most {len(self.blocks)} (in the "
                "strategy space a list, [0] where there are none)."
            )
        return self.blocks[len(self.blocks) - count :]


def find_structure(model: nn.Module, predict: Callable[[], Tensor], head: str | None = None) -> ModelStructure:
    """Run the model once and find its heads and its blocks.

    The heads are the layers with as many output channels as the prediction from which it is computed without another
    such layer in between. A prediction of more than two dimensions (noise, say) is made by the last layer to run.
    A block is a repeated class with at least two weight layers; where such modules hold others in a container
    (a stage its blocks), the inner ones count.

    Args:
        model: The model, unwrapped.
        predict: Runs the model on one batch and returns its prediction, shape (batch, channels, ...).
        head: The head's name, where it is known.

    Raises:
        ValueError: No layer makes the prediction, a parameter beside the heads has an entry for every class, or `head`
            is no module of the model.
    """
    # All modules in the order they ran; of layers with weights, output channels and place in the graph.
    ran: dict[str, tuple[int, Any] | None] = {}

    def watch(name: str, module: nn.Module, _: tuple, output: object) -> None:
        if isinstance(output, Tensor) and _has_weight(module):
            ran.pop(name, None)  # A layer that runs several times counts where it ran last: the head may be one.
            last = isinstance(module, _LINEAR) or (output.ndim < 4 and not isinstance(module, _CONVOLUTIONS))
            ran[name] = (output.shape[-1 if last else 1], output.grad_fn)
        else:
            ran.setdefault(name, None)

    hooks = [m.register_forward_hook(partial(watch, name)) for name, m in model.named_modules() if name]
    # What was frozen, too, has to show in the graph of the prediction.
    frozen = [p for p in model.parameters() if p.is_floating_point() and not p.requires_grad]
    try:
        with torch.enable_grad(), evaluation_mode(model):
            for parameter in frozen:
                parameter.requires_grad_()
            prediction = predict()
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for hook in hooks:
            hook.remove()
    modules, layers = dict(model.named_modules()), {name: found for name, found in ran.items() if found is not None}
    if head is not None and head not in modules:
        raise ValueError(
            f"The model has no module {head!r} that could be its head; it has {list(modules)[-5:]} and others."
        )
    if head is not None:
        heads = [head]
    else:
        heads = list(layers)[-1:] if prediction.ndim > 2 else _heads(model, prediction, layers)
    repeated = set(_blocks(modules))
    blocks = [n for n in ran if n in repeated and not any(f"{part}.".startswith(f"{n}.") for part in heads)]
    return ModelStructure(heads[-1], tuple(blocks), prediction.shape[1], tuple(heads[:-1]), frozenset(ran))


def _has_weight(module: nn.Module) -> bool:
    """Return whether a module is a layer with a weight matrix: one of torch's, or a leaf of the model's own."""
    if isinstance(module, (*_LINEAR, *_CONVOLUTIONS)):
        return True
    known = (*NORMALISATIONS, *_CONTAINERS, nn.Embedding)
    leaf = not isinstance(module, known) and not list(module.children())
    return leaf and any(p.ndim > 1 for p in module.parameters(recurse=False))


def _heads(model: nn.Module, prediction: Tensor, layers: dict[str, tuple[int, Any]]) -> list[str]:
    """Return the layers that make the prediction, in the order they ran."""
    makers = [name for name, (channels, _) in layers.items() if channels == prediction.shape[1]]
    if not makers:
        raise ValueError(
            f"No linear or convolutional layer of {type(model).__name__} makes its prediction of {prediction.shape[1]} "
            "channels, so the head cannot be found. Pass its name to the task as `head`; the last layers are "
            f"{list(layers)[-3:]}."
        )
    nodes = {layers[name][1]: name for name in makers if layers[name][1] is not None}
    reached, leaves = _reached(prediction.grad_fn, nodes)
    # One that feeds another head, too, is no head: the other one would go on from what it learned.
    fed = {name for node in reached for name in _reached(node, nodes, skip_first=True)[0].values()}
    heads = [name for name in makers if name in reached.values() and name not in fed] or makers[-1:]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for leaf in leaves:
        if id(leaf) in names and prediction.shape[1] in leaf.shape and nodes and prediction.shape[1] > 1:
            raise ValueError(
                f"The parameter {names[id(leaf)]!r} of shape {tuple(leaf.shape)} makes the prediction beside the head "
                f"{heads[-1]!r}, so a new head would not be a new one: put both in one module, and pass its name to "
                "the task as `head`."
            )
    return heads


def _reached(start: Any, nodes: dict[Any, str], skip_first: bool = False) -> tuple[dict[Any, str], list[Tensor]]:
    """Walk back from a node of the graph to the nearest of `nodes`, and to the parameters on other ways."""
    found, leaves, seen = {}, [], set()
    waiting = [start] if not skip_first else [node for node, _ in start.next_functions]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in nodes:
            found[node] = nodes[node]
        elif hasattr(node, "variable"):
            leaves.append(node.variable)
        else:
            waiting += [following for following, _ in node.next_functions]
    return found, leaves


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
        return [n for child, element in module.named_children() for n in collect(f"{prefix}{child}", element)]

    return collect("", modules[""])

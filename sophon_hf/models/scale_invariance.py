"""Layers whose scale the model's function does not depend on, since a normalisation follows.

Their norm only divides the effect of every gradient step, so it may hide what a model knows, but cannot take it away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sophon_hf.models.loading import evaluation_mode
from sophon_hf.models.sharding import copy_of, local, norm_of
from sophon_hf.models.structure import NORMALISATIONS

_UNCHANGED = 0.01


@torch.no_grad()
def scale_invariant_layers(model: nn.Module, predict: Callable[[], Tensor]) -> dict[nn.Module, list[nn.Module]]:
    """Return every layer that feeds a normalisation and nothing else, with the normalisations that it feeds.

    Found by running the model, and by trying: a layer whose output goes elsewhere too (to a skip connection, say) would
    change the prediction, and is left out.

    Args:
        model: Unwrapped; it is as before afterwards.
        predict: Runs it on one batch and returns its prediction.
    """
    invariant = {}
    with evaluation_mode(model):
        before = predict()
        for layer, norms in _layers_before_normalisations(model, predict).items():
            _scale(layer, norms, 2.0)  # A power of two, which is undone without rounding.
            if (predict() - before).norm() <= _UNCHANGED * before.norm():
                invariant[layer] = norms
            _scale(layer, norms, 0.5)
    return invariant


@torch.no_grad()
def fresh_norms(layers: Iterable[nn.Module]) -> dict[nn.Module, Tensor]:
    """Return the norm that each layer's weight has when it is newly initialised: a scalar, the same at every call."""
    norms = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for layer in layers:
            fresh: Any = copy_of(layer).cpu()
            fresh.reset_parameters()
            norms[layer] = fresh.weight.norm().to(next(layer.parameters()).device)
    return norms


@torch.no_grad()
def set_norm(layer: Any, norms: list[nn.Module], norm: float | Tensor) -> None:
    """Give a scale-invariant layer's weight another norm; running statistics after it move along."""
    _scale(layer, norms, norm / norm_of(layer.weight).clamp_min(1e-12))


def _scale(layer: Any, norms: list[nn.Module], factor: float | Tensor) -> None:
    local(layer.weight).mul_(factor)
    if layer.bias is not None:
        local(layer.bias).mul_(factor)
    for norm in norms:
        # Running statistics of the layer's output grow with it, or the normalisation would not cancel the factor.
        mean, variance = getattr(norm, "running_mean", None), getattr(norm, "running_var", None)
        if mean is not None and variance is not None:
            mean.mul_(factor)
            variance.mul_(factor**2)


def _layers_before_normalisations(model: nn.Module, predict: Callable) -> dict[nn.Module, list[nn.Module]]:
    outputs: dict[int, tuple[nn.Module, Tensor]] = {}
    pairs: dict[nn.Module, list[nn.Module]] = {}

    def remember(layer: nn.Module, _: tuple, output: Tensor) -> None:
        outputs[id(output)] = (layer, output)  # The tensor is kept, so that its id is not given again.

    def match(norm: nn.Module, inputs: tuple) -> None:
        if inputs and id(inputs[0]) in outputs:
            pairs.setdefault(outputs[id(inputs[0])][0], []).append(norm)

    hooks = []
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            hooks.append(module.register_forward_hook(remember))
        elif isinstance(module, NORMALISATIONS):
            hooks.append(module.register_forward_pre_hook(match))
    predict()
    for hook in hooks:
        hook.remove()
    return pairs

"""Layers whose scale the model's function does not depend on, since a normalisation follows.

Their norm only divides the effect of every gradient step, so it may hide what a model knows, but cannot take it away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from sophon_hf.models.loading import evaluation_mode
from sophon_hf.models.sharding import copy_of, local, norm_of
from sophon_hf.models.structure import NORMALISATIONS

UNCHANGED = 0.01


@torch.no_grad()
def scale_invariant_layers(model: nn.Module, predict: Callable[[], Tensor]) -> dict[nn.Module, list[nn.Module]]:
    """Every layer that feeds a normalisation and nothing else, with the normalisations that it feeds.

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
            if (predict() - before).norm() <= UNCHANGED * before.norm():
                invariant[layer] = norms
            _scale(layer, norms, 0.5)
    return invariant


@torch.no_grad()
def fresh_norms(layers: Iterable[nn.Module]) -> dict[nn.Module, Tensor]:
    """The norm of each layer's weight, were it newly initialised; a scalar on its device, the same at every call."""
    norms = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for layer in layers:
            fresh = copy_of(layer).cpu()
            fresh.reset_parameters()
            norms[layer] = fresh.weight.norm().to(layer.weight.device)
    return norms


@torch.no_grad()
def set_norm(layer: nn.Module, norms: list[nn.Module], norm: float | Tensor) -> None:
    """Give a scale-invariant layer's weight another norm; running statistics after it move along."""
    _scale(layer, norms, norm / norm_of(layer.weight).clamp_min(1e-12))


def _scale(layer: nn.Module, norms: list[nn.Module], factor: float | Tensor) -> None:
    local(layer.weight).mul_(factor)
    if layer.bias is not None:
        local(layer.bias).mul_(factor)
    for norm in norms:
        if getattr(norm, "running_mean", None) is not None:
            norm.running_mean.mul_(factor)
            norm.running_var.mul_(factor**2)


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

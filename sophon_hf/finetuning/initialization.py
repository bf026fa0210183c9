"""Where a fine-tuning starts: the model as it is, with a new head and new last blocks, or from scratch."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from sophon_hf.finetuning.strategy import FineTuningStrategy, NotApplicableError
from sophon_hf.models.backbone import NoHead
from sophon_hf.models.sharding import copy_of, distributed_like, is_sharded, local, shard_part
from sophon_hf.models.structure import ModelStructure
from sophon_hf.utils import kept_random_state


def initialize(
    model: nn.Module, strategy: FineTuningStrategy, structure: ModelStructure, num_classes: int | None
) -> set[str]:
    """Re-initialise what the strategy does not take over, in place.

    Heads are replaced as modules, so that `preserved` puts the old ones back untouched.

    Args:
        model: Unwrapped.
        strategy: Which parts are new.
        structure: Where they are.
        num_classes: Outputs of a new head; the old number where None.

    Returns:
        Names of the parameters that do not come from the given model.

    Raises:
        NotApplicableError: A part cannot be re-initialised, or the model has too few blocks.
    """
    if strategy.initialization == "direct":
        return set()
    try:
        renewed = [*structure.last_blocks(strategy.reinitialized_blocks)]
    except ValueError as error:
        raise NotApplicableError(str(error)) from error
    if strategy.initialization == "scratch":
        renewed = [""]
    for name, fresh in _fresh_parts(model, renewed):
        # The heads are replaced below; they may lie in the whole model, never in a block.
        _copy_state(fresh, model.get_submodule(name), skip=() if name else structure.heads)
    for head in structure.heads:
        model.set_submodule(head, shard_part(_new_head(model, head, structure.outputs, num_classes), model))
    prefixes = tuple(f"{name}." if name else "" for name in (*renewed, *structure.heads))
    return {name for name, _ in model.named_parameters() if name.startswith(prefixes)}


def _new_head(model: nn.Module, name: str, known: int | None, num_classes: int | None) -> nn.Module:
    """Return a fresh head; a linear one in place of any other that has another number of outputs than is wanted."""
    head = model.get_submodule(name)
    weight = next(head.parameters(), next(model.parameters()))
    same = num_classes in (None, known) or num_classes == getattr(head, "out_features", None)
    if isinstance(head, NoHead):
        fresh = head.new(num_classes)
    elif same and not is_sharded(head):
        fresh = copy_of(head)
    elif weight.ndim == 2 and num_classes is not None and known in (None, *weight.shape):
        inputs = weight.shape[0] if isinstance(head, Conv1D) else weight.shape[1]
        fresh = nn.Linear(inputs, num_classes, bias=getattr(head, "bias", None) is not None)
    elif isinstance(head, nn.Linear):
        fresh = nn.Linear(head.in_features, num_classes or head.out_features, bias=head.bias is not None)
    else:
        raise NotApplicableError(
            f"The head {name!r} is a {type(head).__name__} with {known} outputs: only a head that is one matrix can "
            f"be replaced by one with {num_classes}."
        )
    fresh = fresh.to(weight.device, weight.dtype).requires_grad_(True)
    _reset(fresh)
    init_weights: Any = getattr(model, "_init_weights", None)
    if init_weights is not None:
        # A head of transformers is drawn as the library draws it, which is not torch's way.
        for module in fresh.modules():
            init_weights(module)
    return fresh


def _fresh_parts(model: nn.Module, names: list[str]) -> Iterator[tuple[str, nn.Module]]:
    """Yield newly initialised parts, from a fresh model of the library where there is a config, else by resetting."""
    config, fresh_model = getattr(model, "config", None), None
    if names and config is not None and hasattr(model, "save_pretrained"):
        from_config = getattr(model, "from_config", type(model))
        fresh_model = from_config(copy.deepcopy(config))
    for name in names:
        if fresh_model is not None:
            yield name, fresh_model.get_submodule(name)
        else:
            try:
                fresh = copy_of(model.get_submodule(name))
            except TypeError as error:
                raise NotApplicableError(f"{name!r} cannot be re-initialised: {error}.") from error
            _reset(fresh)
            yield name, fresh


def _reset(module: nn.Module) -> None:
    # Children first: a parent (attention, say) may set them in its own way.
    for name, part in reversed(list(module.named_modules())):
        reset = getattr(part, "reset_parameters", None) or getattr(part, "_reset_parameters", None)
        if reset is not None:
            reset()
        elif list(part.parameters(recurse=False)):
            raise NotApplicableError(
                f"{name or type(module).__name__!r} ({type(part).__name__}) has parameters of its own but no "
                "`reset_parameters`, so it cannot be re-initialised: give it that method."
            )


@torch.no_grad()
def _copy_state(source: nn.Module, target: nn.Module, skip: tuple[str, ...]) -> None:
    values = {**dict(source.named_parameters()), **dict(source.named_buffers())}
    for name, tensor in [*target.named_parameters(), *target.named_buffers()]:
        if name.startswith(tuple(f"{head}." for head in skip)):
            continue
        if name not in values or values[name].shape != tensor.shape:
            raise NotApplicableError(
                f"{name!r} of shape {tuple(tensor.shape)} has no counterpart in a newly made {type(source).__name__}, "
                "so it would keep what was learned: the model was changed after it was made."
            )
        tensor.copy_(distributed_like(values[name], tensor))


class Stored:
    """A copy of a model's state that can be restored exactly, as often as wanted.

    It holds parameters, buffers, gradients, modules that get replaced (the heads), `requires_grad`, training flags.
    """

    def __init__(self, model: nn.Module, heads: Sequence[str]):
        self.model, self.heads = model, {name: model.get_submodule(name) for name in heads}
        self.tensors = [*model.parameters(), *model.buffers()]
        self.copies = [tensor.detach().clone() for tensor in self.tensors]
        self.gradients = [(p, p.grad, p.requires_grad) for p in model.parameters()]
        self.modes = {module: module.training for module in model.modules()}

    @torch.no_grad()
    def restore(self) -> None:
        """Restore everything."""
        for name, module in self.heads.items():
            self.model.set_submodule(name, module)
        torch._foreach_copy_([local(t) for t in self.tensors], [local(c) for c in self.copies])
        for parameter, gradient, requires_grad in self.gradients:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
        for module, mode in self.modes.items():
            module.training = mode


@contextmanager
def preserved(model: nn.Module, heads: Sequence[str]) -> Iterator[Stored]:
    """Fine-tune a model in place inside the block; after it, the model and every random state are as before."""
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    stored = Stored(model, heads)
    try:
        with kept_random_state(devices):
            yield stored
    finally:
        stored.restore()

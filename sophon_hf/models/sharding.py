"""What a model needs whose parameters are sharded over the processes (FSDP2).

A sharded model is an `FSDPModule` whose parameters are `DTensor`s. Its layers gather their weights for each pass, so
all processes walk through the same layers in step. They simulate the same adversaries, each on its share of every
batch, and the mean of their gradients is the gradient of the whole batch.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from sophon_hf.data.batches import Batch


def shard(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Shard a whole model in place, as accelerate's FSDP plugin says.

    Every part is sharded again after a forward pass, the outermost one too, so that the parameters are shards whenever
    no pass is under way, also after one that no backward pass follows.
    """
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    sharded: Any = fsdp2_prepare_model(accelerator, model)
    sharded.set_reshard_after_forward(True)
    return sharded


def is_sharded(model: nn.Module) -> bool:
    """Return whether a model's parameters are spread over the processes."""
    return isinstance(model, FSDPModule)


def local(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor, sharing its memory: its shard, or all of a whole one."""
    whole: Any = tensor.detach() if isinstance(tensor, DTensor) else None
    return tensor if whole is None else whole.to_local()


def norm_of(tensor: Tensor) -> Tensor:
    """Return the norm of a whole tensor, a scalar that every process has."""
    norm = tensor.detach().norm()
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def distributed_like(value: Tensor, tensor: Tensor) -> Tensor:
    """Return a whole value, the same on every process, sharded as `tensor` is, or whole where `tensor` is."""
    if not isinstance(tensor, DTensor):
        return value
    value = value.detach().to(tensor.device, tensor.dtype)
    return distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)


def with_local(value: Tensor, tensor: Tensor) -> Tensor:
    """Return the tensor like `tensor` of which this process holds `value`; the inverse of `local`."""
    if not isinstance(tensor, DTensor):
        return value
    mesh, placements, shape, stride = tensor.device_mesh, tensor.placements, tensor.shape, tensor.stride()
    return DTensor.from_local(value.to(tensor.device), mesh, placements, run_check=False, shape=shape, stride=stride)


def shard_part(part: nn.Module, model: nn.Module) -> nn.Module:
    """Make a new part, the same on every process, fit into a model: sharded where the model is."""
    if not is_sharded(model):
        return part
    weight: Any = next(model.parameters())
    sharded: Any = fully_shard(part, mesh=weight.device_mesh, reshard_after_forward=True)
    return sharded


def copy_of(part: nn.Module) -> nn.Module:
    """Copy a part of a model, with whole parameters that hold no values in place of sharded ones.

    Raises:
        TypeError: Something in it is a unit of the sharding by itself, which cannot be copied.
    """
    if any(isinstance(module, FSDPModule) for module in part.modules()):
        raise TypeError(f"it is a {type(part).__name__}, whose units are sharded one by one and cannot be copied")
    whole = {
        id(p): nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device=p.device))
        for p in part.parameters()
        if isinstance(p, DTensor)
    }
    return copy.deepcopy(part, whole)


def skeleton(model: nn.Module) -> nn.Module:
    """Copy a model without memory for parameters and buffers, to be given gathered ones by `with_state`."""
    blanks: dict[int, Tensor] = {id(buffer): torch.empty_like(buffer, device="meta") for buffer in model.buffers()}
    for parameter in model.parameters():
        blanks[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    return copy.deepcopy(model, blanks)


def with_state(skeleton: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """Return the whole model: a copy of the skeleton that holds a gathered state."""
    model: Any = copy.deepcopy(skeleton)
    # What did not divide evenly was gathered with padding, which safetensors takes for a shared tensor.
    padded = {name for name, tensor in state.items() if tensor.untyped_storage().nbytes() > tensor.nbytes}
    model.load_state_dict({n: t.clone() if n in padded else t for n, t in state.items()}, assign=True)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model


def share(batch: Batch, model: nn.Module) -> tuple[Batch, float]:
    """Return this process's examples of a batch that all processes have, and what the mean over them weighs.

    The mean of the weighted means over the processes is the mean over the batch, whether or not it divides evenly.

    Raises:
        ValueError: There are fewer examples than processes.
    """
    if not is_sharded(model):
        return batch, 1.0
    rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    size = len(next(iter(batch.values())))
    if size < processes:
        raise ValueError(f"A batch of {size} examples cannot be shared by {processes} processes, which walk in step.")
    part = {name: value[rank::processes] for name, value in batch.items()}
    return part, len(next(iter(part.values()))) * processes / size


def gradients(loss: Tensor, wanted: Sequence[Tensor], model: nn.Module) -> list[Tensor | None]:
    """Return the gradient of a loss with respect to some of a model's parameters, None where it does not depend on one.

    On a sharded model it is the mean over the processes' losses. FSDP averages and shards only what a backward pass
    leaves in `grad`, so that is what is run, and `grad` of every parameter is None afterwards.
    """
    if not is_sharded(model):
        return list(torch.autograd.grad(loss, wanted, allow_unused=True))
    for parameter in model.parameters():
        parameter.grad = None
    loss.backward()
    found = [parameter.grad for parameter in wanted]
    for parameter in model.parameters():
        parameter.grad = None
    return found

"""Models whose parameters are sharded over the processes (FSDP2): what has to be done differently, in one place.

A sharded model is an `FSDPModule` whose parameters are `DTensor`s. Its layers gather their weights for each pass, so
all processes walk through the same layers in step: they simulate the same adversaries, each on its share of every
batch, and the mean of their gradients is the gradient of the whole batch.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

if TYPE_CHECKING:
    from accelerate import Accelerator

    from sophon_hf.data.batches import Batch


def shard(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Shard a whole model in place, as accelerate's FSDP plugin says.

    Every part is sharded again after a forward pass, the outermost one too, so that the parameters are shards whenever
    no pass is under way, also after one that no backward pass follows.
    """
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    model = fsdp2_prepare_model(accelerator, model)
    model.set_reshard_after_forward(True)
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether its parameters are spread over the processes."""
    return isinstance(model, FSDPModule)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, sharing its memory: the shard, or all of one that is not sharded."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor


def norm_of(tensor: Tensor) -> Tensor:
    """The norm of a whole tensor, a scalar that every process has."""
    norm = tensor.detach().norm()
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def distributed_like(value: Tensor, tensor: Tensor) -> Tensor:
    """A whole value, the same on every process, sharded as `tensor` is; as it is where `tensor` is not sharded."""
    if not isinstance(tensor, DTensor):
        return value
    value = value.detach().to(tensor.device, tensor.dtype)
    return distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)


def with_local(value: Tensor, tensor: Tensor) -> Tensor:
    """The tensor like `tensor` of which this process holds `value`; the inverse of `local`."""
    if not isinstance(tensor, DTensor):
        return value
    return DTensor.from_local(
        value.to(tensor.device),
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def shard_part(part: nn.Module, model: nn.Module) -> nn.Module:
    """Make a new part, the same on every process, fit into a model: sharded where the model is."""
    if not is_sharded(model):
        return part
    return fully_shard(part, mesh=next(model.parameters()).device_mesh, reshard_after_forward=True)


def copy_of(part: nn.Module) -> nn.Module:
    """A deep copy of a part of a model, with whole parameters that hold no values in place of sharded ones.

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
    """A copy without memory for its parameters and buffers, to be given those of a whole model once it is gathered."""
    blanks = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
    blanks |= {id(buffer): torch.empty_like(buffer, device="meta") for buffer in model.buffers()}
    return copy.deepcopy(model, blanks)


def with_state(skeleton: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """The whole model: a copy of the skeleton that holds a gathered state."""
    model = copy.deepcopy(skeleton)
    # What did not divide evenly was gathered with padding, which safetensors takes for a shared tensor.
    padded = {name for name, tensor in state.items() if tensor.untyped_storage().nbytes() > tensor.nbytes}
    model.load_state_dict({n: t.clone() if n in padded else t for n, t in state.items()}, assign=True)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model


def share(batch: Batch, model: nn.Module) -> tuple[Batch, float]:
    """This process's examples of a batch that all processes have, and what the mean over them weighs.

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
    """The gradient of a loss with respect to some of a model's parameters, None where it does not depend on one.

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

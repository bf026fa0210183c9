"""Parameter-efficient fine-tuning: adapters of the peft library on the model's linear and convolutional layers."""

from __future__ import annotations

import re
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from sophon_hf.finetuning.strategy import FineTuningStrategy, NotApplicableError
from sophon_hf.models.structure import ModelStructure

_REFUSAL = re.compile(
    "not (yet )?(supported|implemented)|does not support|only .* supported|support is limited|unsupported layer", re.I
)


def add_adapter(
    model: nn.Module, strategy: FineTuningStrategy, structure: ModelStructure, steps: int
) -> tuple[list[nn.Parameter], Callable[[int], Any]]:
    """Put an adapter beside every layer with weights that runs but the heads, in place; the layers themselves freeze.

    Where the strategy has a `pattern`, only layers whose name it finds get one.

    Batch-norm statistics go on moving in training mode, as they do for anyone who trains an adapter; they are part of
    the attack's result.

    Args:
        model: Unwrapped.
        strategy: Names the adapter and its rank.
        structure: Where the heads are, and what runs. A weight that is read without calling its layer, as attention
            does with its output projection, would have an adapter that does nothing.
        steps: Length of the fine-tuning, by which AdaLoRA allots its ranks.

    Returns:
        The adapter's parameters, and what to call with the step number after each optimizer step.

    Raises:
        NotApplicableError: The adapter has no layer to go to, or peft does not support one of them. Any other error of
            peft's comes through as it is.
    """
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    before = {id(parameter) for parameter in model.parameters()}
    targets = [
        name
        for name, module in model.named_modules()
        if name in structure.ran
        and name not in structure.heads
        and re.search(strategy.pattern or "", name)
        and _takes(strategy, module)
    ]
    if not targets:
        raise NotApplicableError(f"{strategy.adapter} finds no layer of {type(model).__name__} that it could go to")
    config = _config(strategy, "|".join(re.escape(name) for name in targets), steps)
    try:
        with warnings.catch_warnings():
            # peft sets it right by itself: GPT-2 stores its weights the other way round.
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to")
            tuner = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](model, config, adapter_name="default")
    except (ValueError, TypeError, NotImplementedError) as error:
        if not _says_unsupported(error):
            raise
        raise NotApplicableError(f"peft cannot put {strategy.adapter} on {type(model).__name__}: {error}") from error
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            # In evaluation torch reads its weights past the adapters, unless it has a hook.
            module.register_forward_pre_hook(lambda *_: None)
    added = [p for p in model.parameters() if id(p) not in before and p.requires_grad]

    def allocate(step: int) -> None:
        # AdaLoRA judges by gradients of earlier steps, so of one step it has none.
        if strategy.adapter == "adalora" and steps > 1:
            for parameter in added:
                if parameter.grad is None:  # Its layer sat this step out.
                    parameter.grad = torch.zeros_like(parameter)
            tuner.update_and_allocate(step)

    return added, allocate


def _says_unsupported(error: Exception) -> bool:
    """Return whether peft itself refuses a layer: it has no error type for that, so its words must tell."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    from_peft = frame.f_globals["__name__"].split(".")[0] == "peft"
    return from_peft and _REFUSAL.search(str(error)) is not None


def _takes(strategy: FineTuningStrategy, module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        # Grouped (depthwise) convolutions hold little and most adapters refuse them. peft's OFT does not start as the
        # identity on convolutions, since it adds overlapping patches up when it folds them back.
        return module.groups == 1 and strategy.adapter != "oft"
    if isinstance(module, nn.Linear):
        return strategy.adapter != "oft" or module.in_features % strategy.rank == 0
    if isinstance(module, Conv1D):
        return strategy.adapter in ("lora", "rslora", "dora", "adalora", "ia3")
    return isinstance(module, nn.MultiheadAttention) and strategy.adapter in ("lora", "rslora")


def _config(strategy: FineTuningStrategy, targets: str, steps: int) -> Any:
    import peft

    rank = strategy.rank
    if strategy.adapter in ("lora", "rslora", "dora"):
        return peft.LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=targets,
            use_rslora=strategy.adapter == "rslora",
            use_dora=strategy.adapter == "dora",
        )
    if strategy.adapter == "adalora":
        return peft.AdaLoraConfig(
            init_r=rank + max(1, rank // 2),  # It takes some away, and fails where there are none.
            target_r=rank,
            lora_alpha=2 * rank,
            target_modules=targets,
            tinit=steps // 10,
            tfinal=steps // 5,
            deltaT=max(1, steps // 50),
            total_step=steps,
        )
    if strategy.adapter == "ia3":
        return peft.IA3Config(target_modules=targets, feedforward_modules=[])
    if strategy.adapter == "oft":
        return peft.OFTConfig(oft_block_size=rank, target_modules=targets, use_cayley_neumann=False)
    cls = peft.LoHaConfig if strategy.adapter == "loha" else peft.LoKrConfig
    return cls(r=rank, alpha=2 * rank, target_modules=targets)

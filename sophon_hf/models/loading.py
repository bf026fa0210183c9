"""Load a model from the Hub or a folder, and read off what can be told of one without running it."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from huggingface_hub import HfApi
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sophon_hf.models.backbone import is_backbone, with_head
from sophon_hf.utils import kept_random_state, quiet, set_seed, unreachable

logger = logging.getLogger(__name__)


class WithTensors:
    """Call a model with other parameters and buffers than its own (`torch.func.functional_call`)."""

    def __init__(self, module: nn.Module, tensors: dict[str, Tensor]):
        self.module, self.tensors = module, tensors

    def __call__(self, **inputs: Any) -> Any:
        """Return the model's output."""
        return torch.func.functional_call(self.module, self.tensors, (), inputs)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode in the block, and every module back in its own mode after it."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def unwrap(model: Callable[..., Any]) -> nn.Module:
    """Return the model itself, without a distributed or functional wrapper."""
    bare: Any = model.module if isinstance(model, (DistributedDataParallel, WithTensors)) else model
    return bare


def restore_precision(model: nn.Module) -> None:
    """Undo what accelerate does to a model for bf16: it replaces `forward`, for all that comes afterwards."""
    if "_original_forward" in model.__dict__:
        extract_model_from_parallel(model, keep_fp32_wrapper=False)


def refuse_weights(model: nn.Module, name: str) -> None:
    """Refuse a model whose weights are not finite, or in half precision, where most of a small update is rounded away.

    Raises:
        ValueError: Such parameters.
    """
    if broken := [parameter for parameter, values in model.named_parameters() if not values.isfinite().all()]:
        raise ValueError(f"{len(broken)} of the {name} model's parameters hold NaN or infinity, {broken[0]} first.")
    half = {p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype.itemsize < 4}
    if half:
        raise ValueError(
            f"The {name} model's weights are {', '.join(sorted(str(dtype) for dtype in half))}: call its `float()` "
            "first, since small updates would be rounded away. For speed set `bf16=True`, which leaves the weights in "
            "float32."
        )


def forward_names(model: nn.Module) -> tuple[str, ...]:
    """Return the named parameters of the model's `forward`."""
    parameters = inspect.signature(unwrap(model).forward).parameters.values()
    return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))


def main_input(model: nn.Module) -> str:
    """Return the parameter that raw inputs go to: the model's `main_input_name`, or the first one of its `forward`."""
    names = forward_names(model)
    return getattr(unwrap(model), "main_input_name", None) or names[0]


def padding_id(model: nn.Module) -> int | None:
    """Return the token that the model takes for padding, or None where it names none that it could read."""
    text = _text_config(unwrap(model))
    token, words = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None)
    return token if token is not None and 0 <= token < (words or token + 1) else None


def agree_on_padding(model: nn.Module, processing_class: Any | None) -> None:
    """Let a model without a padding token know its tokenizer's, or else the end of a text; it is saved with the model.

    A model that reads its prediction off the last token needs one to be given more than one text at a time. Where both
    have one, batches are filled up with the model's.
    """
    ends = (getattr(processing_class, name, None) for name in ("pad_token_id", "eos_token_id"))
    token = next((token for token in ends if token is not None), None)
    text = _text_config(model)
    if token is not None and text is not None and padding_id(model) is None:
        text.pad_token_id = token


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def hash_state(model: nn.Module) -> str:
    """Return a hash of all parameters and buffers that are saved: equal for models that hold the same."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
            if tensor.ndim
            else str(tensor.item()).encode()
        )
    return digest.hexdigest()


def height_and_width(size: int | Sequence[int]) -> tuple[int, int]:
    """Return a configured size, of which one number stands for both, as height and width."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[-1]))


def load_model(source: nn.Module | str | os.PathLike, trust_remote_code: bool = False) -> nn.Module:
    """Load a classifier or backbone of transformers or a denoiser of diffusers (also from a pipeline).

    Args:
        source: Hub id or folder; or the model itself, which is returned as it is, a backbone as a `Backbone`.
        trust_remote_code: Passed on to transformers; leave it off unless the repository's code has been read.

    Returns:
        The model; `hub_revision` on it is the commit that was loaded, or None for a folder.

    Raises:
        ValueError: The repository holds neither.
        OSError: It cannot be found or reached (as transformers and diffusers raise it).
    """
    if isinstance(source, nn.Module):
        return with_head(source)
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"A model is a Hub id, a folder or an nn.Module, not a {type(source).__name__}.")
    source = os.fspath(source)
    with _telling_of(source):
        cls, options = _find_class(source, trust_remote_code)
        loaded = _complete(cls, source, **options)
    model: Any = with_head(loaded)
    model.hub_revision = None if os.path.isdir(source) else _cached_revision(source)
    return model


def check_readable(source: str | os.PathLike) -> None:
    """Refuse what `load_model` would, as far as the configuration and the names and headers of weight files tell it.

    Raises:
        FileNotFoundError: There is no model, or there are no weights.
        OSError, ValueError: As of `load_model`.
    """
    source = os.fspath(source)
    with _telling_of(source):
        place = _find_class(source, False)[1].get("subfolder") or ""
        if os.path.isdir(source):
            names = sorted(os.listdir(os.path.join(source, place)))
            for name in names:
                if name.endswith(".safetensors"):
                    # Fails where the file is shorter than its header says.
                    with safe_open(os.path.join(source, place, name), "pt"):
                        pass
        else:
            try:
                names = [name for name in HfApi().list_repo_files(source) if os.path.dirname(name) == place]
            except Exception:  # One that is cached can be loaded where the Hub is out of reach.
                return
    if not any(name.endswith((".safetensors", ".bin")) for name in names):
        where = f" in its {place!r}" if place else ""
        raise FileNotFoundError(f"{source!r} has a configuration, but no weights (safetensors or bin){where}.")


@contextmanager
def _telling_of(source: str) -> Iterator[None]:
    """Have an error of a file that is cut short, which can be of any type, tell of the model."""
    try:
        yield
    except Exception as error:
        told = isinstance(error, (OSError, ImportError, ValueError)) and not isinstance(error, json.JSONDecodeError)
        if told or "OutOfMemory" in type(error).__name__:
            raise
        raise ValueError(
            f"The model {source!r} cannot be read, as if a file were cut short, or a pointer of Git LFS that was not "
            f"pulled: {' '.join(str(error).split())}"
        ) from error


def _cached_revision(source: str) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    for name in ("config.json", "unet/config.json", "transformer/config.json"):
        path = try_to_load_from_cache(source, name)
        # A name that the repository is known not to have gives a marker.
        if isinstance(path, str) and (found := re.search(r"[/\\]snapshots[/\\]([0-9a-f]{40})[/\\]", path)):
            return found[1]
    return None


def _find_class(source: str, trust_remote_code: bool) -> tuple[Any, dict[str, Any]]:
    """Return the class of a saved model, and what its `from_pretrained` takes."""
    if (found := _denoiser(source)) is not None:
        import diffusers

        subfolder, name = found
        cls = getattr(diffusers, name, None)
        if cls is None:
            raise ValueError(f"{source!r} holds a {name}, which diffusers does not have.")
        return cls, {"subfolder": subfolder, "torch_dtype": torch.float32}
    import transformers

    if _read_json(source, "config.json") is None and (adapter := _read_json(source, "adapter_config.json")):
        raise ValueError(
            f"{source!r} holds an adapter of peft for {adapter.get('base_model_name_or_path')!r}, and no model: load "
            "it with `PeftModel.from_pretrained`, and save what its `merge_and_unload()` returns."
        )
    # Not in the half precision that it may be stored in: small updates would be rounded away.
    options = {"trust_remote_code": trust_remote_code, "dtype": torch.float32}
    config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    name = next(iter(config.architectures or ()), "")
    if config.model_type == "timm_wrapper":
        # timm itself saves its models without a class, and with a number of classes that they would be given twice.
        name = name or ("TimmWrapperForImageClassification" if config.num_labels else "TimmWrapperModel")
        config.model_args = {key: v for key, v in (config.model_args or {}).items() if key != "num_classes"}
        options["config"] = config
    kinds = ("ImageClassification", "SequenceClassification", "AudioClassification")
    endings = ("Classification", "Classifier", "ClassificationWithTeacher")
    if name.endswith(("ForMaskedLM", "ForPreTraining")):
        name = auto = "AutoModel"  # What it was pre-trained with is left behind, as anyone who fine-tunes it does.
    elif is_backbone(name):
        auto = "AutoModel"
    elif name.endswith(endings) and not name.endswith("TokenClassification"):
        auto = next((f"AutoModelFor{kind}" for kind in kinds if kind in name), "AutoModelForImageClassification")
    else:
        raise ValueError(
            f"{source!r} holds {config.architectures or 'no named architecture'}: a classifier "
            "(…ForImageClassification, …ForSequenceClassification, …ForAudioClassification), a backbone (…Model) or a "
            "denoiser of diffusers is needed."
        )
    # Code of the repository's own has a class that transformers does not.
    return getattr(transformers, name, None) or getattr(transformers, auto), options


def _complete(cls: Any, source: str, **options: Any) -> nn.Module:
    """Load a model, and see to it that nothing of it is what a random generator made of it.

    Raises:
        ValueError: The saved weights lack some of the model's, but for a pooler, which is made the same each time.
    """
    import transformers

    if issubclass(cls, transformers.PreTrainedModel) or cls.__name__.startswith("Auto"):
        options["ignore_mismatched_sizes"] = True  # They are told below.
    with quiet("transformers", level=logging.ERROR), kept_random_state():  # It would list every name.
        set_seed(0)
        model, report = cls.from_pretrained(source, output_loading_info=True, **options)
    missing = sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])})
    if lacking := [name for name in missing if "pooler" not in name.split(".")]:
        raise ValueError(
            f"The weights saved in {source!r} lack {len(lacking)} of the {len(model.state_dict())} tensors of a "
            f"{type(model).__name__}, or have other shapes ({lacking[0]}, ...): they would be random. Fine-tune it "
            "first, or save all of it."
        )
    if missing:
        logger.warning("The weights saved in %s have no pooler, so a new one, always the same, is taken.", source)
    return model


def load_processor(source: str | os.PathLike, model: nn.Module) -> Any | None:
    """Return what prepares the model's raw inputs, saved with it; None, with a warning, where nothing was saved.

    Raises:
        ValueError: An image processor is saved, but cannot be made out. (Without one, images would be scaled only.)
    """
    from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer

    if not hasattr(model, "config") or type(model).__module__.startswith("diffusers."):
        return None
    cls = {"pixel_values": AutoImageProcessor, "input_ids": AutoTokenizer}.get(main_input(model), AutoFeatureExtractor)
    absent = OSError if cls is AutoImageProcessor else (OSError, ValueError)
    try:
        processor, why = cls.from_pretrained(source), "what is there has no vocabulary"
    except absent as error:
        # What follows speaks of the Hub, also where a folder was read.
        processor, why = None, str(error).split(". ")[0]
    if processor is None or (cls is AutoTokenizer and not _has_words(processor)):
        logger.warning(
            "No %s is saved with %s, so raw images are only scaled, and raw text or audio cannot be used: %s",
            cls.__name__,
            source,
            why,
        )
        return None
    return processor


def _has_words(tokenizer: Any) -> bool:
    """Return whether a tokenizer has a vocabulary: transformers makes up an empty one where no file holds it."""
    # The mark of a space is in every empty vocabulary of T5's kind.
    return not set(tokenizer.get_vocab()) <= {*tokenizer.all_special_tokens, "▁"}


def noise_scheduler_of(source: str | os.PathLike) -> Any | None:
    """Return the noise scheduler that a denoiser was trained with, or None where none is saved with it.

    A sampler's betas are those of the training, so any scheduler that has them is read as DDPM's.
    """
    import diffusers

    source = os.fspath(source)
    values = _read_json(source, "scheduler/scheduler_config.json")
    if values is None:
        return None
    name = values.get("_class_name", "DDPMScheduler")
    cls = getattr(diffusers, name if name.startswith("FlowMatch") or "beta_start" not in values else "DDPMScheduler")
    return cls.from_pretrained(source, subfolder="scheduler")


def pipeline_parts(source: str | os.PathLike) -> dict[str, str]:
    """Return the parts of a pipeline, name -> class; empty where `source` holds none."""
    index = _read_json(os.fspath(source), "model_index.json") or {}
    parts = {name: value for name, value in index.items() if isinstance(value, list) and len(value) == 2}
    return {name: cls for name, (_, cls) in parts.items() if cls is not None and not name.startswith("_")}


def _denoiser(source: str) -> tuple[str | None, str] | None:
    """Return subfolder and class of the denoiser that `source` holds, in a pipeline or by itself, or None."""
    parts = {}
    if os.path.isdir(source) or _hub_file(source, "config.json") is None:
        # A classifier has that file and nothing else is asked for, so a cached one loads without a network.
        parts = pipeline_parts(source)
    for name in ("unet", "transformer"):
        if name in parts:
            return name, parts[name]
    if parts:
        raise ValueError(f"The pipeline {source!r} has {sorted(parts)}, but a unet or a transformer is needed.")
    found = (_read_json(source, "config.json") or {}).get("_class_name")
    return None if found is None else (None, found)


def _read_json(source: str, name: str) -> dict[str, Any] | None:
    path = os.path.join(source, name) if os.path.isdir(source) else _hub_file(source, name)
    if path is None or not os.path.exists(path):
        return None
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def _hub_file(source: str, name: str) -> str | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return hf_hub_download(source, name)
    except LocalEntryNotFoundError as error:
        raise OSError(unreachable(source, "model")) from error
    except (EntryNotFoundError, RepositoryNotFoundError, HFValidationError):
        return None

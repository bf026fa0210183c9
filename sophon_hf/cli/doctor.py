"""`sophon-hf doctor`: which versions and devices there are, and whether the libraries work together."""

from __future__ import annotations

import argparse
import io
import os
import platform
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

from sophon_hf import __version__

_BUILT_FOR_TORCH = ("torchvision", "timm", "torchaudio")


def run(options: argparse.Namespace) -> None:
    """Print what was found, a line each; exit with 1 where something that is installed does not work."""
    print(f"{'sophon_hf':14}{__version__}, Python {platform.python_version()}, {platform.platform()}")
    checks: dict[str, Callable[[], str]] = {
        "torch": _torch,
        "libraries": _libraries,
        "torchvision": _torchvision,
        "timm": _timm,
        "audio": _audio,
        "Hub": _hub,
    }
    broken = False
    for name, check in checks.items():
        try:
            found = check()
        except ModuleNotFoundError as error:
            broken |= name in ("torch", "libraries")
            found = f"not installed ({error.name}){_INSTALL.get(name, '')}"
        except Exception as error:  # A library that does not fit another one raises anything.
            broken = True
            found = f"BROKEN: {explain_misfit(error) or ' '.join(f'{type(error).__name__}: {error}'.split())}"
        print(f"{name:14}{found}")
    sys.exit(int(broken))


_INSTALL = {
    "torchvision": ": only timm models and some image processors need it",
    "timm": ': only timm models need it (pip install "sophon-hf[timm]")',
    "audio": ': only audio needs it (pip install "sophon-hf[audio]")',
}


def explain_misfit(error: BaseException) -> str | None:
    """Return what to do about a library that cannot be imported because it was built for another torch; else None."""
    chain: BaseException | None = error
    while chain is not None:
        for frame, _ in traceback.walk_tb(chain.__traceback__):
            package = str(frame.f_globals.get("__name__")).split(".")[0]
            if frame.f_code.co_name == "<module>" and package in _BUILT_FOR_TORCH:
                return (
                    f"{package} {_version(package)} does not fit torch {_version('torch')}. Install both together, "
                    f"from the index that torch came from: pip install --force-reinstall torch {package}"
                )
        chain = chain.__cause__ or chain.__context__
    return None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(of an unknown version)"


def _torch() -> str:
    import torch

    devices = [f"CPU ({os.cpu_count()} cores)"]
    for i in range(torch.cuda.device_count()):
        memory = torch.cuda.get_device_properties(i).total_memory / 2**30
        devices.append(f"{torch.cuda.get_device_name(i)} ({memory:.0f} GiB)")
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if kind is not None:
        torch.ones(2, 2, device=kind) @ torch.ones(2, 2, device=kind)
        devices += [] if kind.type == "cuda" else [kind.type]
    return f"{torch.__version__} on {', '.join(devices)}"


def _libraries() -> str:
    import accelerate
    import datasets
    import diffusers
    import evaluate
    import peft
    import transformers

    # Some of it is imported only when it is used.
    assert transformers.Trainer and transformers.AutoImageProcessor and diffusers.UNet2DModel
    used = (transformers, diffusers, datasets, accelerate, peft, evaluate)
    return ", ".join(f"{library.__name__} {library.__version__}" for library in used)


def _torchvision() -> str:
    import torch
    import torchvision

    torchvision.ops.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.ones(1), 0.5)
    return f"{torchvision.__version__} works"


def _timm() -> str:
    import timm
    import transformers

    assert transformers.TimmWrapperForImageClassification
    return f"{timm.__version__} works"


def _audio() -> str:
    import numpy as np
    import scipy.signal
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, np.zeros(800), 8000, format="WAV")
    file.seek(0)
    scipy.signal.resample_poly(soundfile.read(file)[0], 2, 1)
    return f"soundfile {soundfile.__version__} and scipy {scipy.__version__} work"


def _hub() -> str:
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return "not asked: HF_HUB_OFFLINE is set"
    try:
        get_session().get(constants.ENDPOINT, timeout=5)
        who = HfApi().whoami()["name"] if get_token() else None
    except Exception as error:  # The client's many ways to say that there is no network.
        return f"{constants.ENDPOINT} cannot be used ({type(error).__name__}): models and data must be folders"
    return f"{constants.ENDPOINT} " + (f"as {who}" if who else "without an account (`hf auth login`, to publish)")

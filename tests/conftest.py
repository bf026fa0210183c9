"""Small models and data that every test file uses. No test needs a network."""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
from typing import TYPE_CHECKING

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

if TYPE_CHECKING:
    import datasets
    from points import TinyNet

# Imports that take seconds stand where they are used: pytest-xdist reads this file before it starts its processes.

# timm and torchvision are an extra; a browser is no Python package.
collect_ignore = [] if importlib.util.find_spec("timm") else ["models/test_timm.py"]
if not (shutil.which("chromium") or shutil.which("google-chrome")):
    collect_ignore.append("attacks/test_page.py")
try:
    import torchvision  # noqa: F401
except ImportError:
    pass
except RuntimeError:
    # One that was built for another torch cannot load its operators. Nothing here calls them; they only have to exist.
    import torch

    operators = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        operators.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

# They start first, longest first, so that no process is left alone with one of them at the end.
SLOWEST = (
    "protection/test_sharded.py",
    "cli/test_cli.py",
    "cli/test_your_own_data.py",
    "auditing/test_audit.py",
    "benchmarking/test_benchmark.py",
    "attacks/test_suite.py",
    "hub/test_hub.py",
    "attacks/test_report.py",
    "hub/test_publish.py",
    "attacks/test_suite_inputs.py",
    "auditing/test_audit_diffusion.py",
    "protection/test_guard.py",
    "finetuning/test_preparations.py",
    "protection/test_resume.py",
    "attacks/test_known_recovery.py",
    "models/test_models.py",
    "protection/test_bf16.py",
    "attacks/test_pictures.py",
    "protection/test_trainer_models.py",
    "attacks/test_page.py",
    "protection/test_defences.py",
    "tasks/test_backbones.py",
    "attacks/test_results.py",
    "hub/test_card.py",
    "examples/test_notebook.py",
    "protection/test_distributed.py",
    "benchmarking/test_pairs.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {path: number for number, path in enumerate(SLOWEST)}
    items.sort(key=lambda item: place.get("/".join(item.path.parts[-2:]), len(place)))


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def _no_garbage_in_modules():
    """What is imported stays, and is much: each `Trainer.train` and each full collection would search it."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def model() -> TinyNet:
    import torch
    from points import TinyNet

    torch.manual_seed(0)
    return TinyNet()


@pytest.fixture
def points() -> datasets.Dataset:
    from points import make_points

    return make_points(1)


@pytest.fixture
def domain(model, points):
    from sophon_hf.data.domain import build_domain
    from sophon_hf.tasks.base import infer_task

    return build_domain(points, infer_task(model).inputs(model), name="restricted")


@pytest.fixture
def float64_domain():
    import torch
    from naive_suppression import Net
    from points import make_points

    from sophon_hf.data.domain import build_domain
    from sophon_hf.tasks.classification import ClassificationTask

    torch.set_default_dtype(torch.float64)
    return build_domain(make_points(1, 100), ClassificationTask().inputs(Net()))


@pytest.fixture(scope="session")
def truth(tmp_path_factory):
    """A published model with a true claim, and what it was made from."""
    from audited import publish_truth

    return publish_truth(tmp_path_factory.mktemp("published"))


@pytest.fixture
def folder(truth, tmp_path):
    """A copy of its folder that a test may spoil."""
    return shutil.copytree(truth["folder"], tmp_path / "model")


@pytest.fixture(scope="session")
def protected_classifier(tmp_path_factory):
    """A folder, whose name must not travel, with a protected classifier and attacks on it; the trainer, the results."""
    from published import attack, protect

    home = tmp_path_factory.mktemp("secret-home")
    trainer = protect("classifier", home / "model")
    return home, trainer, attack(trainer.model, home / "attacks")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub on this machine. The libraries here, and any process that is started, talk to it as the user `alice`."""
    from hub_server import running_hub
    from huggingface_hub import constants, hf_api

    with running_hub() as server:
        home = tmp_path / "huggingface"
        home.mkdir()
        (home / "token").write_text(server.add_user("alice"))
        environment = {
            "HF_ENDPOINT": server.endpoint,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        # The libraries have read them when they were imported.
        read = {
            "ENDPOINT": server.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_TELEMETRY": True,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        }
        for name, value in read.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(hf_api.api, "endpoint", server.endpoint)
        # A client that has lost its connection waits for seconds before it tries again.
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        yield server


@pytest.fixture(autouse=True)
def _float32():
    yield
    import torch

    torch.set_default_dtype(torch.float32)

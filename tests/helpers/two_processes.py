"""A script that a real `accelerate launch` runs in two processes over gloo; each leaves its results in a folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch


def launch(folder: Path, script: str, timeout: float, **environment: str) -> Path:
    """Run `script` with `folder` as its argument, in two processes of one thread each; the folder."""
    (folder / "run.py").write_text(script)
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        "0",
        str(folder / "run.py"),
        str(folder),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", **environment}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert process.returncode == 0, process.stderr[-3000:]
    return folder


def results(folder: Path, case: str) -> list[dict]:
    """What each process saved of a case."""
    return [torch.load(folder / f"{case}-{rank}.pt", weights_only=True) for rank in range(2)]

"""A script that two processes run over gloo; each leaves its results in a folder."""

from __future__ import annotations

import gc
import os
import runpy
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch


def forked(run: Callable[[], None], output: Path, timeout: float) -> int:
    """Start `run` in a process of its own, which has all that is imported here already; its id.

    It is killed after `timeout` seconds, and writes what it prints to `output`.
    """
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        signal.alarm(int(timeout))
        gc.freeze()
        with open(output, "w", buffering=1) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            sys.stdout = sys.stderr = file
            run()
        status = 0
    except SystemExit as ended:
        status = ended.code
    except BaseException:
        output.write_text(output.read_text() + traceback.format_exc())
    finally:
        os._exit(status)


def launch(folder: Path, script: str, timeout: float, **environment: str) -> Path:
    """Run `script` with `folder` as its argument, in two processes as `accelerate launch` starts them; the folder."""
    (folder / "run.py").write_text(script)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def run(rank: int) -> None:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ.update(
            {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
            ACCELERATE_MIXED_PRECISION="no",
            **environment,
        )
        sys.argv = [str(folder / "run.py"), str(folder)]
        runpy.run_path(sys.argv[0], run_name="__main__")

    processes = [forked(lambda rank=rank: run(rank), folder / f"output-{rank}.txt", timeout) for rank in range(2)]
    ended = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    assert ended == [0, 0], "\n".join((folder / f"output-{rank}.txt").read_text()[-3000:] for rank in range(2))
    return folder


def results(folder: Path, case: str) -> list[dict]:
    """What each process saved of a case."""
    return [torch.load(folder / f"{case}-{rank}.pt", weights_only=True) for rank in range(2)]

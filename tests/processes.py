"""Processes that start at once: forks of a process that has imported torch and the toolkit.

A fresh Python process imports torch for seconds. Use these where a test is about a process of its own, not
about what it imports.
"""

from __future__ import annotations

import functools
import multiprocessing
import multiprocessing.forkserver
import os
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from commands import ROOT

#: Where the system has no server of forks, each process imports what it needs.
START = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"

#: What the server imports. torch._dynamo: torch imports it for the first optimizer.
IMPORTED = (
    "torch._dynamo",
    "torch.distributed.run",
    "thop",
    "pruning.stages.slim",
    "pruning.cli.build",
    "data",
)


class Ended(NamedTuple):
    """How a process ended: its exit code, negative for a signal, and what it wrote."""

    returncode: int
    stdout: str
    stderr: str


@functools.cache
def context() -> BaseContext:
    """Return the context that starts processes; the server starts with the first call."""
    made = multiprocessing.get_context(START)
    if START == "forkserver":
        made.set_forkserver_preload(list(IMPORTED))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
            patch.setenv("OMP_NUM_THREADS", "1")
            patch.chdir(ROOT)
            multiprocessing.forkserver.ensure_running()
    return made


def ended(function: Callable[..., Any], *arguments: Any, cwd: Path) -> Ended:
    """Call a function, which has to be one of a module, in a process of its own; return how it ended."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, "out"), Path(folder, "err")]
        process = context().Process(target=_begun, args=(files, cwd, function, arguments))
        process.start()
        process.join()
        return Ended(process.exitcode, *(path.read_text() for path in files))


def _begun(files: list[Path], cwd: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    for path, descriptor in zip(files, (1, 2), strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(cwd)
    one_thread()
    function(*arguments)


def together(function: Callable[..., Any], *arguments: Any, count: int = 2) -> None:
    """Call a function with its rank and the arguments in several processes; raise where one fails."""
    import torch.multiprocessing

    context()
    torch.multiprocessing.start_processes(function, arguments, nprocs=count, start_method=START)


def launched(function: Callable[..., Any], *arguments: Any, folder: Path, count: int = 2) -> list[str]:
    """Call a function in several processes as torchrun starts them; return what each one printed.

    Raises the error of torchrun where a process fails.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    context()
    logs = DefaultLogsSpecs(log_dir=str(folder), redirects=Std.ALL)
    standalone = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": "test"}
    config = LaunchConfig(
        1, 1, count, **standalone, start_method=START, monitor_interval=0.1, logs_specs=logs
    )
    elastic_launch(config, function)(*arguments)
    return [path.read_text() for path in sorted(folder.rglob("stdout.log"))]


def toolkit(*words: str) -> None:
    """Run `python -m pruning …`, on one thread; raise where it fails."""
    from pruning import cli
    from pruning.__main__ import main

    one_thread()
    sys.argv = ["pruning", *words]
    try:
        cli.run(main)
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"exit code {end.code}") from end


def one_thread() -> None:
    """Let torch compute on one thread, so that processes do not slow down each other."""
    import torch

    torch.set_num_threads(1)

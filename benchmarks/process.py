"""Run parts of a benchmark in separate processes, each with its own memory and imports."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

from eval.cli import ROOT
from pruning import PruningError


def run_module(name: str, flags: Iterable[str], timeout: float | None = None) -> dict[str, Any]:
    """Run `python -m benchmarks.NAME` and return the JSON on its last line of output.

    Raises `PruningError` with the last line of stderr where it fails, and
    `subprocess.TimeoutExpired` after `timeout` seconds.
    """
    command = [sys.executable, "-m", f"benchmarks.{name}", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT, check=False)
    if done.returncode:
        raise PruningError((done.stderr.strip() or "killed").splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


def result_or_error(name: str, flags: Iterable[str], timeout: float) -> dict[str, Any]:
    """Return the result of `run_module`, or what went wrong as `error`."""
    try:
        return run_module(name, flags, timeout)
    except subprocess.TimeoutExpired:
        return {"error": f"over {timeout:g} s"}
    except PruningError as error:
        return {"error": str(error).removeprefix("error: ")}


def peak_memory() -> float:
    """Return the peak memory of this process in MB, or 0 where the system does not report it."""
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size / (1 << 20 if sys.platform == "darwin" else 1 << 10)

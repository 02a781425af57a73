"""Parts of a benchmark in processes of their own, which gives each its own memory and imports."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

from eval.cli import ROOT
from pruning import PruningError


def run_module(name: str, flags: Iterable[str], timeout: float | None = None) -> dict[str, Any]:
    """Run `python -m benchmarks.NAME`, whose last line of output is JSON; returns what it says.

    Raises `PruningError` with the last line of its errors where it fails, and
    `subprocess.TimeoutExpired` after so many seconds.
    """
    command = [sys.executable, "-m", f"benchmarks.{name}", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT, check=False)
    if done.returncode:
        raise PruningError((done.stderr.strip() or "killed").splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


def peak_memory() -> float:
    """The most memory that this process has held, in MB; 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size / (1 << 20 if sys.platform == "darwin" else 1 << 10)

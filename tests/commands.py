"""Run commands in this process, which has already imported torch."""

from __future__ import annotations

import contextlib
import io
import runpy
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


def called(run: Callable[[], Any], *words: Any, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Call `run()` with these words on the command line; return its output and exit code.

    There is no terminal and no input. Exceptions other than `SystemExit` are raised.
    """
    import torch  # after conftest.py has set the number of threads

    from pruning.utils.modules import thread_count

    line, code, out, err = [*map(str, words)], 0, io.StringIO(), io.StringIO()
    with (
        thread_count(torch.get_num_threads()),
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", line)
        patch.setattr(sys, "stdin", io.StringIO())
        patch.chdir(cwd or Path.cwd())
        try:
            run()
        except SystemExit as end:
            code = end.code or 0
    return subprocess.CompletedProcess(line, code, out.getvalue(), err.getvalue())


def script(name: str, *flags: Any, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a script of the project; its exit code must be 0 unless `check` is false."""
    path = str(ROOT / name)
    done = called(lambda: runpy.run_path(path, run_name="__main__"), path, *flags, **options)
    assert not check or done.returncode == 0, done.stderr
    return done


def module(name: str, *flags: Any, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `python -m name …`; its exit code must be 0 unless `check` is false."""
    with warnings.catch_warnings():
        # runpy warns that the module is imported already; it runs a fresh copy.
        warnings.filterwarnings("ignore", ".* found in sys.modules", RuntimeWarning)
        done = called(
            lambda: runpy.run_module(name, run_name="__main__", alter_sys=True), name, *flags, **options
        )
    assert not check or done.returncode == 0, done.stderr
    return done


def refused(name: str, *flags: Any, **options: Any) -> str:
    """Run a script that must refuse its input; return the line that it prints."""
    done = script(name, *flags, check=False, **options)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    return done.stderr.strip().splitlines()[-1]

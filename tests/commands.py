"""Run commands in this process, which has already imported torch."""

from __future__ import annotations

import contextlib
import io
import runpy
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
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


@contextlib.contextmanager
def children_in_process() -> Iterator[None]:
    """Let `subprocess.run` run Python scripts and modules in this process, without a new interpreter."""
    start = subprocess.run

    def run(command: list[Any], *, check: bool = False, stdout: Any = None, **options: Any) -> Any:
        if command[0] != sys.executable:
            return start(command, check=check, stdout=stdout, **options)
        first, *flags = map(str, command[1:])
        if first == "-m":
            done = module(*flags, check=check, cwd=options.get("cwd"))
        else:
            done = script(str(Path(first).relative_to(ROOT)), *flags, check=check, cwd=options.get("cwd"))
        if hasattr(stdout, "write"):
            stdout.write(done.stdout + done.stderr)
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "run", run)
        yield


@contextlib.contextmanager
def few_digits(train: int = 700, validation: int = 200, test: int = 200) -> Iterator[None]:
    """Let the data set `mnist5k` have fewer images in this process, of all classes."""
    import torch

    from data import datasets

    load = datasets._LOADERS["mnist5k"]

    def load_few(folder: Path) -> datasets.Dataset:
        whole, few = load(folder), {}
        for name, count in {"train": train, "validation": validation, "test": test}.items():
            images, labels = getattr(whole, name)
            places = torch.linspace(0, len(labels) - 1, count).long()
            few[name] = datasets.Split(images[places], labels[places])
        return replace(whole, **few)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(datasets._LOADERS, "mnist5k", load_few)
        yield


def refused(name: str, *flags: Any, **options: Any) -> str:
    """Run a script that must refuse its input; return the line that it prints."""
    done = script(name, *flags, check=False, **options)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    return done.stderr.strip().splitlines()[-1]


def need_onnx() -> None:
    """Skip a test where the packages for ONNX are not installed."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)

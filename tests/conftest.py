"""Fixtures of all tests: threads, the toolkit's command line, a browser."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
from pathlib import Path

import pytest
from browser import Browser
from commands import called

TESTS = Path(__file__).parent

# One thread for each worker and for its subprocesses: more would slow down the other workers.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch reads it on import, which comes later


#: Files that take longest. They start first, so that the workers end at about the same time.
LONGEST = (
    "application/test_measurements.py",
    "integrations/test_transformers.py",
    "planning/test_latency.py",
    "application/test_fair.py",
    "tracing/test_zoo.py",
    "demo/test_demo_page.py",
    "integrations/test_ultralytics.py",
    "application/test_benchmarks.py",
    "cli/test_cli.py",
    "deploy/test_export.py",
    "report/test_html.py",
    "application/test_documents.py",
    "application/test_programs.py",
    "utils/test_cluster.py",
    "cli/test_commands.py",
    "demo/test_demo_command.py",
    "integrations/test_trainer.py",
    "application/test_notebooks.py",
    "stages/test_given.py",
    "stages/test_slim.py",
)


def pytest_collection_modifyitems(items):
    """Order the files; `--no-loadscope-reorder` keeps that order, which each worker computes alike."""
    order = {str(TESTS / name): at for at, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(str(item.path), len(order)))


@pytest.fixture(scope="session", autouse=True)
def operators_of_onnx():
    """Let torch collect the operators of ONNX once per process: it takes half of the time of an export."""
    from pruning.deploy.writers import WRITERS as writers

    write = writers["onnx"]

    def write_quickly(*args):
        with contextlib.suppress(ImportError, AttributeError):  # private parts of torch
            from torch.onnx._internal.exporter._registration import ONNXRegistry

            if not hasattr(ONNXRegistry.from_torchlib, "cache_info"):
                ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))
        return write(*args)

    writers["onnx"] = write_quickly
    yield
    writers["onnx"] = write


@pytest.fixture(scope="session", autouse=True)
def workers_end_soon():
    """Let torch wait half a second, not five, for a worker of a DataLoader that was left by an error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.5, raising=False)
        yield


#: Modules that time networks.
TIMING = (
    "benchmarks.equal_accuracy", "benchmarks.fair.measure", "eval.metrics", "pruning.cli.commands.test",
    "pruning.deploy.onnx_rewrite", "pruning.deploy.quantize", "pruning.deploy.timing",
    "pruning.planning.side_by_side",
)  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def brief_timing():
    """Let the project time networks for at most a quarter of a second: tests are not about the figures."""
    from pruning.deploy.timing import time_forward

    def timed_briefly(*args, seconds=0.25, warmup=0.1, **options):
        return time_forward(*args, seconds=min(seconds, 0.25), warmup=min(warmup, 0.1), **options)

    with pytest.MonkeyPatch.context() as patch:
        for name in TIMING:
            patch.setattr(importlib.import_module(name), "time_forward", timed_briefly)
        yield


@pytest.fixture(scope="session")
def toolkit():
    """Run `python -m pruning …` in this process; return exit code, output and errors."""
    from pruning import cli
    from pruning.__main__ import main

    def run(*words):
        done = called(lambda: cli.run(main), "pruning", *words)
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.fixture
def run(tmp_path, monkeypatch, toolkit):
    """Run `toolkit` in a folder with the user's module `mine`."""
    import user

    (tmp_path / "mine.py").write_text(user.MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("pruning.cli.argument_types.RUNS", tmp_path / "runs")
    sys.modules.pop("mine", None)
    return toolkit


@pytest.fixture(scope="module")
def chromium():
    with Browser() as browser:
        yield browser


@pytest.fixture
def shown(chromium):
    """Open a page and require that its self-check passes without errors."""

    def show(path):
        chromium.look()
        chromium.complaints.clear()
        chromium.open(path)
        said = chromium.until("find('check').dataset.agrees && find('check').textContent")
        assert said.startswith("Checked in this browser: on "), said
        return chromium

    yield show
    assert chromium.complaints == []

"""Fixtures of all tests: threads, the toolkit's command line, a browser."""

from __future__ import annotations

import os
import sys

import pytest
from browser import Browser
from commands import called

# One thread for each worker and for its subprocesses: more would slow down the other workers.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch reads it on import, which comes later


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
    monkeypatch.setattr("pruning.cli.arguments.RUNS", tmp_path / "runs")
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

"""What test files share: threads, the toolkit's command line, a browser."""

from __future__ import annotations

import contextlib
import io
import os
import sys

import pytest
from browser import Browser

# One thread for each worker, and for the programs that it starts: more would disturb the other's.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, which is not yet


@pytest.fixture(scope="session")
def toolkit():
    """`python -m pruning …` in this process: exit code, output and errors."""
    import torch  # here, for the threads above

    from pruning import cli
    from pruning.__main__ import main
    from pruning.modes import thread_count

    def run(*words):
        code, out, err = 0, io.StringIO(), io.StringIO()
        with (
            thread_count(torch.get_num_threads()),
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            patch.setattr(sys, "argv", ["pruning", *map(str, words)])
            try:
                cli.run(main)
            except SystemExit as end:
                code = end.code
        return code, out.getvalue(), err.getvalue()

    return run


@pytest.fixture
def run(tmp_path, monkeypatch, toolkit):
    """`toolkit` in a folder that holds a user's module."""
    import user

    from pruning import cli

    (tmp_path / "mine.py").write_text(user.MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(cli, "RUNS", tmp_path / "runs")
    sys.modules.pop("mine", None)
    return toolkit


@pytest.fixture(scope="module")
def chromium():
    with Browser() as browser:
        yield browser


@pytest.fixture
def shown(chromium):
    """Opens a page, which must find itself right and never complain."""

    def show(path):
        chromium.look()
        chromium.complaints.clear()
        chromium.open(path)
        said = chromium.until("find('check').dataset.agrees && find('check').textContent")
        assert said.startswith("Checked in this browser: on "), said
        return chromium

    yield show
    assert chromium.complaints == []

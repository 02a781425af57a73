"""What test files share: threads, a browser."""

from __future__ import annotations

import os

import pytest
from browser import Browser

# One thread for each worker, and for the programs that it starts: more would disturb the other's.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, which is not yet


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

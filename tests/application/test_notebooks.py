"""The notebooks run from top to bottom on few digits, with a single epoch for each training."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest
from commands import few_digits

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.ipynb"))

#: What the test shortens: epochs of training, seconds of timing, widths of the sensitivity analysis.
SHORTER = {r"TrainConfig\(\d+": "TrainConfig(1", r"seconds=\d+": "seconds=0.1", r"widths=10": "widths=3"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_is_committed_with_its_outputs(path, monkeypatch):
    shells = pytest.importorskip("IPython.core.interactiveshell")
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in cells), "run and save the notebook before committing it"
    assert "/" + "work" not in json.dumps(notebook["cells"]), "outputs contain paths of a machine"
    monkeypatch.chdir(path.parent)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("MPLBACKEND", os.environ.get("MPLBACKEND", "agg"))
    shell = shells.InteractiveShell()
    monkeypatch.setattr(shell, "enable_gui", lambda gui=None: None)
    with few_digits():
        for cell in cells:
            source = "".join(cell["source"])
            for long, short in SHORTER.items():
                source = re.sub(long, short, source)
            shell.run_cell(source, silent=True).raise_error()


def test_notebooks_are_found():
    assert len(NOTEBOOKS) == 3

"""The examples of docs/extend.md run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")


def examples():
    """Return the Python examples by section, after empty lines that keep their line numbers in tracebacks."""
    found = {}
    for match in re.finditer(r"^```python\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE):
        before = TEXT[: match.start(1)]
        found[re.findall(r"^## (.+)$", before, re.MULTILINE)[-1]] = "\n" * before.count("\n") + match[1]
    return found


def test_each_kind_of_extension_has_an_example():
    assert list(examples()) == ["Add a layer", "Add an operator", "Add a score", "Add a runtime"]
    assert all(len(code.strip().splitlines()) < 30 for code in examples().values())


def test_examples_run(tmp_path):
    # In a separate process, because the examples register layers, operators and runtimes.
    runs = [
        f"exec(compile({code!r}, 'extend.md', 'exec'), {{'__name__': 'example'}})"
        for code in examples().values()
    ]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(runs)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr

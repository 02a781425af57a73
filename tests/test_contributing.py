"""The examples of docs/extend.md run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from pruning.deploy import register_runtime
from pruning.graph.layers import register_layer
from pruning.tracing.operators import register_operator

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")


def examples():
    """Return the Python examples by section, after empty lines that keep their line numbers in tracebacks."""
    found = {}
    for match in re.finditer(r"^```python\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE):
        before = TEXT[: match.start(1)]
        found[re.findall(r"^## (.+)$", before, re.MULTILINE)[-1]] = "\n" * before.count("\n") + match[1]
    return found


@pytest.fixture
def handles(monkeypatch):
    """What the examples register, which is removed after the test."""
    made = []

    def recorded(register):
        def call(*args, **options):
            made.append(register(*args, **options))
            return made[-1]

        return call

    for place, register in {
        "pruning.deploy": register_runtime,
        "pruning.graph.layers": register_layer,
        "pruning.tracing.operators": register_operator,
    }.items():
        monkeypatch.setattr(f"{place}.{register.__name__}", recorded(register))
    yield made
    for handle in made:
        handle.remove()


def test_each_kind_of_extension_has_an_example():
    assert list(examples()) == ["Add a layer", "Add an operator", "Add a score", "Add a runtime"]
    assert all(len(code.strip().splitlines()) < 30 for code in examples().values())


def test_examples_run(tmp_path, monkeypatch, handles):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    for code in examples().values():
        exec(compile(code, "extend.md", "exec"), {"__name__": "example"})
    assert len(handles) == 3

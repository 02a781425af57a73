"""The examples of docs/extend.md run as they stand."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest
import torch

from pruning import PruningError
from pruning.deploy import register_runtime
from pruning.graph.layers import register_layer
from pruning.tracing.operators import register_operator

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")


def examples():
    """Return the section and the code of each Python example.

    Empty lines before the code keep its line numbers in tracebacks.
    """
    found = []
    for match in re.finditer(r"^```python\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE):
        before = TEXT[: match.start(1)]
        section = re.findall(r"^## (.+)$", before, re.MULTILINE)[-1]
        found.append((section, "\n" * before.count("\n") + match[1]))
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
    sections = list(dict.fromkeys(section for section, _ in examples()))
    assert sections == ["Add a layer", "Add an operator", "Add a score", "Add a runtime"]
    assert all(len(code.strip().splitlines()) < 30 for _, code in examples())


def test_examples_run(tmp_path, monkeypatch, handles):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {}  # the examples of a section share their imports
    for section, code in examples():
        exec(compile(code, "extend.md", "exec"), names.setdefault(section, {"__name__": "example"}))
    assert len(handles) == 5


def test_examples_of_rules_fail_without_them():
    names, seen = {}, 0
    for section, code in examples():
        if section not in ("Add a layer", "Add an operator"):
            continue
        without = re.sub(r"^register_(?:layer|operator)\(.*\n", "\n", code, flags=re.MULTILINE)
        seen += without != code
        expected = (AssertionError, PruningError)
        # torch refuses to define an operator twice.
        program = compile(without.replace("contributing::", "unregistered::"), "extend.md", "exec")
        with pytest.raises(expected) if without != code else contextlib.nullcontext():
            exec(program, names.setdefault(section, {"__name__": "example"}))
    assert seen == 4

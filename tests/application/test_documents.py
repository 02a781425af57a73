"""Every code block of the README and the documents runs as it stands."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

#: A block, with the comment above it that says why it is not run.
BLOCK = re.compile(
    r"(?:<!-- not run: (?P<why>[^>]+) -->\n)?^```(?P<kind>\w+)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE
)


def blocks(page):
    """Return the kind and the text of each block that runs, and its first line in the page."""
    text = page.read_text(encoding="utf-8")
    return [
        (found["kind"], found["code"], text.count("\n", 0, found.start("code")))
        for found in BLOCK.finditer(text)
        if found["why"] is None and (found["kind"] == "python" or "python -m pruning " in found["code"])
    ]


def commands(code):
    """Return the words of each `python -m pruning` line of a shell block."""
    lines = code.replace("\\\n", " ").splitlines()
    return [
        words[3:]
        for words in (shlex.split(line, comments=True) for line in lines)
        if words[:3] == ["python", "-m", "pruning"] and len(words) > 3
    ]


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_code_blocks_run(page, run, tmp_path, monkeypatch):
    for module in ("mine", "net", "load_pruned"):  # that the pages write
        monkeypatch.delitem(sys.modules, module, raising=False)
    shutil.copytree(ROOT / "checkpoints", tmp_path / "checkpoints")  # the pages write beside them
    names = {"__name__": "example"}
    for kind, code, line in blocks(page):
        if kind == "python":
            exec(compile("\n" * line + code, str(page), "exec"), names)
            continue
        for words in commands(code):
            status, _, errors = run(*words)
            assert status == 0, f"{page.name}:{line}: python -m pruning {shlex.join(words)}: {errors}"


def test_links_within_the_repository_exist():
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if "://" in link or link.startswith("reference/"):
                continue
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_readme_is_a_page():
    assert (ROOT / "README.md").stat().st_size <= 8192


def test_the_drawings_are_those_of_their_script(tmp_path):
    drawn = runpy.run_path(str(ROOT / "docs" / "drawings.py"))
    for name in ("groups", "labels", "equivalence", "pull"):
        drawn[name].__globals__["FOLDER"] = tmp_path
        drawn[name]()
        committed = ROOT / "docs" / "drawings" / f"{name}.svg"
        assert (tmp_path / committed.name).read_text() == committed.read_text()

"""Every code block of the README and the documents runs as it stands."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch

from pruning import Budget, load, prune
from pruning.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
#: Its examples register layers and runtimes; tests/test_contributing.py runs them and removes these.
APART = ROOT / "docs" / "extend.md"

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
@pytest.mark.parametrize(
    "page", [page for page in PAGES if page != APART and blocks(page)], ids=lambda page: page.stem
)
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
    drawn["Drawing"].write.__globals__["FOLDER"] = tmp_path
    for draw in drawn["PICTURES"]:
        draw()
        committed = ROOT / "docs" / "drawings" / f"{draw.__name__}.svg"
        assert (tmp_path / committed.name).read_text() == committed.read_text()


@pytest.fixture(scope="module")
def error_page():
    return runpy.run_path(str(ROOT / "docs" / "error_texts.py"))


def test_each_error_is_listed_with_its_topic(error_page, toolkit, tmp_path):
    page, texts, listed = error_page, error_page["texts"](), error_page["page"]()
    assert {page["topic"](each.file) for each in texts} == {title for title, _, _ in page["TOPICS"]}
    assert all(" ".join(each.text.split()) in listed for each in texts)
    net, images = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)), torch.ones(1, 4)
    said = []
    for call in (
        lambda: prune(net, images, Budget(params=1), score="l2"),
        lambda: prune(net, images, Budget(params="50%"), score="12"),
        lambda: prune(net[0], images, Budget(params="50%"), score="l2"),
        lambda: load(tmp_path / "none.pth"),
    ):
        with pytest.raises(UserError) as raised:
            call()
        said.append(str(raised.value))
    _, _, errors = toolkit("test", "--model", "resnet18")
    said.append(errors.removeprefix("error: ").strip())
    for message in said:
        assert any(each.matches(message) for each in texts), message


def test_errors_name_pages_by_titles_because_an_installed_package_lacks_the_files(error_page):
    titles = {page.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ") for page in PAGES}
    named = set()
    for each in error_page["texts"]():
        assert not re.search(r"docs/|\.md\b|README", each.text), each
        named.update(re.findall(r'see "(.+?)" in the documentation', " ".join(each.text.split())))
    assert named <= titles and len(named) == 3


def test_each_decision_is_listed():
    listed = re.findall(r"\((decisions/.+\.md)\)", (ROOT / "docs" / "design.md").read_text(encoding="utf-8"))
    pages = [
        path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs" / "decisions").glob("*.md")
    ]
    assert set(listed) == set(pages)


def test_each_page_is_in_the_navigation():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("nav:")[2]
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "design.md" or re.search(rf"[ :]{re.escape(page.name)}$", nav, re.MULTILINE), page

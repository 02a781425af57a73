"""Hooks of the site: pages from outside docs/, links to them, and the reference of functions and commands."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
#: Packages with a public interface, in the order in which a user meets them.
PACKAGES = ("planning", "stages", "training", "surgery", "tracing", "graph", "deploy", "report", "demo")
#: Pages of results; docs/measured.md says how each was measured.
RESULTS = (
    "results.md", "trained.md", "paper.md", "zoo.md", "libraries.md", "families.md", "fair.md",
    "without-training.md",
)  # fmt: skip
#: Files of the repository that are pages of the site, or that pages link to.
OUTSIDE = (
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "benchmarks/*.md",
    "benchmarks/*.json",
    "data/README.md",
)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the decisions to the navigation, in the order in which docs/design.md lists them."""
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    pages: list[object] = ["design.md", *re.findall(r"^- \[.+\]\((decisions/.+\.md)\)$", text, re.MULTILINE)]
    for section in config.nav or []:
        section.update({title: pages for title in section if title == "Decisions"})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files from outside docs/, and the pages of the reference."""
    sys.path += [str(ROOT), str(ROOT / "docs")]
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    for path in sorted(ROOT.glob("notebooks/*.ipynb")):
        text, resources = MarkdownExporter().from_filename(path)
        for name, content in {f"{path.stem}.md": text, **resources["outputs"]}.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    errors = importlib.import_module("error_texts").page()
    pages = {"commands": commands(), "pruning": functions(), "packages": packages(), "errors": errors}
    for name, content in pages.items():
        files.append(File.generated(config, f"reference/{name}.md", content=content))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Point links between docs/ and the rest of the repository to where the pages are in the site."""
    here = page.file.src_uri
    if here in RESULTS:
        markdown += (
            "\n\nCommand, commit, date and machine of these figures: [how it was measured](measured.md).\n"
        )
    markdown = re.sub(r"\]\((\S+)\.ipynb\)", r"](\1.md)", markdown)
    if here in ("CONTRIBUTING.md", "CHANGELOG.md"):
        return markdown.replace("](docs/", "](")
    if here.startswith(("benchmarks/", "notebooks/")):
        return markdown.replace("](../docs/", "](../")
    if here.startswith("decisions/"):
        return markdown.replace("](../../", "](../")
    return re.sub(r"\]\(\.\./", "](", markdown) if "/" not in here else markdown


def functions() -> str:
    """Return the reference of what `pruning` itself exports: functions first, then types."""
    package = importlib.import_module("pruning")
    names = sorted(package.__all__, key=lambda name: (name[0].isupper(), name))
    intro = "Everything on this page is imported from `pruning`; the rest is in the [packages](packages.md)."
    return "\n\n".join(["# Public functions and types", intro, *_entries(package, names)]) + "\n"


def packages() -> str:
    """Return the reference of what each package exports."""
    parts = ["# Packages"]
    for name in PACKAGES:
        package = importlib.import_module(f"pruning.{name}")
        parts += [f"## pruning.{name}", str(package.__doc__).partition("\n")[0]]
        parts += _entries(package, [each for each in package.__all__ if each not in _public()])
    return "\n\n".join(parts) + "\n"


def _public() -> list[str]:
    return importlib.import_module("pruning").__all__


def _entries(package: object, names: list[str]) -> list[str]:
    return [f"::: {getattr(package, name).__module__}.{name}" for name in names]


def commands() -> str:
    """Return the help texts of all commands as a page."""
    names = importlib.import_module("pruning.cli.command_table").COMMANDS
    parts = ["# Commands", _help()]
    for name in names:
        parts += [f"## {name}", _help(name)]
    return "\n\n".join(parts) + "\n"


def _help(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pruning", *words, "--help"],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "100"},
        capture_output=True,
        text=True,
        check=True,
    )
    return f"```text\n{done.stdout.strip()}\n```"

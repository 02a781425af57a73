"""How the project is laid out: the toolkit stands alone."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

from pruning.cli.config_file import tomllib

ROOT = Path(__file__).resolve().parent.parent


def imports(folder):
    """(file, top-level package) of every import below a folder."""
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from ((path.name, alias.name.split(".")[0]) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield path.name, (node.module or "").split(".")[0]


def test_the_toolkit_imports_nothing_else_of_this_repository():
    allowed = {
        "pruning",
        "torch",
        "thop",
        "numpy",
        "PIL",
        "filelock",
        "tqdm",
        "matplotlib",
        "tomli",
        "torchvision",
        "onnx",
        "onnxruntime",
        *sys.stdlib_module_names,
    }
    assert {name for _, name in imports("pruning")} <= allowed


def test_thop_and_matplotlib_each_have_one_door():
    found = list(imports("pruning"))
    assert {file for file, name in found if name == "thop"} == {"cost.py"}
    assert {file for file, name in found if name == "matplotlib"} <= {"plots.py"}
    assert {file for file, name in found if name == "torchvision"} == {"sources.py", "image_folder.py"}


def test_models_and_data_know_nothing_of_each_other():
    assert not {"models", "eval"} & {name for _, name in imports("data")}
    assert not {"data", "eval"} & {name for _, name in imports("models")}


def test_what_the_package_installs_holds_the_parts_of_the_page():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {
        ".".join(p.parent.relative_to(ROOT).parts): p.parent for p in ROOT.glob("pruning/**/__init__.py")
    }
    assert set(settings["packages"]) == set(folders)
    for package, folder in folders.items():
        others = {p.name for p in folder.iterdir() if p.suffix not in (".py", ".pyc") and p.is_file()}
        patterns = settings["package-data"].get(package, [])
        assert others == {p.name for each in patterns for p in folder.glob(each) if p.suffix != ".py"}

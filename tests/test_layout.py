"""Check the imports, file sizes and packaging of the project."""

from __future__ import annotations

import ast
import functools
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import setuptools

import pruning
from pruning.cli.config_file import tomllib

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parent.parent


@functools.cache
def nodes(path):
    """Return all nodes of the syntax tree of a file, which several tests read."""
    return tuple(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def imports(folder):
    """Yield (file, top-level package) for every import below a folder."""
    for path in (ROOT / folder).rglob("*.py"):
        for node in nodes(path):
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
        "jinja2",
        "tqdm",
        "matplotlib",
        "tomli",
        "torchvision",
        "onnx",
        "onnxruntime",
        "transformers",
        "safetensors",
        "lightning",
        "ultralytics",
        "ray",
        *sys.stdlib_module_names,
    }
    assert {name for _, name in imports("pruning")} <= allowed


#: The packages and files of the toolkit, from the top: each imports only from those below it.
LAYERS = (
    "__main__",
    "__init__",
    "cli",
    "integrations",
    "report",
    "demo",
    "stages",
    "planning",
    "training",
    "deploy",
    "checkpoint",
    "tracing",
    "surgery",
    "graph",
    "load_pruned",
    "utils",
    "errors",
)


@functools.cache
def graph():
    """Return the files that each file of the toolkit imports, also inside functions."""
    files = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in ROOT.glob("pruning/**/*.py")}

    def resolve(name):
        return next((found for found in (name, f"{name}.__init__") if found in files), None)

    found = {}
    for file, path in files.items():
        found[file] = set()
        for node in nodes(path):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "pruning":
                for alias in node.names:
                    found[file].add(resolve(f"{node.module}.{alias.name}") or resolve(node.module))
            elif isinstance(node, ast.Import):
                found[file] |= {resolve(a.name) for a in node.names if a.name.split(".")[0] == "pruning"}
    return found


def test_packages_import_only_from_lower_packages():
    layer = lambda file: LAYERS.index(file.split(".")[1])  # noqa: E731
    upward = [
        f"{file} imports {other}"
        for file, others in graph().items()
        for other in others
        if layer(other) < layer(file)
    ]
    assert upward == []


def test_imports_have_no_cycles():
    imports = dict(graph())
    while leaves := [file for file, others in imports.items() if not others & imports.keys() - {file}]:
        for file in leaves:
            del imports[file]
    assert sorted(imports) == []


def test_no_package_exports_a_name_that_hides_a_module():
    hidden = []
    for file in graph():
        package, _, name = file.rpartition(".")
        if name not in ("__init__", "__main__"):
            __import__(file)
            if not isinstance(getattr(sys.modules[package], name), ModuleType):
                hidden.append(file)
    assert hidden == []


def test_files_have_at_most_350_lines(most=350):
    lengths = {str(p): len(p.read_text(encoding="utf-8").splitlines()) for p in ROOT.glob("pruning/**/*.py")}
    assert {name: length for name, length in lengths.items() if length > most} == {}


def test_functions_have_at_most_60_lines(most=60):
    long = {}
    for path in ROOT.glob("pruning/**/*.py"):
        for node in nodes(path):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= most:
                long[f"{path}:{node.name}"] = node.end_lineno - node.lineno + 1
    assert long == {}


def test_any_is_the_type_of_few_values(most=150):
    lines = [
        line for path in (ROOT / "pruning").rglob("*.py") for line in path.read_text("utf-8").splitlines()
    ]
    used = [line for line in lines if re.search(r"\bAny\b", line) and "import" not in line]
    assert len(used) <= most, "name the type, or give a name to what may hold anything"


def test_thop_matplotlib_jinja2_and_torchvision_are_imported_only_where_expected():
    found = list(imports("pruning"))
    assert {file for file, name in found if name == "thop"} == {"cost.py"}
    assert {file for file, name in found if name == "matplotlib"} == {"figures.py"}
    assert {file for file, name in found if name == "jinja2"} == {"html.py"}
    assert {file for file, name in found if name == "torchvision"} == {"factories.py", "image_folder.py"}


def test_models_and_data_do_not_import_each_other():
    assert not {"models", "eval"} & {name for _, name in imports("data")}
    assert not {"data", "eval"} & {name for _, name in imports("models")}


def settings():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_package_of_the_toolkit_is_installed():
    find = settings()["tool"]["setuptools"]["packages"]["find"]
    assert find["namespaces"] is False
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in ROOT.glob("pruning/**/*.py")}
    assert set(setuptools.find_packages(str(ROOT), include=find["include"])) == folders


def test_every_data_file_of_the_toolkit_is_installed():
    patterns = settings()["tool"]["setuptools"]["package-data"]["*"]
    data = {
        path for path in ROOT.glob("pruning/**/*") if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert data == {path for pattern in patterns for path in ROOT.glob(f"pruning/**/{pattern}")}


def test_the_requirement_files_and_pyproject_list_the_same_requirements():
    project = settings()["project"]
    extras = {name: requirements(lines) for name, lines in project["optional-dependencies"].items()}
    runs = requirements((ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines())
    develops = requirements((ROOT / "requirements-dev.txt").read_text(encoding="utf-8").splitlines())
    everything = requirements(project["dependencies"]).union(*extras.values())
    assert requirements(project["dependencies"]) <= runs
    assert runs | develops == {line for line in everything if not line.startswith("pruning")}


def requirements(lines):
    """Return requirements without comments and spaces, with double quotes."""
    plain = (line.split("#")[0].replace(" ", "").replace("'", '"') for line in lines)
    return {line for line in plain if line and not line.startswith("-r")}


def test_the_public_face_is_small_and_earlier_names_still_work():
    functions = {"doctor", "export", "finetune", "load", "prune", "save", "sensitivity", "slim", "trace"}
    types = {"Budget", "LatencyBudget", "Plan", "PruningError", "SlimConfig", "Trace"}
    assert set(pruning.__all__) == functions | types
    for names in pruning._MOVED.values():
        assert all(callable(getattr(pruning, name)) for name in names)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        pruning.nothing  # noqa: B018

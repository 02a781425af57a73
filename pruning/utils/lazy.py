"""Import the modules of a package when a name of theirs is first used."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable


def lazy_exports(package: str, file: str) -> Callable[[str], object]:
    """Return the `__getattr__` of a package whose imports stand under `if TYPE_CHECKING:`.

    Type checkers read these imports. At run time, they are read from the source when a name is first
    used, and only the module of that name is imported. Modules of the package are attributes of it,
    too, as if they were imported already.

    Args:
        package: `__name__` of the package. file: its `__file__`.

    >>> import pruning.deploy
    >>> pruning.deploy.Exported.__module__, pruning.deploy.timing.__name__
    ('pruning.deploy.runtimes', 'pruning.deploy.timing')
    """
    modules: dict[str, str] = {}

    def find(name: str) -> object:
        if not modules:
            modules.update(_guarded_imports(file))
        if name in modules:
            value = getattr(importlib.import_module(modules[name]), name)
            setattr(sys.modules[package], name, value)
            return value
        dunder = name.startswith("__")
        if not dunder and importlib.util.find_spec(f"{package}.{name}") is not None:
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return find


def _guarded_imports(file: str) -> dict[str, str]:
    """The names that a source file imports under `if TYPE_CHECKING:`, with their modules."""
    import ast  # only where a name is used: a command starts without it

    found = {}
    with open(file, encoding="utf-8") as source:
        blocks = ast.parse(source.read()).body
    for block in blocks:
        if isinstance(block, ast.If) and isinstance(block.test, ast.Name):
            for node in block.body:
                if isinstance(node, ast.ImportFrom) and node.module is not None:
                    found.update({alias.name: node.module for alias in node.names})
    return found

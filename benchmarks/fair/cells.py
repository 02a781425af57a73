"""The results file: cells, their settings, and the locks that keep a cell from being computed twice."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from benchmarks.fair.recipes import Recipe
from benchmarks.results import changed_json, read_json
from pruning.errors import PruningError

FORMAT = "benchmarks.fair"
#: Raised whenever cells of earlier versions may not be compared with new ones.
VERSION = 1

#: Budget of the dense network.
WHOLE = "100%"


@dataclass(frozen=True)
class Cell:
    """One entry of the results.

    Attributes:
        budget: of MACs, as a share of those of the dense network, `50%`.
    """

    network: str
    method: str
    budget: str
    seed: int

    def __str__(self) -> str:
        return f"{self.network}, {self.method}, {self.budget}, seed {self.seed}"

    def folder(self, runs: Path, recipe: Recipe, data: str) -> Path:
        """Return the folder of the cell's training; other settings or data have another one."""
        names = (f"{self.network}-{data}-{recipe.fingerprint()}", f"{self.method}-{self.budget}-{self.seed}")
        return runs.joinpath(*(re.sub(r"[^\w.-]", "_", name.replace("%", "pc")) for name in names))


class Results:
    """The results in a JSON file, which is replaced under a lock.

    Args:
        path: of the file. format: what its cells are.

    Raises:
        PruningError: the file is of another version, no results file, or made with other settings.
    """

    def __init__(self, path: Path, format: str = FORMAT):
        self.path, self.format = path, format
        self.read()

    def read(self) -> dict[str, Any]:
        """Return the content of the file."""
        try:
            content = read_json(self.path, self._empty())
        except (OSError, ValueError) as error:
            raise PruningError(
                f"{self.path} cannot be read ({error}): give --results another file"
            ) from error
        if not isinstance(content, dict) or content.get("format") != self.format:
            raise PruningError(f"{self.path} holds no results of this benchmark: give --results another file")
        if content.get("version") != VERSION:
            raise PruningError(
                f"{self.path} has version {content.get('version')} of the results, this benchmark writes "
                f"version {VERSION}, and their cells cannot be compared: give --results another file"
            )
        return content

    def _empty(self) -> dict[str, Any]:
        return {"format": self.format, "version": VERSION, "settings": {}, "cells": []}

    def require_settings(self, network: str, settings: dict[str, Any]) -> None:
        """Store the settings of a network, or compare them with those of its cells."""
        with self._changed() as content:
            before = content["settings"].setdefault(network, settings)
        changed = sorted(key for key in {**before, **settings} if before.get(key) != settings.get(key))
        if changed:
            said = ", ".join(f"{key} {before.get(key)}, now {settings.get(key)}" for key in changed)
            raise PruningError(
                f"{self.path}: the cells of {network} were computed with other settings ({said}); use the "
                "same, or give --results another file"
            )

    def find(self, cell: Cell) -> dict[str, Any] | None:
        """Return the result of a cell, if it is complete."""
        wanted = asdict(cell)
        return next((found for found in self.read()["cells"] if wanted.items() <= found.items()), None)

    def add(self, cell: Cell, found: dict[str, Any]) -> None:
        """Store a complete cell. Raises `PruningError` if it is stored already."""
        with self._changed() as content:
            if any(asdict(cell).items() <= old.items() for old in content["cells"]):
                raise PruningError(f"{self.path} has the cell {cell} already")
            content["cells"].append({**asdict(cell), **found})
            content["cells"].sort(key=lambda old: (old["network"], old["budget"], old["method"], old["seed"]))

    def change(self, cell: Cell, found: dict[str, Any]) -> None:
        """Replace figures of a complete cell."""
        with self._changed() as content:
            for old in content["cells"]:
                if asdict(cell).items() <= old.items():
                    old.update(found)

    @contextlib.contextmanager
    def _changed(self) -> Iterator[dict[str, Any]]:
        self.read()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with changed_json(self.path, self._empty()) as content:
            yield content


@contextlib.contextmanager
def locked(folder: Path, *, wait: bool) -> Iterator[bool]:
    """Lock the folder of a cell; yield False where another process holds it and `wait` is false.

    The system releases the lock of a process that ends, however it ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "cell.lock")
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()

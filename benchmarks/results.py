"""Files, tables and accuracies that benchmarks share; files are written atomically."""

from __future__ import annotations

import contextlib
import copy
import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from pruning.utils.files import replace_file


def read_json(path: Path, default: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a results file, or a copy of the default if it does not exist."""
    return json.loads(path.read_text()) if path.exists() else copy.deepcopy(default)


def write_json(path: Path, content: Any, *, sort_keys: bool = False) -> str:
    """Write results as JSON and return the text."""
    text = json.dumps(content, indent=1, sort_keys=sort_keys) + "\n"
    replace_file(path, text.encode())
    return text


@contextlib.contextmanager
def changed_json(path: Path, default: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the content of a results file under a lock, and write it afterwards."""
    with FileLock(path.with_suffix(".lock")):
        content = read_json(path, default)
        yield content
        write_json(path, content)


def write(path: Path, result: Any, text: str) -> None:
    """Write results as JSON, and a text as Markdown to the same folder; print the text."""
    write_json(path, result)
    replace_file(path.with_suffix(".md"), text.encode())
    print(text, end="")


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Return the lines of a Markdown table, and an empty line."""
    heads = list(heads)
    return [*(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)), ""]


def deviation(values: Sequence[float]) -> float:
    """Return the standard deviation of several runs, or 0 for one run."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def percent(accuracies: Sequence[float]) -> str:
    """Format the mean of several runs in percent, with the standard deviation if there is more than one."""
    shares = [100 * value for value in accuracies]
    spread = f" ± {statistics.stdev(shares):.2f}" if len(shares) > 1 else ""
    return f"{statistics.mean(shares):.2f}{spread}"

"""Types of arguments: functions that read the text of a flag, or name what was expected."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pruning.utils.settings import Setting

#: Where runs go that are told no folder.
RUNS = Path("runs")

Number = TypeVar("Number", int, float)


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return an argument type: a whole number within inclusive bounds."""
    bounds = Setting("", least=least, most=most)
    return lambda text: within(int, bounds, text)


def number(least: float, most: float | None = None) -> Callable[[str], float]:
    """Return an argument type: a finite number within inclusive bounds."""
    bounds = Setting("", least=least, most=most)
    return lambda text: within(float, bounds, text)


def within(kind: Callable[[str], Number], setting: Setting, text: str) -> Number:
    """The number that a text stands for. Raises `ArgumentTypeError` for another text or another number."""
    whole = kind is int
    try:
        value = kind(text)
        if setting.allows(value, int if whole else float):
            return value
    except ValueError:
        pass
    expected = setting.expected(int if whole else float)
    instead = f", or {setting.none}" if setting.none is not None else ""
    raise argparse.ArgumentTypeError(f"{text!r}: expected {expected}{instead}")


#: An argument type: a seed of torch's generators.
seed = whole_number(0, 2**63 - 1)


def nearest_path(text: str) -> str:
    """Ask whether a path that exists, and differs in one name, was meant; empty if there is none.

    >>> nearest_path("nowhere/at/all")
    ''
    """
    path = Path(text)
    for place in (path, *path.parents):
        if place.parent.is_dir() and place.name:
            siblings = [each.name for each in place.parent.iterdir()]
            near = difflib.get_close_matches(place.name, siblings, 1)
            meant = place.parent / near[0] / path.relative_to(place) if near else place
            return f" (did you mean {meant}?)" if meant.exists() else ""
    return ""


def existing_file(text: str) -> Path:
    """Argument type: a file to read."""
    if not Path(text).exists():
        raise argparse.ArgumentTypeError(
            f"{text}: there is no such file{nearest_path(text) or '; check the path'}"
        )
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder: expected a file")
    return Path(text)


def new_file(text: str) -> Path:
    """Argument type: a file to write, which is no folder."""
    if not text or Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder: expected the name of a file")
    return Path(text)


def folder(text: str) -> Path:
    """Argument type: a folder to write to, which need not exist."""
    place = Path(text)
    there = next(path for path in (place, *place.absolute().parents) if path.exists())
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} cannot be a folder: {there} is a file; give another")
    return place


def device(text: str) -> str:
    """Argument type: a device that torch can use here and that stores values."""
    if text == "cpu":
        return text
    import torch  # not for the default

    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0] if str(error) else "it is not available"
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here: {reason}; try cpu") from None
    if torch.device(text).type == "meta":
        raise argparse.ArgumentTypeError(f"{text!r} holds no values to prune: expected cpu or cuda")
    return text


def next_run() -> Path:
    """Return the next free numbered folder of `RUNS`."""
    numbers = [int(path.name) for path in RUNS.glob("*") if path.name.isdigit()]
    return RUNS / str(max(numbers, default=0) + 1)

"""What command lines share: argument types, and how they end."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from pruning.errors import PruningError, UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: Exit codes: bad usage or input, and Ctrl-C.
BAD_INPUT, INTERRUPTED = 2, 130


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with the default of every flag that has one, and the description as it was written."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def read_recipe(path: Path) -> list[str]:
    """The flags that a TOML file holds: `max-params = 2000` is --max-params 2000.

    `true` and `false` stand for a flag and its --no- form. Raises `PruningError` for a file
    that cannot be read or holds something else than names with plain values.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PruningError(f"{path} cannot be read as a recipe: {error}") from error
    flags = []
    for name, value in content.items():
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, str | int | float):
            flags += [f"--{name}", str(value)]
        else:
            raise PruningError(f"{path}: {name} is a {type(value).__name__}, a plain value was expected")
    return flags


def run(main: Callable[[], None], interrupted: str = "interrupted") -> None:
    """Call `main`; end with one line and an exit code when the user's input was at fault.

    `interrupted` is said after Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a console that lacks γ or ≤ shows a ? for it
            stream.reconfigure(errors="replace")
    try:
        main()
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr)
        sys.exit(INTERRUPTED)


def whole_number(least: int) -> Callable[[str], int]:
    """An argument type: a whole number that is at least `least`."""

    def parse(text: str) -> int:
        if not text.strip().lstrip("+-").isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from {least}")
        return int(text)

    return parse


def number(least: float, most: float = float("inf")) -> Callable[[str], float]:
    """An argument type: a number between two bounds, both allowed."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not least <= value <= most or value == float("inf"):
            bounds = f"from {least:g}" + (f" to {most:g}" if most < float("inf") else "")
            raise argparse.ArgumentTypeError(f"{text!r}: expected a number {bounds}")
        return value

    return parse


def device(text: str) -> str:
    """An argument type: a device that torch can use here."""
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0] if str(error) else "it is not available"
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here: {reason}") from None
    return text
